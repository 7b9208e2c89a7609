"""errand_boy.gevent over gevent.subprocess; how late a greenlet is while others start commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

from bench.heavy import Caller, package_parent

pytest.importorskip("gevent")

AT_MOST = {"small": 1 / 6, "large": 1 / 200}

TICKER = """
import importlib, json, sys, time
import gevent
library = importlib.import_module(sys.argv[1])
count = int(sys.argv[2])
late = []

def tick():
    due = time.monotonic()
    while True:
        due += 0.005
        gevent.sleep(max(0, due - time.monotonic()))
        late.append(time.monotonic() - due)
        due = max(due, time.monotonic() - 0.005)

library.call(["true"])
ticker = gevent.spawn(tick)
gevent.sleep(0.1)
del late[:]
jobs = [gevent.spawn(library.call, ["sleep", "1"]) for _ in range(count)]
gevent.joinall(jobs)
ticker.kill()
assert all(job.value == 0 for job in jobs)
late.sort()
print(json.dumps([late[len(late) // 2], late[len(late) * 99 // 100], late[-1]]))
"""


@pytest.mark.parametrize("weight", ["small", "large"])
def test_over_gevent(
    caller: Callable[..., Caller], compare: Callable[..., None], weight: str
) -> None:
    process = caller(weight, "gevent")
    compare(
        partial(process.ask, "popen", "errand_boy.gevent"),
        partial(process.ask, "popen", "gevent.subprocess"),
        name=f"errand_boy.gevent over gevent.subprocess, {weight}, Popen.wait",
        at_most=AT_MOST[weight],
    )


@pytest.mark.parametrize("loop", ["libev-cext", "libuv-cffi"])
def test_lateness(note: Callable[[str], None], loop: str) -> None:
    environment = os.environ | {"PYTHONPATH": package_parent(), "GEVENT_LOOP": loop}
    for library in ("errand_boy.gevent", "gevent.subprocess"):
        command = [sys.executable, "-W", "ignore", "-c", TICKER, library, "200"]
        output = subprocess.check_output(command, env=environment)
        median, most, longest = (1000 * seconds for seconds in json.loads(output))
        note(
            f"a tick each 5 ms while 200 commands start and run a second, {loop}, {library}: "
            f"late by {median:.1f} ms (median), {most:.1f} (p99), {longest:.1f} (most)"
        )
