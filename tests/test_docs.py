"""README.md and the pages of docs: their code runs, and their links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from code_blocks import blocks

import errand_boy

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for folder in (ROOT, ROOT / "docs")
    for path in folder.glob("*.md")
    if path.name != "benchmarks.md"  # which bench.report writes
)
if not (ROOT / "docs").exists():
    pytest.skip("the tests of a wheel have no docs", allow_module_level=True)
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]


def _programs(folder: Path) -> str:
    """Make a directory for PATH, with our command and this Python."""
    folder.mkdir()
    main = "import sys; from errand_boy._cli.args import main; sys.exit(main())"
    for name, arguments in (("errand-boy", f' -c "{main}"'), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable}{arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def _try(page: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    work = tmp_path / "work"
    work.mkdir()
    runtime = tmp_path / "runtime"  # where a daemon listens by default
    runtime.mkdir(mode=0o700)
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "code_blocks.py", page],
        cwd=work,
        env={
            "PATH": _programs(tmp_path / "bin"),
            "PYTHONPATH": str(Path(errand_boy.__file__).parent.parent),
            "HOME": str(tmp_path),
            "XDG_RUNTIME_DIR": str(runtime),
            "STATE_DIRECTORY": str(tmp_path / "state"),  # of jobs, for a daemon of root
            "RUNTIME_DIRECTORY": str(tmp_path / "jobs"),
            "LANG": "C.UTF-8",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_its_code_runs(page: Path, tmp_path: Path) -> None:
    if not any(block.mark != "not run" for block in blocks(page)):
        pytest.skip("no code to run")
    done = _try(page, tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "```python\n1 / 0\n```\n",
        "```sh\nfalse\n```\n",
        "```sh\ntrue\nerrand-boy run -- /nowhere\n```\n",
        "```json\n{,}\n```\n",
        "```ini\n[Service]\n```\n",
        "text\n\n    ls -l\n",
        "```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```\n",
        "<!-- raises: ValueError -->\n```python\npass\n```\n",
    ],
)
def test_broken_code_is_noticed(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert _try(page, tmp_path).returncode != 0


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_its_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            wrong.append(target)
    assert not wrong


def _texts() -> str:
    """Return all strings of the Python sources, one on each line; formatted values end a line."""
    found = []
    for path in [*(ROOT / "errand_boy").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.slow
def test_troubleshooting_has_the_messages_of_the_sources() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `([^`]*)`$", page, re.MULTILINE)
    assert len(messages) > 30
    texts = _texts()
    wrong = []
    for message in messages:
        parts = [part.strip(" ,:") for part in message.split("…")]
        wrong += [message for part in parts if part not in texts]
    assert not wrong
