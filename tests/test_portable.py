"""Where Python, the kernel or the system lack what others have."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_script

import errand_boy

PACKAGE = Path(errand_boy.__file__).parent

OLD_PYTHON = """
for module, names in (os, ("pidfd_open", "memfd_create")), (signal, ("pidfd_send_signal",)):
    for name in names:
        delattr(module, name)
"""


@pytest.mark.parametrize("implementation", ["errand_boy", "errand_boy-helper"])
def test_python_that_was_built_for_older_kernels(implementation: str) -> None:
    source = """
    import asyncio, atexit
    from errand_boy import asyncio as ours

    async def run():
        process = await ours.create_subprocess_exec("true")
        return await process.wait()

    start()
    with subprocess.Popen(["sleep", "0.1"]) as process:
        found = [process.wait(timeout=30), asyncio.run(run())]
    found += [result.returncode for result in subprocess.map([["true"], ["false"]])]
    subprocess.stop()
    report(found)
    """
    lines = "\n".join("    " + line for line in OLD_PYTHON.splitlines())
    assert run_script(lines + source, implementation) == [0, 0, 0, 1]


def test_package_takes_these_calls_from_nowhere_else() -> None:
    names = ("os.pidfd_open", "os.memfd_create", "signal.pidfd_send_signal")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not [name for name in names if name in text], path
