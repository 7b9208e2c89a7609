"""errand_boy.eventlet: the hub never waits, eventlet's own methods go on working."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_script, started_script
from daemon import started_daemon
from frameworks.suite import run_suite
from guard import Guard

pytest.importorskip("eventlet")

MODULE = "errand_boy.eventlet"


@pytest.fixture(params=["", "eventlet.monkey_patch()"], ids=["plain", "patched"])
def prelude(request: pytest.FixtureRequest) -> str:
    return f"import eventlet\n{request.param}\n"


@pytest.mark.slow
def test_many_at_once(prelude: str, spawn: str) -> None:
    right = run_script(
        prelude
        + """
def one(number):
    return subprocess.Popen(["sh", "-c", f"exit {number % 7}"]).wait() == number % 7
report(list(eventlet.GreenPool(30).imap(one, range(300))).count(True))
""",
        MODULE,
    )
    assert right == 300


@pytest.mark.slow
def test_pipes_text_errors_and_options(prelude: str, spawn: str) -> None:
    out = run_script(
        prelude
        + """
out = {}
done = subprocess.run(["tr", "a", "b"], input=b"aha", capture_output=True)
out["run"] = [done.returncode, done.stdout.decode()]
for name, args, options in (
    ("program", ["/no/such"], {}), ("cwd", ["true"], {"cwd": "/no/dir"})
):
    try:
        subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    except FileNotFoundError as error:
        out[name] = error.filename
out["status"] = subprocess.getstatusoutput("exit 3")
process = subprocess.Popen(["sleep", "60"], preexec_fn=os.setsid)
out["leader"] = os.getsid(process.pid) == process.pid
try:
    process.wait(timeout=0.01)
except subprocess.TimeoutExpired:
    out["expired"] = True
out["poll"] = process.poll()
process.terminate()
out["signal"] = process.wait()
process.kill()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    subprocess.Popen(["true"], preexec_fn=lambda: None).wait()
out["warned"] = [w.category.__name__ for w in caught if "preexec" in str(w.message)]
# A callback of the hub's may start a command, though it makes the others wait.
codes = []
eventlet.hubs.get_hub().schedule_call_global(
    0, lambda: codes.append(subprocess.Popen(["true"])))
while not codes:
    eventlet.sleep(0.001)
out["callback"] = codes[0].wait()
report(out)
""",
        MODULE,
    )
    assert out == {
        "run": [0, "bhb"],
        "program": "/no/such",
        "cwd": "/no/dir",
        "status": [3, ""],
        "leader": True,
        "expired": True,
        "poll": None,
        "signal": -15,
        "warned": ["RuntimeWarning"],
        "callback": 0,
    }


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return Path(shutil.copy(shutil.which("true") or "/bin/true", tmp_path / "held"))


def test_a_slow_exec_does_not_stop_the_hub(prelude: str, program: Path) -> None:
    script = (
        prelude
        + """
starter = eventlet.spawn(lambda: subprocess.Popen([sys.argv[2]]).wait())
def impatient():
    try:
        with eventlet.Timeout(0.05):
            subprocess.Popen([sys.argv[2]])
    except eventlet.Timeout:
        return "timeout"
report([eventlet.spawn(impatient).wait(), subprocess.run(["true"]).returncode, bool(starter.dead)])
sys.stdin.readline()
report(starter.wait())
while len(open(f"/proc/self/task/{os.getpid()}/children").read().split()) > 1:  # the helper
    eventlet.sleep(0.01)
    gc.collect()
    subprocess.run(["true"])
"""
    )
    with Guard(program) as guard, started_script(script, MODULE, [program]) as process:
        assert process.stdin and process.stdout
        assert json.loads(process.stdout.readline()) == ["timeout", 0, False]
        guard.held()
        guard.held()
        guard.release()
        guard.release()
        process.stdin.write("\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == 0
        assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_threads_of_the_pool(spawn: str) -> None:
    codes = run_script(
        """
import eventlet, eventlet.tpool
def many():
    return [subprocess.Popen(["sh", "-c", f"exit {code}"]).wait() for code in range(5)]
pool = eventlet.GreenPool(4)
jobs = [pool.spawn(eventlet.tpool.execute, many) for _ in range(4)]
ours = many()
report([job.wait() for job in jobs] + [ours])
""",
        MODULE,
    )
    assert codes == [list(range(5))] * 5


def test_eventlets_own_tests_pass(tmp_path: Path) -> None:
    run_suite("eventlet", tmp_path)


@pytest.mark.slow
def test_the_daemons_client_lets_others_run(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        out = run_script(
            """
import eventlet
eventlet.monkey_patch()
spawn = eventlet.spawn
turn = eventlet.sleep
result = lambda thread: thread.wait()
import errand_boy
client = errand_boy.connect(sys.argv[2])
r, w = os.pipe()
waiting = spawn(client.run, ["cat"], stdin=r, stdout=client.PIPE)
turn(0.01)
os.write(w, b"written while the other waits")
os.close(w)
os.close(r)
report(result(waiting).stdout.decode())
""",
            "subprocess",
            [daemon.path],
        )
        assert out == "written while the other waits"
        assert daemon.stop() == 0
