"""What an installation holds: one version, the helper beside its package, type hints."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

import errand_boy

PACKAGE = Path(errand_boy.__file__).parent


def test_helper_is_an_executable_in_the_package() -> None:
    helper = PACKAGE / "errand-boy-helper"
    assert os.access(helper, os.X_OK)
    assert helper.read_bytes()[:4] == b"\x7fELF"


def test_types_are_announced() -> None:
    assert (PACKAGE / "py.typed").exists()


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
    assert [path.name for path in PACKAGE.glob("_native*")] == ["_native.abi3.so"]


def test_cffi_is_the_only_requirement() -> None:
    try:
        requirements = metadata.requires("errand-boy") or []
    except metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    needed = [text for text in requirements if "extra ==" not in text]
    assert [text.partition(">")[0] for text in needed] == ["cffi"]
