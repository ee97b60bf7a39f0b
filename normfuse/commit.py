"""The commit that this normfuse is of, where it is known."""

import subprocess
from pathlib import Path

__all__ = ["commit"]

_HERE = Path(__file__).resolve().parent


def commit() -> str:
    """Of the checkout that this is, else the one that the build wrote down; empty where neither is there."""
    root = _HERE.parent
    if (root / ".git").exists():
        try:
            asked = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
            return subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""
    written = _HERE / "_commit.txt"  # by setup.py
    return written.read_text(encoding="utf-8").strip() if written.is_file() else ""
