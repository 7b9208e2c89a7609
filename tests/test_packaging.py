"""The contents of an installation: one version, the helper in the package, type hints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipapp
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from conftest import find_program

import errand_boy
from errand_boy import _hints
from errand_boy._cli.args import COMMANDS, parser_of
from errand_boy._process.start import instead_of

PACKAGE = Path(errand_boy.__file__).parent
ROOT = Path(__file__).parent.parent


def test_helper_is_an_executable_in_the_package() -> None:
    helper = PACKAGE / "errand-boy-helper"
    assert os.access(helper, os.X_OK)
    assert helper.read_bytes()[:4] == b"\x7fELF"


def needs_setuptools() -> None:
    pytest.importorskip("setuptools", "77", reason="pip install 'setuptools>=77'")


def test_types_are_announced() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_type_checkers_follow_an_editable_installation(tmp_path: Path) -> None:
    needs_setuptools()
    # Without setup.py, which makes the description too, nothing is compiled.
    project = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project.replace('"version", "readme"', '"version"'))
    shutil.copy(ROOT / "LICENSE", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "errand_boy", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    (tmp_path / "wheels").mkdir()
    subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, env=env, check=True, capture_output=True
    )
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (pth,) = (name for name in file.namelist() if name.endswith(".pth"))
        assert file.read(pth).decode().strip() == str(tmp_path)  # a path, and no code


def test_version_is_the_packages() -> None:
    try:
        version = metadata.version("errand-boy")
    except metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert errand_boy.__version__ == version
    command = [sys.executable, "-m", "errand_boy", "--version"]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert subprocess.check_output(command, env=env, text=True).strip() == version


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="built for this version only: it is free-threaded, and abi3 is for Pythons with a GIL",
)
def test_extension_is_for_all_later_pythons() -> None:
    assert [path.name for path in PACKAGE.glob("_native*.so")] == ["_native.abi3.so"]


def test_cffi_is_the_only_requirement() -> None:
    try:
        requirements = metadata.requires("errand-boy") or []
    except metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    needed = [text for text in requirements if "extra ==" not in text]
    assert [text.partition(">")[0] for text in needed] == ["cffi"]


@pytest.mark.slow
def test_helper_and_the_callers_side_build_with_musl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_program("musl-gcc", "musl-tools")
    headers = tmp_path / "include"  # the kernel's alone
    headers.mkdir()
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    for folder in ("linux", "asm-generic", f"{multiarch}/asm"):
        (headers / Path(folder).name).symlink_to(Path("/usr/include", folder))
    options = ["-std=c11", "-Os", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-Icsrc"]
    compiler = ["musl-gcc", *options, "-idirafter", str(headers)]
    ours = [*ROOT.glob("csrc/caller/[!m]*.c")]  # module.c needs Python's headers
    subprocess.run([*compiler, "-fsyntax-only", *ours], cwd=ROOT, check=True)
    helper = tmp_path / "helper"
    sources = [
        path
        for part in ("program", "helper", "keeper", "owner", "spawn", "common")
        for path in ROOT.glob(f"csrc/{part}/*.c")
    ]
    subprocess.run([*compiler, "-static", "-o", helper, *sources], cwd=ROOT, check=True)

    errand_boy.stop()
    monkeypatch.setenv("ERRAND_BOY_HELPER", str(helper))
    monkeypatch.setenv("ERRAND_BOY_SPAWN", "helper")
    assert errand_boy.check_output(["echo", "one"]) == b"one\n"
    commands = [["echo", str(i)] for i in range(20)]
    results = errand_boy.map(commands, max_workers=4)
    assert [result.stdout for result in results] == [b"%d\n" % i for i in range(20)]
    errand_boy.stop()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_sources(tmp_path)


def copy_sources(directory: Path) -> Path:
    """Return a copy, in that directory, of what is built."""
    copy = directory / "tree"
    copy.mkdir()
    for name in ("setup.py", "build_ffi.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "docs").mkdir()
    shutil.copy(ROOT / "docs/errand-boy.1", copy / "docs")
    for name in ("csrc", "errand_boy"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "*-helper"))
    return copy


def test_links_of_the_description_lead_somewhere_from_an_index_page(tree: Path) -> None:
    needs_setuptools()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tree.parent)]
    subprocess.run(command, cwd=tree, capture_output=True, check=True)
    found = Parser().parsestr((tree.parent / "errand_boy.egg-info/PKG-INFO").read_text())
    urls = dict(line.split(", ") for line in found.get_all("Project-URL", []))
    assert {"Source", "Documentation", "Changelog", "Issues"} <= urls.keys()
    links = re.findall(r"\]\(([^)]*)\)", str(found.get_payload()))
    assert len(links) > 10
    for link in links:
        assert re.match("https?://|#", link), link
        if link.startswith(urls["Source"]):
            kind, commit, path = link.removeprefix(urls["Source"] + "/").split("/", 2)
            assert (kind, commit) in {("blob", "main"), ("raw", "main")}
            assert (kind == "raw") == path.endswith((".svg", ".png"))
            assert (ROOT / path.partition("#")[0]).exists(), link


def test_man_finds_the_manual_page_of_an_installation(tree: Path, tmp_path: Path) -> None:
    needs_setuptools()
    man = find_program("man", "man-db")
    environment = tmp_path / "environment"
    command = [sys.executable, "setup.py", "-q", "install_data", "--install-dir", str(environment)]
    subprocess.run(command, cwd=tree, capture_output=True, check=True)
    env = {"PATH": f"{environment}/bin:{os.environ['PATH']}"}
    found = subprocess.run([man, "-w", "errand-boy"], env=env, capture_output=True, text=True)
    assert found.stdout == f"{environment}/share/man/man1/errand-boy.1\n", found.stderr


@pytest.mark.parametrize(
    "program",
    [
        "import os, sys; sys.path.insert(0, ''); os.name = 'nt'; import errand_boy",
        "import setuptools.command.build_ext as _, os, runpy; os.name = 'nt';"
        "runpy.run_path('setup.py')",
    ],
)
def test_windows_is_refused(tree: Path, program: str) -> None:
    """There is no Windows here, only its name."""
    needs_setuptools()
    command = [sys.executable, "-I", "-c", program]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert found.returncode == 1
    assert re.search("errand.boy is for Linux", found.stderr.splitlines()[-1])


def build(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    needs_setuptools()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **env}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(300)  # it compiles everything twice
def test_changed_header_rebuilds_both_programs(tree: Path) -> None:
    assert build(tree).returncode == 0
    header = tree / "csrc/common/wire.h"
    text = header.read_text()
    assert "#define EB_VERSION 1\n" in text
    header.write_text(text.replace("#define EB_VERSION 1\n", "#define EB_VERSION 77\n"))
    future = time.time() + 2  # whatever the resolution of the file system's times
    os.utime(header, (future, future))
    assert build(tree).returncode == 0
    # The version of the protocol: one side that is not rebuilt would be refused by the other.
    code = """if True:
        import errand_boy
        from errand_boy._native import lib
        errand_boy.start()
        print(lib.EB_VERSION, errand_boy.run(["true"]).returncode)"""
    assert subprocess.check_output([sys.executable, "-c", code], cwd=tree, text=True) == "77 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_build_says_what_is_missing(tree: Path, tmp_path: Path, missing: str) -> None:
    if missing == "compiler":
        found = build(tree, CC="/nowhere/cc")
    else:  # a compiler that finds no such file
        compiler = tmp_path / "cc"
        script = 'for a; do [ "$a" != Python.h ] || exit 1; done; exec cc "$@"'
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        found = build(tree, CC=str(compiler))
    assert found.returncode == 1
    *_, what, debian, fedora = found.stderr.splitlines()
    assert ("no C compiler" if missing == "compiler" else "no headers") in what
    assert "apt-get install gcc libc6-dev python3-dev" in debian
    assert "dnf install gcc glibc-devel python3-devel" in fedora


def test_zipapp_says_why_it_cannot_work(tmp_path: Path) -> None:
    application = tmp_path / "application"
    shutil.copytree(PACKAGE, application / "errand_boy")
    (application / "__main__.py").write_text("import errand_boy\n")
    archive = tmp_path / "application.pyz"
    zipapp.create_archive(application, archive)
    # Without site: an editable installation of it would help out.
    command: list[str | Path] = [sys.executable, "-I", "-S", archive]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1
    assert "It can't be loaded from an archive such as a zipapp" in found.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)  # it analyses for half a minute, where nothing else runs
def test_application_made_by_pyinstaller(tmp_path: Path) -> None:
    pytest.importorskip("PyInstaller")
    source = tmp_path / "application.py"
    source.write_text(
        "import sys, errand_boy\n"
        "from errand_boy._cli.args import main\n"
        "if len(sys.argv) > 1:\n"
        "    sys.exit(main(sys.argv[1:]))\n"
        "errand_boy.start()\n"
        "print(errand_boy.check_output(['echo', 'x'], text=True), end='')\n"
        "print(*(result.returncode for result in errand_boy.map([['true'], ['false']])))\n"
    )
    hooks = PACKAGE / "__pyinstaller"
    options = ["--noconfirm", "--log-level=ERROR", f"--additional-hooks-dir={hooks}"]
    command = [sys.executable, "-m", "PyInstaller", *options, str(source)]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    application = tmp_path / "dist/application/application"
    assert subprocess.check_output([application], text=True, cwd=tmp_path) == "x\n0 1\n"
    serve = [str(application), "serve", f"--socket={tmp_path}/socket"]
    found = subprocess.run(serve, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 2
    assert "this program is frozen" in found.stderr


@pytest.mark.slow
def test_built_as_for_another_processor(tree: Path) -> None:
    portable = os.environ.get("CFLAGS", "") + " -DEB_PORTABLE"
    found = build(tree, CFLAGS=portable, ERRAND_BOY_CFLAGS="-DEB_PORTABLE")
    assert found.returncode == 0, found.stderr
    code = """if True:
        import asyncio, os, errand_boy
        from errand_boy import asyncio as ours
        from errand_boy._process import way as _ways

        async def run():
            process = await ours.create_subprocess_exec("true")
            return await process.wait()

        print(_ways.way(False), errand_boy.check_output(["echo", "x"]))
        print(asyncio.run(run()), [r.returncode for r in errand_boy.map([["true"], ["false"]])])
        errand_boy.start()
        print(errand_boy.run(["sh", "-c", "exit 3"]).returncode, errand_boy.helper_pid())
        os.environ["ERRAND_BOY_SPAWN"] = "helper"
        with errand_boy.Popen(["cat"], stdin=errand_boy.PIPE, stdout=errand_boy.PIPE) as process:
            print(process.communicate(b"y"), errand_boy.helper_pid() is not None)
        errand_boy.stop()"""
    text = subprocess.check_output([sys.executable, "-c", code], cwd=tree, text=True)
    assert text.splitlines() == [
        "subprocess b'x\\n'",
        "0 [0, 1]",
        "3 None",
        "(b'y', None) True",
    ]


def test_messages_name_the_documentation_of_the_metadata() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nDocumentation = "{_hints.DOCUMENTATION}"\n' in project


def test_no_message_or_help_text_names_a_file_that_is_not_installed() -> None:
    for command in COMMANDS:
        for word in parser_of(command).format_help().split():
            assert not word.startswith(("docs/", "(docs/")), command
    assert instead_of(print).count(_hints.page("options")) == 1
