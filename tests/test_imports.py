"""The layers of errand_boy: which module imports which, and how long a file is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "errand_boy"
MOST_LINES = 600

# From the bottom to the top. The names in one string may import each other, without a circle, and
# those on the floors below. The strings of one floor know nothing of each other.
FLOORS = [
    [
        "_descriptors _environment _hints _memory _native _orphan _quantities _spool _timers "
        "errors sandbox terminal"
    ],
    ["_wire"],
    ["_options"],
    ["_types"],
    ["_process"],
    ["_map", "_jobs", "_asyncio"],
    ["_client", "_shell"],
    [
        "errand_boy asyncio celery eventlet gevent patch ptyprocess testing transports "
        "_doctor _forkpty _patching"
    ],
    ["_cli", "_daemon"],
    ["__main__ __pyinstaller run"],
]
PLACES = {
    name: (floor, room)
    for floor, rooms in enumerate(FLOORS)
    for room, names in enumerate(rooms)
    for name in names.split()
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")])
}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, anywhere in it, for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in MODULES else module)
    return found & MODULES.keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of an import cycle, if there is one."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            path.append(module)
            for other in sorted(graph[module]):
                if found := visit(other):
                    return found
            path.pop()
            done.add(module)
        return []

    for module in graph:
        if found := visit(module):
            return found
    return []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.slow
def test_no_circle_of_imports() -> None:
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    assert graph["errand_boy._process.popen"] >= {
        "errand_boy._process.child",
        "errand_boy._process.start",
    }
    assert " -> ".join(circle(graph)) == ""


def part(module: str) -> str:
    """Return the name in FLOORS to which a module belongs."""
    return [*module.split("."), "errand_boy"][1]


def is_allowed(importing: str, imported: str) -> bool:
    (floor, room), (other_floor, other_room) = PLACES[importing], PLACES[imported]
    return other_floor < floor or (floor, room) == (other_floor, other_room)


def test_imports_from_above_are_found() -> None:
    assert is_allowed("_process", "_wire") and is_allowed("_jobs", "_jobs")
    assert is_allowed("patch", "_patching") and is_allowed("_native", "errors")
    assert not is_allowed("_wire", "_process")
    assert not is_allowed("_map", "_jobs") and not is_allowed("_jobs", "_map")
    assert not is_allowed("_client", "errand_boy")


def test_imports_go_down() -> None:
    assert {part(module) for module in MODULES} == PLACES.keys()
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    assert [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if not is_allowed(part(module), part(other))
    ] == []


def test_the_daemon_needs_little() -> None:
    ground = FLOORS[0][0].split()
    used = {
        part(other)
        for module, path in MODULES.items()
        if part(module) == "_daemon"
        for other in imports_of(path)
    }
    assert used <= {*ground, "_wire", "_daemon", "errand_boy"}  # the last for the version


def drawing() -> str:
    """Return who imports from whom, as docs/architecture.md has it: the packages from the top."""
    names = {0: "ground", 7: "public", len(FLOORS) - 1: "programs"}
    rows: dict[str, set[str]] = {}
    for name in reversed(PLACES):
        rows.setdefault(names.get(PLACES[name][0], name), set())
    for module, path in MODULES.items():
        importing, *imported = (
            names.get(PLACES[part(name)][0], part(name)) for name in (module, *imports_of(path))
        )
        rows[importing] |= {*imported} - {importing}
    columns = list(rows)[1:]
    lines = [" " * 9 + " ".join(columns)]
    for row, others in list(rows.items())[:-1]:
        cells = " ".join(("x" if name in others else "").center(len(name)) for name in columns)
        lines.append(f"{row:9}{cells}".rstrip())
    return "\n".join(lines)


def test_the_drawing_of_the_packages_is_true() -> None:
    assert drawing() in (ROOT / "docs/architecture.md").read_text()


# A header of one part in C may be included by those above it, and by itself.
PARTS_IN_C = [["common"], ["spawn"], ["caller", "owner"], ["helper", "keeper"], ["program"]]


def test_includes_go_down() -> None:
    floors = {part: floor for floor, parts in enumerate(PARTS_IN_C) for part in parts}
    included = {
        (path.parent.name, header.split("/")[0])
        for path in (ROOT / "csrc").rglob("*.[ch]")
        for header in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE)
    }
    assert {part for part, _ in included} == floors.keys()
    assert {
        (part, other) for part, other in included if part != other and floors[other] >= floors[part]
    } == set()


def test_no_file_is_long() -> None:
    files = [*MODULES.values(), *(ROOT / "csrc").rglob("*.[ch]")]
    lines = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in files}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


if __name__ == "__main__":
    print(drawing())
