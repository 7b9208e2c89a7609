"""A coding agent's tool that runs shell commands for a model, in a sandbox and with limits.

    python examples/agent_tool.py WORKSPACE COMMAND

`call` is the tool: it runs a shell command in the workspace and returns the answer for the model,
a dictionary for JSON. The command may read the system's programs and the workspace, and write to
the workspace. It can reach no other file, no network and no other process, and nothing that it
leaves in the background outlives the call.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import errand_boy

LIMITS: dict[str, Any] = {
    "wall": 30,
    "cpu": 20,
    "memory": "512M",
    "output": "32K",
    "processes": 64,
    "file_size": "64M",
}
ENDS = {
    "timeout": "It took longer than {wall} seconds and was stopped.",
    "cpu": "It used more than {cpu} seconds of CPU time and was stopped.",
    "memory": "It used more than {memory} of memory and was stopped.",
    "output": "It wrote more than {output} and was stopped.",
    "processes": "It ran more than {processes} processes and was stopped.",
}


@functools.cache
def place(workspace: Path) -> errand_boy.Sandbox:
    """Return the sandbox of a workspace. Make it once."""
    return errand_boy.Sandbox(system=True, read=[workspace], write=[workspace], strict=False)


def call(workspace: Path, command: str, limits: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a shell command, and return the answer for the model."""
    bounds = {**LIMITS, **(limits or {})}
    run: Any = errand_boy.run
    done = run(
        ["/bin/sh", "-c", command],
        cwd=workspace,
        env={"PATH": "/usr/bin:/bin", "HOME": str(workspace), "TMPDIR": str(workspace)},
        stdin=errand_boy.DEVNULL,
        stdout=errand_boy.PIPE,
        stderr=errand_boy.STDOUT,
        text=True,
        errors="replace",
        limits=bounds,
        sandbox=place(workspace),
    )
    told = {"output": done.stdout, "seconds": round(done.duration, 2)}
    if done.cause in ENDS:
        return {**told, "stopped": ENDS[done.cause].format(**bounds)}
    if done.cause == "signal":
        return {**told, "crashed": f"It was ended by signal {-done.returncode}."}
    return {**told, "exit_status": done.returncode}


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    print(json.dumps(call(Path(sys.argv[1]).resolve(), sys.argv[2]), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
