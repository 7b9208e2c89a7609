"""Replaces Popen in an interpreter that has this directory on its path."""

import subprocess

try:
    import errand_boy
except Exception as error:
    # The site module would only print an exception and go on, with Popen as it was.
    raise SystemExit(f"errand_boy: {error!r}") from error

vars(subprocess)["Popen"] = errand_boy.Popen
