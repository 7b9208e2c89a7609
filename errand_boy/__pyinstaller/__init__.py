"""Where PyInstaller finds the hook, through the entry point ``pyinstaller40``."""

from __future__ import annotations

import os


def get_hook_dirs() -> list[str]:
    """Return the directories of hooks."""
    return [os.path.dirname(__file__)]
