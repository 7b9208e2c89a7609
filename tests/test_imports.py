"""The layers of errand_boy: which module imports which, and how long a file is."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "errand_boy"
MOST_LINES = 600


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


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


def test_no_circle_of_imports() -> None:
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    assert graph["errand_boy._popen"] >= {"errand_boy._child", "errand_boy._start"}
    assert " -> ".join(circle(graph)) == ""


def test_no_file_is_long() -> None:
    files = [*MODULES.values(), *(ROOT / "csrc").rglob("*.[ch]")]
    lines = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in files}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
