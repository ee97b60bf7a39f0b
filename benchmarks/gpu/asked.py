"""What one run was asked for, and how much of its time is left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Asked"]


@dataclass
class Asked:
    """Attributes: fewer subjects; seconds of each comparison; when to stop, by `time.monotonic`; a file for rows, one a line; what
    was not measured because the time was over.
    """

    quick: bool = False
    seconds: float = 0.4
    end: float = float("inf")
    file: Path | None = None
    left_out: list[str] = field(default_factory=list)

    def late(self, subject: str) -> bool:
        """Is the time over? Then `subject` is left out, and noted."""
        if time.monotonic() < self.end:
            return False
        self.left_out.append(subject)
        self.keep({"left_out": subject})
        return True

    def keep(self, row: Mapping[str, Any]) -> None:
        """Write a row down at once: whoever waits for this process may end it at any time."""
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
