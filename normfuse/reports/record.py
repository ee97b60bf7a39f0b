"""What `optimize` leaves on the module that it returns."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import fx, nn

from normfuse.errors import UsageError
from normfuse.reports.report import Report

__all__ = ["Record", "record", "report"]

_KEY = "normfuse_record"

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Record:
    """How a module was made: the inputs that it was captured with, what may vary in them, and what was done.

    Attributes:
        args: positional example inputs, as given to the original model; empty when there were none.
        kwargs: keyword example inputs.
        has_inputs: False when the model was traced without example inputs (args and kwargs are then empty).
        dynamic_shapes: as in `torch.export.export`, or None for static shapes.
        report: what every pass did and refused.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    has_inputs: bool = True
    dynamic_shapes: Any = None
    report: Report = field(default_factory=Report)

    def attach(self, gm: Module) -> Module:
        _notes(gm)[_KEY] = self
        return gm


def record(gm: Any) -> Record | None:
    """The record on a module that `normfuse.optimize` returned; None for any other module."""
    found = _notes(gm).get(_KEY) if isinstance(gm, nn.Module) else None
    return found if isinstance(found, Record) else None


def _notes(gm: nn.Module) -> dict[str, Any]:
    """Where a graph keeps what is known about it; a module of another class has no such place, and any name may be its own."""
    return gm.meta if isinstance(gm, fx.GraphModule) else vars(gm)


def report(gm: nn.Module) -> Report:
    """What `normfuse.optimize` did to make `gm`: sites applied and refused, errors, times.

    Raises:
        UsageError: `gm` was not returned by `normfuse.optimize`.
    """
    found = record(gm)
    if found is None:
        raise UsageError("this module carries no report: pass the module that normfuse.optimize returned")
    return found.report
