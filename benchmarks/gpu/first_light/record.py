"""What came back from a device, one line of JSON a step: written as soon as the step is over, so that nothing waits for the end."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["NAME", "Record", "now", "read", "read_rows", "write"]

#: Of the file in the folder of the results.
NAME = "first_light.jsonl"


@dataclass(frozen=True)
class Record:
    """One step.

    Attributes:
        step: a name of `steps.STEPS`.
        status: "ok"; "wrong": it ran to its end and found faults; "failed": it ended early; "hung": it was ended; "left out".
        said: why it is not "ok"; the end of what it printed.
        seconds: that it took.
        date: UTC.
        device: of `normfuse.gpu.device.Gpu`; empty before it is known.
        versions: of packages, and of Python.
        rows: what it measured, as far as it came.
    """

    step: str
    status: str
    said: str
    seconds: float
    date: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)


def now() -> str:
    """The date and the time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def write(record: Record, folder: Path) -> None:
    """Append a step, and have it on the disk when this returns."""
    import os

    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Record]:
    """Every step, in the order in which they were done; of one that was done twice, the last time.

    Raises:
        FileNotFoundError: nothing was run into this folder.
    """
    found = {row["step"]: Record(**row) for row in read_rows(folder / NAME)}
    return list(found.values())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut off, as its writer was ended, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
