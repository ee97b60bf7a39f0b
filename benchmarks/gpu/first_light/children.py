"""One step in a process of its own: a kernel that crashes or hangs takes its process with it, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "run_child"]

_LAST_WORDS = 5  # seconds for a killed process to be gone: one that waits inside the driver may never be


@dataclass(frozen=True)
class Ended:
    """Attributes: exit code, None for one that was ended; seconds; the end of what it printed."""

    code: int | None
    seconds: float
    said: str


def run_child(command: Sequence[str], limit: float, log: Path, folder: Path) -> Ended:
    """Run a command in `folder` for at most `limit` seconds, and end it then with everything that it has started.

    Args:
        log: where its output goes.
    """
    start = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=folder, start_new_session=True)
        code: int | None
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # what a child leaves behind would hold the device
            _end(child)
    return Ended(code, time.monotonic() - start, _tail(log))


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        child.wait(_LAST_WORDS)
    except subprocess.TimeoutExpired:
        return


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-8:])[-1500:]
