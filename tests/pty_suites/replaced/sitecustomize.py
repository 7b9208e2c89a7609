"""Patches an interpreter that has this directory on its path, and forbids it all other forks."""

import sys
from types import FrameType

try:
    import errand_boy
    import errand_boy.ptyprocess

    errand_boy.patch()
except Exception as error:
    # The site module would only print an exception and go on, with nothing patched.
    raise SystemExit(f"errand_boy: {error!r}") from error


def _refuse(event: str, args: object) -> None:
    if event not in ("os.fork", "os.forkpty"):
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("/multiprocessing/popen_fork.py"):  # of a test's own server
            return
        # A function that is to be called in the child, which only a fork has.
        if name == errand_boy.ptyprocess.__file__ and frame.f_locals.get("function", 0) is None:
            return
        frame = frame.f_back
    raise AssertionError(f"{event}, which nothing here should need")


sys.addaudithook(_refuse)
