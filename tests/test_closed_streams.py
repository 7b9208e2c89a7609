"""Standard streams that are closed stay closed: no descriptor of ours takes their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import compare_scripts, run_script
from jobs import keeping_jobs

# Looks for the numbers in `closed` whenever a function of errand_boy returns. The standard library
# itself opens pipes and /dev/null there, so the operations leave it no occasion.
SCRIPT = """
package = os.path.dirname(subprocess.__file__) + os.sep
moving = package + "_descriptors.py"
closed = [int(number) for number in sys.argv[2]]
kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in range(3)]
found = set()

def look(frame, event, arg):
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    if event != "return" or not file.startswith(package):
        return
    if file != moving and name != "<genexpr>":  # which may read a file that is about to be closed
        for fd in closed:
            try:
                kind = os.readlink(f"/proc/self/fd/{fd}")
            except FileNotFoundError:
                continue
            found.add(f"{fd} is {kind} after {name}")

def close():
    for fd in closed:
        os.close(fd)
    threading.setprofile(look)
    sys.setprofile(look)

def tell():
    sys.setprofile(None)
    threading.setprofile(None)
    for fd, copy in enumerate(kept):
        os.dup2(copy, fd)
    report(sorted(found))
"""

BLOCKING = {
    "start": "start(); subprocess.stop()",
    "wait": 'assert subprocess.Popen(["sleep", "0.01"]).wait(20) == 0',
    "stop": 'assert subprocess.Popen(["sleep", "1000"]).stop() == -9',
    "tree": 'assert subprocess.run(["true"], tree="all").returncode == 0',
    "limits": 'assert subprocess.run(["true"], limits={"wall": 20}).returncode == 0',
    "sandbox": """
box = subprocess.Sandbox(system=True, strict=False)
assert subprocess.run(["true"], sandbox=box).returncode == 0
""",
    "terminal": """
with subprocess.Popen(["echo", "x"], pty=True) as process:
    assert process.communicate(timeout=20)[0] == b"x\\r\\n"
""",
    "map": 'assert sum(done.returncode for done in subprocess.map([["true"]] * 9)) == 0',
    "spool": """
[done] = subprocess.map([["seq", "9999"]], spool=True, max_output=9)
assert done.returncode == 0
done.stdout_file.close()
""",
    "executor": """
with subprocess.Executor() as executor:
    assert executor.submit(["true"]).result().returncode == 0
""",
}

# Each runs when its loop has made its own descriptors.
ASYNCIO = {
    "exec": """
process = await errand_boy.asyncio.create_subprocess_exec("sleep", "0.01")
assert await process.wait() == 0
""",
    "terminal": """
process = await errand_boy.asyncio.create_subprocess_exec("echo", "x", pty=True)
assert (await process.communicate())[0] == b"x\\r\\n"
""",
}

DAEMON = {
    "run": 'assert client.run(["true"]).returncode == 0',
    "map": 'assert sum(done.returncode for done in client.map([["true"]] * 9)) == 0',
    "status": 'assert client.status()["version"]',
    "job": """
job = client.start(["echo", "x"])
assert job.wait(20).returncode == 0
assert b"".join(part.data for part in job.logs()) == b"x\\n"
job.remove()
""",
}

CLOSED = ["2", "012"]


def indented(text: str) -> str:
    return text.strip().replace("\n", "\n    ")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with keeping_jobs(tmp_path_factory.mktemp("jobs")) as (daemon, _):
        yield daemon


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("way", ["errand_boy", "errand_boy-helper"])
@pytest.mark.parametrize("what", BLOCKING)
def test_closed_streams_stay_closed(what: str, way: str, closed: str) -> None:
    assert run_script(f"{SCRIPT}\nclose()\n{BLOCKING[what]}\ntell()\n", way, [closed]) == []


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("way", ["errand_boy", "errand_boy-helper"])
@pytest.mark.parametrize("what", ASYNCIO)
def test_closed_streams_in_asyncio(what: str, way: str, closed: str) -> None:
    source = f"""{SCRIPT}
import asyncio, errand_boy, errand_boy.asyncio

async def main():
    close()
    {indented(ASYNCIO[what])}
    tell()

asyncio.run(main())
"""
    assert run_script(source, way, [closed]) == []


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("way", ["errand_boy", "errand_boy-helper"])
def test_closed_streams_in_gevent(way: str, closed: str) -> None:
    pytest.importorskip("gevent")
    source = f"""{SCRIPT}
import gevent
from errand_boy.gevent import Popen
gevent.sleep(0)  # now: the hub makes its own descriptors
close()
assert Popen(["sleep", "0.01"]).wait(20) == 0
tell()
"""
    assert run_script(source, way, [closed]) == []


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("what", DAEMON)
def test_closed_streams_of_a_daemons_client(what: str, closed: str, served: Any) -> None:
    source = f"""{SCRIPT}
client = subprocess.connect(sys.argv[3])
close()
{DAEMON[what]}
tell()
"""
    assert run_script(source, args=[closed, served.path]) == []


EACH = f"""{SCRIPT}
start()
subprocess.run(["true"])
for fd in closed:
    os.close(fd)
seen = []
for options in SETS:
    try:
        seen.append(subprocess.run(["true"], **options).returncode)
    except OSError as error:
        seen.append(os.strerror(error.errno))
for fd, copy in enumerate(kept):
    os.dup2(copy, fd)
report(seen)
"""


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_closed_stream_as_another(closed: str) -> None:
    sets = '({name: fd} for name in ("stdin", "stdout", "stderr") for fd in closed)'
    found = compare_scripts(EACH.replace("SETS", sets), [closed])
    assert set(found) == {"Bad file descriptor"}


@pytest.mark.parametrize("way", ["errand_boy", "errand_boy-helper"])
def test_closed_stream_in_pass_fds(way: str) -> None:
    """The standard library passes its own pipe, and closes that before the exec."""
    found = run_script(EACH.replace("SETS", '({"pass_fds": [fd]} for fd in closed)'), way, ["012"])
    assert found == ["Bad file descriptor"] * 3
