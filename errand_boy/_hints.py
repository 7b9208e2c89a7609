"""Where messages and help texts send their readers. An installation has no docs folder."""

SEE_DOCTOR = "; errand-boy doctor shows what this system has"  # for what is missing
DOCUMENTATION = "https://github.com/SeanHayes/errand-boy/tree/main/docs"  # as in pyproject.toml


def page(name: str) -> str:
    """Return the address of a page of the documentation."""
    return f"{DOCUMENTATION}/{name}.md"
