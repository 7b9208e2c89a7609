"""What messages suggest, and where they send their readers. An installation has no docs folder."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SEE_DOCTOR = "; errand-boy doctor shows what this system has"  # for what is missing
DOCUMENTATION = "https://github.com/SeanHayes/errand-boy/tree/main/docs"  # as in pyproject.toml


def page(name: str) -> str:
    """Return the address of a page of the documentation."""
    return f"{DOCUMENTATION}/{name}.md"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return which of the `known` names a misspelt one is likely to mean."""
    from difflib import get_close_matches  # noqa: PLC0415  only mistakes need it

    words = {each.lstrip("-"): each for each in known}  # else the dashes would count as alike
    likely = get_close_matches(name.lstrip("-"), words, 1)
    return words[likely[0]] if likely else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name, in Python's own words."""
    likely = nearest(name, known)
    return "" if likely is None else f". Did you mean {likely!r}?"
