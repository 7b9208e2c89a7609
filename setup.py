"""Builds the extension ``errand_boy._native`` and, from the same sources, ``errand-boy-helper``.

Not on other systems than Linux, on PyPy, or with ERRAND_BOY_WITHOUT_C in the environment: there
the package has its Python code only.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

HELPER = "errand-boy-helper"
HELPER_SOURCES = [
    f"csrc/{name}.c"
    for name in (
        "program/main",
        "helper/loop",
        "helper/frames",
        "helper/command",
        "helper/connection",
        "helper/counters",
        "owner/process",
        "helper/queue",
        "owner/self",
        "owner/stdio",
        "common/channel",
        "common/fdpass",
        "spawn/rawclone",
        "spawn/request",
        "spawn/slices",
        "spawn/spawn_child",
        "spawn/spawn_clone",
        "spawn/spawn_job",
        "common/state",
        "common/wire",
        "helper/streams",  # its large buffer lies behind what others touch
        # From here on: what most helpers use once at the most, which helper/rare.c unmaps.
        "helper/rare",
        "owner/become",
        "helper/control",
        "helper/record",
        "owner/terminal",
        "spawn/child_capabilities",
        "spawn/places",
        "spawn/proctree",
        "spawn/sandbox",
        "spawn/spawn_posix",
        "spawn/supervisor",
        "spawn/watch",
        "keeper/main",
        "keeper/loop",
        "keeper/frames",
        "keeper/command",
        "keeper/notify",
        "keeper/attach",
        "keeper/follow",
        "keeper/client",
        "keeper/log",
        "keeper/journal",
        "keeper/ring",
    )
]
# The second as in Python.h: where a long has 32 bits, limits and offsets have 64 all the same.
MACROS = [("_GNU_SOURCE", None), ("_FILE_OFFSET_BITS", "64")]
COMPILE = ["-std=c11", "-fPIE", "-Wall", "-Wextra", "-fstack-protector"]
# Fewer pages of its own: no tables for unwinding, no indirection that LINK resolves at once.
COMPILE += ["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]
COMPILE += ["-fno-plt", "-fvisibility=hidden"]
# The first that the compiler knows. With two of its optimizations gcc's code is 450 bytes larger.
SMALL = (["-Oz", "-fno-tree-sra", "-fno-move-loop-invariants"], ["-Oz"], ["-Os"])
# Dynamic: the C library's text is shared with all other processes; a static one would be its own.
# Resolved at once: a new process that shares the helper's memory must not run the dynamic linker.
LINK = ["-pie", "-Wl,-z,relro,-z,now,--no-eh-frame-hdr,--build-id=none"]
DENSE = (["-Wl,-z,noseparate-code"], [])  # zig's linker has no such option: it does so anyway


MISSING = """\
errand-boy is partly in C, and {} here. What builds it is in these packages:
    Debian, Ubuntu: apt-get install gcc libc6-dev python3-dev
    Fedora:         dnf install gcc glibc-devel python3-devel"""

WITHOUT_C = (sys.platform, sys.implementation.name) != ("linux", "cpython") or bool(
    os.environ.get("ERRAND_BOY_WITHOUT_C")
)

if os.name != "posix":
    sys.exit("errand-boy is for Linux and other Unix systems")


class BuildExt(build_ext):
    """build_ext that also links the helper executable beside the extension."""

    def build_extensions(self) -> None:
        if not self.accepts([]):
            sys.exit(MISSING.format("there is no C compiler that works"))
        headers = [f"-I{path}" for path in self.include_dirs]
        if not self.accepts([*headers, "-include", "Python.h"]):
            sys.exit(MISSING.format("there are no headers of this Python"))
        super().build_extensions()

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("errand_boy._native")).parent
        flags = os.environ.get("ERRAND_BOY_CFLAGS", "").split()
        objects = self.compiler.compile(
            HELPER_SOURCES,
            output_dir=os.path.join(self.build_temp, "helper"),
            macros=MACROS,
            include_dirs=["csrc"],
            extra_preargs=[*COMPILE, *next(filter(self.accepts, SMALL)), *flags],
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
        )
        self.compiler.link_executable(
            objects,
            HELPER,
            output_dir=str(package),
            extra_postargs=[*LINK, *next(filter(self.links, DENSE)), *flags],
        )

    def accepts(self, options: list[str]) -> bool:
        """Tell whether the compiler knows *options*."""
        return self.builds(options, [])

    def links(self, options: list[str]) -> bool:
        """Tell whether the linker knows *options*."""
        return self.builds([], options)

    def builds(self, compile_options: list[str], link_options: list[str]) -> bool:
        # As setuptools does for the extension, but not for a program: what CFLAGS says may need it.
        link_options = [*os.environ.get("LDFLAGS", "").split(), *link_options]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "program.c")
            source.write_text("int main(void) { return 0; }\n")
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_preargs=compile_options
                )
                self.compiler.link_executable(
                    objects, "program", output_dir=folder, extra_postargs=link_options
                )
            except (CompileError, LinkError):
                return False
        return True


def long_description() -> str:
    """Return the README with its links to this repository's files made absolute."""
    (source,) = re.findall(r'^Source = "(.*)"$', Path("pyproject.toml").read_text(), re.MULTILINE)
    package = Path("errand_boy/__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"$', package, re.MULTILINE)
    commit = "main" if "dev" in version else f"v{version}"

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"  # a picture is to be the picture, not a page about it
        return f"{match[1]}{match[2]}({source}/{kind}/{commit}/{match[3]})"

    link = r"(!?)(\[[^]]*\])\((?![a-z]+:|#)([^)\s]+)\)"
    return re.sub(link, absolute, Path("README.md").read_text())


PARTS: dict[str, Any] = {}
WHEEL: dict[str, str] = {}
if WITHOUT_C:
    # Not for any system: CPython on Linux, with the same cache of wheels, must not get this one.
    WHEEL["plat_name"] = sysconfig.get_platform()
    if sys.implementation.name == "pypy":
        WHEEL["python_tag"] = "pp{}{}".format(*sys.version_info)
else:
    PARTS = {"cffi_modules": ["build_ffi.py:ffibuilder"], "cmdclass": {"build_ext": BuildExt}}
    # One wheel for 3.10 and all later. A free-threaded Python has no limited API before 3.15, and
    # another from then on: its wheel is for one version. cffi leaves the limited API out by itself.
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        WHEEL["py_limited_api"] = "cp310"

setup(
    **PARTS,
    data_files=[("share/man/man1", ["docs/errand-boy.1"])],
    options={"bdist_wheel": WHEEL},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
