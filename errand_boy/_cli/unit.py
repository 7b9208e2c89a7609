"""The daemon under systemd: the unit that fits this installation, and its reload."""

from __future__ import annotations

import math
import os
import signal
import sys
import time

from errand_boy._cli.waiting import said
from errand_boy._wire import address as _address, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_LOOK = 0.05  # seconds between two questions
_STOPPING = 30  # seconds that the daemon may take to stop, after its grace

_UNIT = """\
[Unit]
Description=errand-boy, which starts commands
Documentation=man:errand-boy(1)

[Service]
Type=notify
ExecStart={start}
ExecReload={reload}
# Jobs outlive the daemon{directories}.
KillMode=process
# A command that the kernel kills for lack of memory is no reason to stop the daemon.
OOMPolicy=continue
{lines}TimeoutStopSec={timeout}
SuccessExitStatus=3 4
Restart=on-failure

[Install]
WantedBy={target}"""

_SYSTEM_LINES = """\
StateDirectory=errand-boy
RuntimeDirectory=errand-boy
RuntimeDirectoryPreserve=yes
LimitNOFILE=65536
"""


def written(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Return the unit of a daemon with these options, whose `arguments` are without --print-unit.

    systemd has no path of a shell, so the unit names this program by its own.
    """
    is_system = options.print_unit == "system"
    program = [os.path.abspath(sys.argv[0])]
    if os.path.basename(program[0]) == "__main__.py":
        program = [os.path.abspath(sys.executable), "-m", "errand_boy"]
    serve = " ".join(map(_quoted, [*program, "serve"]))
    path = "/run/errand-boy.sock" if is_system else "%t/errand-boy.sock"
    given = list(map(_quoted, arguments))
    if options.socket is None:
        given += ["--socket", path]
    else:
        path = _quoted(os.path.abspath(options.socket))
    return _UNIT.format(
        start=" ".join([serve, *given]),
        reload=f"{serve} --upgrade --socket {path}",
        directories=", and so do their directories" if is_system else "",
        lines=_SYSTEM_LINES if is_system else "",
        timeout=math.ceil(options.grace) + _STOPPING,
        target="multi-user.target" if is_system else "default.target",
    )


def _quoted(word: str) -> str:
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if not word or set(word) & set(" \t'\"\\;") else word


def upgrade(options: argparse.Namespace) -> int:
    """Have the daemon execute the installed version; return the exit status.

    This returns when it has done so, or has said why it does not.
    """
    address = _address.find(options.socket)
    try:
        before = status.fetch(address)
        os.kill(before["pid"], signal.SIGUSR2)
        with said("waiting for the daemon: it lets sockets close and text requests end"):
            while (now := status.fetch(address))["upgrades"] == before["upgrades"]:
                time.sleep(_LOOK)
    except (OSError, status.NoAnswerError) as error:
        print(f"errand-boy: {error}", file=sys.stderr)
        return 1
    if now["upgrades"]["done"] == before["upgrades"]["done"]:
        print(f"errand-boy: no upgrade: {now['upgrades']['reason']}", file=sys.stderr)
        return 1
    return 0
