"""What `optimize` leaves on the module that it returns."""

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from normfuse.errors import UsageError
from normfuse.report import Report

__all__ = ["Record", "record", "report"]

_KEY = "normfuse"


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

    def attach(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm.meta[_KEY] = self
        return gm


def record(gm: Any) -> Record | None:
    """The record on a module that `normfuse.optimize` returned; None for any other module."""
    found = getattr(gm, "meta", {}).get(_KEY)
    return found if isinstance(found, Record) else None


def report(gm: fx.GraphModule) -> Report:
    """What `normfuse.optimize` did to make `gm`: sites applied and refused, errors, times.

    Raises:
        UsageError: `gm` was not returned by `normfuse.optimize`.
    """
    found = record(gm)
    if found is None:
        raise UsageError("this module carries no report: pass the module that normfuse.optimize returned")
    return found.report
