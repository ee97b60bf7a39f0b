"""What one run was asked for, and how much of its time is left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

__all__ = ["Asked"]


@dataclass
class Asked:
    """Attributes: fewer subjects; seconds of each comparison; when to stop, by `time.monotonic`; what was not measured for that."""

    quick: bool = False
    seconds: float = 0.4
    end: float = float("inf")
    left_out: list[str] = field(default_factory=list)

    def late(self, subject: str) -> bool:
        """Is the time over? Then `subject` is left out, and noted."""
        if time.monotonic() < self.end:
            return False
        self.left_out.append(subject)
        return True
