"""errand_boy.patch() with every library that starts commands, loaded in any order."""

from __future__ import annotations

import subprocess as stdlib
import sys
from itertools import permutations
from pathlib import Path

import pytest
from conftest import run_script, script_environment

COUNT = """
import errand_boy, errand_boy._process.by_helper
starts = []
def count(module, name):
    original = getattr(module, name)
    def counting(*args):
        starts.append(1)
        return original(*args)
    setattr(module, name, counting)
count(errand_boy._process.direct, "spawn")
count(errand_boy._process.by_helper, "by_helper")
def through_us(function):
    del starts[:]
    value = function()
    return [value, len(starts)]
"""


def test_everything_of_subprocess(spawn: str) -> None:
    out = run_script(
        COUNT
        + """
from subprocess import Popen, PIPE, check_output, run
class Mine(Popen):
    _start = _take = _child = None  # names that are none of our business
    def send_signal(self, sig):
        self.sent = sig
        super().send_signal(sig)

before = dict(vars(Popen))
out = {"without": through_us(lambda: run(["true"]).returncode)}
errand_boy.patch()
errand_boy.patch()
def killed():
    with Mine(["sleep", "60"]) as process:
        process.terminate()
        return [process.wait(timeout=20), process.sent, process.poll()]
def expired():
    with Popen(["sleep", "60"]) as process:
        try:
            process.wait(timeout=0.01)
        except stdlib.TimeoutExpired:
            process.kill()
        return process.wait()
def missing():
    try:
        Popen(["/no/such"], stdout=PIPE)
    except FileNotFoundError as error:
        return error.filename
def forked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Popen(["true"], preexec_fn=lambda: None).wait()
def forgotten():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Popen(["true"])
    while stdlib._active:
        stdlib._cleanup()
for function in (killed, expired, missing, forked, forgotten):
    out[function.__name__] = through_us(function)
out["run"] = through_us(lambda: run(["cat"], input="a", text=True, stdout=PIPE).stdout)
out["output"] = through_us(lambda: check_output("exit 0; true", shell=True).decode())
out["popen"] = through_us(lambda: os.popen("echo a").read())
out["system"] = through_us(lambda: os.system("exit 1"))
out["ours"] = through_us(lambda: errand_boy.run(["true"]).returncode)
out["session"] = through_us(lambda: Popen(["true"], preexec_fn=os.setsid).wait())
errand_boy.unpatch()
errand_boy.unpatch()
out["restored"] = dict(vars(Popen)) == before
out["after"] = through_us(lambda: run(["true"]).returncode)
errand_boy.patch()
out["again"] = through_us(lambda: run(["true"]).returncode)
report(out)
""",
        "subprocess",
    )
    assert out == {
        "without": [0, 0],
        "killed": [[-15, 15, -15], 1],
        "expired": [-9, 1],
        "missing": ["/no/such", 1],
        "forked": [0, 0],
        "forgotten": [None, 1],
        "run": ["a", 1],
        "output": ["", 1],
        "popen": ["a\n", 1],
        "system": [256, 0],
        "ours": [0, 1],
        "session": [0, 1],
        "restored": True,
        "after": [0, 0],
        "again": [0, 1],
    }


STEPS = {
    "gevent": "import gevent.monkey; gevent.monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
    "import": "from subprocess import Popen as early",
    "patch": "import errand_boy; errand_boy.patch()",
    "errand_boy": "import errand_boy",
}

