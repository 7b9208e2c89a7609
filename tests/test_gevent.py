"""errand_boy.gevent: the hub never waits, no status is lost, gevent's own methods go on working."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script, started_script
from daemon import started_daemon
from frameworks.suite import run_suite
from guard import Guard

pytest.importorskip("gevent")

LOOPS = ["libev-cext", "libuv-cffi", "libev-cffi"]
MODULE = "errand_boy.gevent"


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv("GEVENT_LOOP", name)
    return name


@pytest.mark.slow
def test_no_status_is_lost_among_thousands(loop: str) -> None:
    lost = run_script(
        """
        import gevent, gevent.os, gevent.pool, gevent.subprocess

        def one(number):
            code = number % 7
            if number % 50 == 0:
                library = gevent.subprocess
            else:
                library = subprocess
            command = ["sh", "-c", f"exit {code}"] if code else ["true"]
            process = library.Popen(command)
            with gevent.Timeout(20, False):
                process.wait()
            return process.returncode == code

        results = gevent.pool.Pool(40).map(one, range(2000))
        report(results.count(False))
        """,
        MODULE,
    )
    assert lost == 0


def test_a_command_may_end_before_its_pid_is_known(loop: str) -> None:
    codes = run_script(
        """
        import gevent
        codes = []
        for code in range(20):
            processes = []
            starter = gevent.spawn(
                lambda: processes.append(subprocess.Popen(["sh", "-c", f"exit {code}"])))
            gevent.sleep(0)
            # The hub stands still until the command has ended.
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            with gevent.Timeout(10):
                starter.join()
                codes.append(processes[0].wait())
        report(codes)
        """,
        MODULE,
    )
    assert codes == list(range(20))


@pytest.mark.slow
def test_pipes_text_errors_and_options(loop: str, spawn: str) -> None:
    out = run_script(
        """
        import gevent, gevent.socket
        out = {}
        done = subprocess.run(["tr", "a", "b"], input="aha", capture_output=True, text=True)
        out["run"] = [done.returncode, done.stdout]
        for name, args, options in (
            ("program", ["/no/such"], {}), ("cwd", ["true"], {"cwd": "/no/dir"})
        ):
            try:
                subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
            except FileNotFoundError as error:
                out[name] = error.filename
        out["output"] = subprocess.check_output("echo $0; exit 0", shell=True, text=True)
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
        process = subprocess.Popen(["true"])
        while process.poll() is None:
            pass
        out["polled"] = process.returncode
        r, w = os.pipe()
        command = f"echo hi > /proc/self/fd/{w}"
        subprocess.Popen(["sh", "-c", command], pass_fds=[w], stdout=-3, stderr=-2).wait()
        out["passed"] = os.read(r, 10).decode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subprocess.Popen(["true"], preexec_fn=lambda: None).wait()
        out["warned"] = [str(w.category.__name__) for w in caught if "preexec" in str(w.message)]
        report(out)
        """,
        MODULE,
    )
    assert out == {
        "run": [0, "bhb"],
        "program": "/no/such",
        "cwd": "/no/dir",
        "output": "/bin/sh\n",
        "status": [3, ""],
        "leader": True,
        "expired": True,
        "poll": None,
        "signal": -15,
        "polled": 0,
        "passed": "hi\n",
        "warned": ["RuntimeWarning"],
    }


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return Path(shutil.copy(shutil.which("true") or "/bin/true", tmp_path / "held"))


def ask(process: Any, word: str) -> Any:
    process.stdin.write(word + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return json.loads(line)


def test_a_slow_exec_does_not_stop_the_hub(loop: str, program: Path) -> None:
    script = """
        import gevent
        from gevent.fileobject import FileObject
        lines = FileObject(0, "r", closefd=False)
        starter = gevent.spawn(lambda: subprocess.Popen([sys.argv[2]]).wait())
        for line in lines:
            if line == "tick\\n":
                for _ in range(20):
                    gevent.sleep(0.001)
                report([starter.ready(), subprocess.run(["true"]).returncode])
            else:
                report(starter.get())
                break
    """
    with Guard(program) as guard, started_script(script, MODULE, [program]) as process:
        process.stdin.write("tick\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        guard.held()
        assert json.loads(process.stdout.readline()) == [False, 0]  # type: ignore[union-attr]
        assert ask(process, "tick") == [False, 0]
        guard.release()
        assert ask(process, "end") == 0


def test_a_timeout_during_a_slow_exec_leaves_no_zombie(loop: str, program: Path) -> None:
    script = """
        import gevent
        from gevent.fileobject import FileObject
        lines = FileObject(0, "r", closefd=False)
        before = len(os.listdir("/proc/self/fd"))
        def start():
            try:
                with gevent.Timeout(0.05):
                    subprocess.Popen([sys.argv[2]], stdout=subprocess.PIPE)
            except gevent.Timeout:
                return "timeout"
        report(gevent.spawn(start).get())
        next(lines)
        while True:
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            if len(children) == 1:  # the helper
                break
            gevent.sleep(0.01)
        report(subprocess.run(["true"]).returncode)
    """
    with Guard(program) as guard, started_script(script, MODULE, [program]) as process:
        assert json.loads(process.stdout.readline()) == "timeout"  # type: ignore[union-attr]
        guard.held()
        guard.release()
        assert ask(process, "released") == 0


@pytest.mark.slow
def test_threads_with_hubs_of_their_own(loop: str, spawn: str) -> None:
    codes = run_script(
        """
        import gevent, gevent.threadpool

        def many():
            def one(code):
                return subprocess.Popen(["sh", "-c", f"exit {code}"]).wait() == code
            jobs = [gevent.spawn(one, code) for code in range(10)]
            gevent.joinall(jobs)
            return [job.value for job in jobs]

        before = gevent.threadpool.ThreadPool(2)
        jobs = [before.spawn(many) for _ in range(10)]
        native = []
        threads = [threading.Thread(target=lambda: native.extend(many())) for _ in range(3)]
        for thread in threads:
            thread.start()
        ours = [many() for _ in range(10)]
        theirs = [job.get() for job in jobs]
        for thread in threads:
            while thread.is_alive():
                gevent.sleep(0.01)
        report([all(map(all, ours)), all(map(all, theirs)), native.count(True), len(native)])
        """,
        MODULE,
    )
    assert codes == [True, True, 30, 30]


@pytest.mark.slow
def test_a_forked_process_starts_commands_too(loop: str, spawn: str) -> None:
    codes = run_script(
        """
        import gevent, gevent.os
        codes = [subprocess.call(["true"])]
        starting = gevent.spawn(subprocess.call, ["sh", "-c", "exit 4"])
        gevent.sleep(0)
        pid = gevent.os.fork()
        if pid == 0:
            os._exit(subprocess.call(["sh", "-c", "exit 3"]))
        codes.append(os.waitstatus_to_exitcode(gevent.os.waitpid(pid, 0)[1]))
        codes.append(starting.get())
        codes.append(subprocess.call(["sh", "-c", "exit 2"]))
        report(codes)
        """,
        MODULE,
    )
    assert codes == [0, 3, 4, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("by_helper")
def test_a_killed_helper_is_reaped_by_the_loop_and_replaced(loop: str) -> None:
    out = run_script(
        """
        import errand_boy, gevent
        out = []
        for _ in range(5):
            out.append(subprocess.call(["true"]))
            os.kill(errand_boy.helper_pid(), signal.SIGKILL)
            gevent.sleep(0.01)
        process = subprocess.Popen(["sleep", "60"])
        os.kill(errand_boy.helper_pid(), signal.SIGKILL)
        os.kill(process.pid, signal.SIGKILL)
        out.append(process.wait())
        out.append(subprocess.call(["true"]))
        errand_boy.stop()
        report(out)
        """,
        MODULE,
    )
    assert out == [0, 0, 0, 0, 0, -9, 0]


@pytest.mark.slow
def test_gevents_own_tests_pass(loop: str, tmp_path: Path) -> None:
    run_suite("gevent", tmp_path)


@pytest.mark.slow
def test_the_daemons_client_lets_others_run(tmp_path: Path) -> None:
    with started_daemon(tmp_path) as daemon:
        out = run_script(
            """
import gevent.monkey
gevent.monkey.patch_all()
import gevent
spawn = gevent.spawn
turn = gevent.sleep
result = gevent.Greenlet.get
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
