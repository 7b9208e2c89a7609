"""The site: Sphinx, with the pages in Markdown (MyST). .ci/docs builds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import tomllib

import errand_boy

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
_project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_urls = {name.lower(): url for name, url in _project.get("urls", {}).items()}
_source = _urls.get("source", _urls.get("repository", "https://github.com/SeanHayes/errand-boy"))

project = "errand-boy"
author = "the errand-boy authors"
project_copyright = "the errand-boy authors"
version = release = errand_boy.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"errand-boy {release}"

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
suppress_warnings = ["myst.header"]  # a page that is included begins at its second level

autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "code"  # docstrings quote names as `name`
highlight_language = "none"
linkcheck_anchors = False
linkcheck_ignore = [r"http://localhost"]

# Pages that include a file of the root folder.
_PAGES = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}


def _links(text: str, place: str) -> str:
    """Turn links to files outside docs into links to their page, or to the source."""

    def replaced(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        path = (ROOT / place / target).resolve()
        if not path.exists():
            return match[0]  # which Sphinx then reports
        name = path.relative_to(ROOT).as_posix()
        if name in _PAGES:
            return f"]({_PAGES[name]}{hash_}{anchor})"
        if name == "README.md":
            return "](index.md)"
        if name.startswith("docs/"):
            return f"]({name.removeprefix('docs/')}{hash_}{anchor})"
        return f"]({_source}/blob/main/{name}{hash_}{anchor})"

    pattern = r"\]\(((?!https?:|#|mailto:)[^)\s]+)\)" if place == "." else r"\]\((\.\./[^)\s]+)\)"
    return re.sub(pattern, replaced, text)


def _read(_app: Sphinx, docname: str, content: list[str]) -> None:
    for name, page in _PAGES.items():
        if f"{docname}.md" == page:
            content[0] = _links((ROOT / name).read_text(), ".")
            return
    content[0] = _links(content[0], "docs")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