ORDERS = [
    order
    for framework in ("gevent", "eventlet")
    for order in permutations((framework, "import", "patch"))
] + [("gevent", "errand_boy", "patch"), ("errand_boy", "eventlet", "patch")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_orders_with_monkey_patching(order: tuple[str, ...]) -> None:
    framework = "gevent" if "gevent" in order else "eventlet"
    pytest.importorskip(framework)
    # PRELUDE has imported much of what programs import before they patch: not here.
    script = f"""
import sys, warnings
warnings.simplefilter("ignore")
{chr(10).join(STEPS[step] for step in order)}
{COUNT}
import json, subprocess
early = globals().get("early", subprocess.Popen)
out = []
for popen in (early, subprocess.Popen):
    out.append(through_us(lambda: popen(["sh", "-c", "exit 3"]).wait()))
out.append(through_us(lambda: subprocess.run(["true"]).returncode))
out.append(through_us(lambda: subprocess.check_output(["echo", "a"], text=True)))
from {framework}{".green" if framework == "eventlet" else ""} import subprocess as green
out.append(through_us(lambda: green.Popen(["sh", "-c", "exit 3"]).wait()))
out.append(through_us(lambda: errand_boy.check_output(["echo", "a"], text=True)))
for popen in (early, subprocess.Popen, errand_boy.Popen):
    with popen(["sleep", "60"]) as process:
        try:
            process.communicate(timeout=0.01)
        except subprocess.TimeoutExpired:
            process.kill()
import errand_boy.{framework}
out.append(through_us(lambda: errand_boy.{framework}.run(["true"]).returncode))
print(json.dumps(out))
"""
    done = stdlib.run(
        [sys.executable, "-c", script],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    expected = '[[3, 1], [3, 1], [0, 1], ["a\\n", 1], [3, 1], ["a\\n", 1], [0, 1]]'
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("framework", ["gevent", "eventlet"])
def test_our_module_loads_the_framework_after_patch(framework: str) -> None:
    pytest.importorskip(framework)
    out = run_script(
        COUNT
        + f"""
import warnings
warnings.simplefilter("ignore")
errand_boy.patch()
from errand_boy.{framework} import run
from {framework}{".green" if framework == "eventlet" else ""} import subprocess as green
out = [through_us(lambda: run(["true"]).returncode)]
out.append(through_us(lambda: green.Popen(["sh", "-c", "exit 3"]).wait()))
report(out)
"""
    )
    assert out == [[0, 1], [3, 1]]


def test_a_framework_that_is_loaded_later_and_undone() -> None:
    out = run_script(
        COUNT
        + """
errand_boy.patch()
from gevent.subprocess import Popen
out = [through_us(lambda: Popen(["true"]).wait())]
errand_boy.unpatch()
out.append(through_us(lambda: Popen(["true"]).wait()))
report(out)
""",
        "subprocess",
    )
    assert out == [[0, 1], [0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["before", "after"])
@pytest.mark.parametrize("policy", ["asyncio", "uvloop"])
def test_asyncio(policy: str, loaded: str, spawn: str) -> None:
    if policy == "uvloop":
        pytest.importorskip("uvloop")
    first = f"import asyncio, {policy}" if loaded == "before" else ""
    out = run_script(
        f"""
{first}
{COUNT}
errand_boy.patch()
import asyncio, asyncio.subprocess
from asyncio import create_subprocess_exec
"""
        + ("import uvloop as chosen\n" if policy == "uvloop" else "import asyncio as chosen\n")
        + """
async def main():
    pipe = asyncio.subprocess.PIPE
    process = await create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
    out, _ = await process.communicate(b"hello")
    shell = await asyncio.create_subprocess_shell("exit 3")
    return [out.decode(), process.returncode, await shell.wait()]
loop = chosen.new_event_loop()
out = through_us(lambda: loop.run_until_complete(main()))
loop.close()
report(out)
""",
        "subprocess",
    )
    assert out == [["hello", 0, 3], 2]


def test_other_peoples_classes() -> None:
    out = run_script(
        COUNT
        + """
import psutil
errand_boy.patch()
def with_psutil():
    with psutil.Popen(["sleep", "60"], stdout=stdlib.PIPE) as process:
        name = process.name()
        process.terminate()
        return [name, process.wait()]
report(through_us(with_psutil))
""",
        "subprocess",
    )
    assert out == [["sleep", -15], 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import multiprocessing, subprocess, sys
def work(number):
    return subprocess.run(["sh", "-c", f"exit {number}"]).returncode
if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print(pool.map(work, [1, 2, 3]), sys.argv, __file__)
        pool.close()
        pool.join()
"""
    )
    done = stdlib.run(
        [sys.executable, "-m", "errand_boy.patch", str(script), method],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stdout == f"[1, 2, 3] {[str(script), method]} {script}\n", done.stderr


def test_a_program_that_cannot_be_edited(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("from subprocess import Popen\n")
    source = (
        COUNT
        + """
import sys
from beside import Popen
print(through_us(lambda: Popen(["true"]).wait()), sys.argv[1:], __name__)
import errand_boy.patch
errand_boy.patch()
errand_boy.unpatch()
sys.exit(5)
"""
    )
    (tmp_path / "script.py").write_text(source)
    environment = script_environment()
    python = [sys.executable, "-m", "errand_boy.patch"]
    for command in (["script.py", "a", "-b"], ["-m", "script", "a", "-b"]):
        done = stdlib.run(
            [*python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.stdout == "[0, 1] ['a', '-b'] __main__\n", done.stderr
        assert done.returncode == 5
    done = stdlib.run(python, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage:")
