"""Where a report comes from: model, versions, machine, date."""

from __future__ import annotations

import datetime
import functools
from typing import Any

from normfuse.benchmark.machine import Machine
from normfuse.reports.model import Origin

__all__ = ["origin_of"]

_LIBRARIES = ("normfuse", "torch", "onnxruntime")


def origin_of(model: Any) -> Origin:
    """The origin of a report on `model`, here and now."""
    machine = _machine()
    versions = {name: machine.libraries[name] for name in _LIBRARIES if name in machine.libraries}
    cores = f"{machine.cores} core{'' if machine.cores == 1 else 's'}"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    return Origin(type(model).__name__, date=date, versions=versions, machine=f"{machine.cpu}, {cores}")


@functools.cache
def _machine() -> Machine:
    return Machine.here()
