"""Values that the module itself loses to the range of its dtype: NaN or infinity where its float64 run is finite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfuse.described import dtype_name, first_line
from normfuse.export.onnx.program import Program
from normfuse.numerics.modes import Float64

__all__ = ["Judged", "finite", "within_range"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """Outputs of a file, ready to be compared.

    Attributes:
        found: the outputs, with the module's own values wherever those mean nothing.
        note: what was left out, as a sentence; empty where nothing was.
        fault: where the file is not finite and the module is, as a sentence; empty where it nowhere is so.
    """

    found: list[Tensor]
    note: str
    fault: str


def within_range(program: Program, flat: Sequence[Any], expected: Sequence[Tensor], found: Sequence[Tensor], label: str) -> Judged:
    """Leave out what the module computes as NaN or infinity only because its dtype is too narrow.

    A sum of squares of 1e30 is infinite in float32, and what comes of it depends on the order in which a kernel adds: NaN in one,
    zero in another, the right value in a third. There is nothing that a file could reproduce. Where the module is NaN or infinite
    in float64 too, the file must be; and where the module is finite, the file must be as well.

    Args:
        program: what was written; its module runs again in float64.
        flat: the inputs.
        expected, found: outputs of the module and of the file, of equal shapes.
        label: of the inputs.
    """
    exact = _in_float64(program, flat)
    judged: list[Tensor] = []
    lost_in: list[str] = []
    worse_in: list[str] = []
    kinds: list[str] = []
    for i, (name, want, have) in enumerate(zip(program.outputs, expected, found, strict=True)):
        odd = _odd(want, have)
        lost = odd & ~want.isfinite() & exact[i].isfinite() if exact is not None else torch.zeros_like(odd)
        worse = odd & want.isfinite()
        for which, places in ((lost_in, lost), (worse_in, worse)):
            if bool(places.any()):
                which.append(f"{int(places.sum())} of {want.numel()} values of {name}")
                kinds.append(dtype_name(want.dtype))
        judged.append(torch.where(lost, want, have))
    note = fault = ""
    if lost_in:
        note = (
            f"on {label} inputs the module itself leaves the range of {kinds[0]}: {', '.join(lost_in)} are NaN or infinite in it "
            "and finite in float64; they were not compared"
        )
    if worse_in:
        fault = f"on {label} inputs {', '.join(worse_in)} are NaN or infinite in the file and finite in the module"
    return Judged(judged, note, fault)


def finite(outputs: Sequence[Tensor]) -> bool:
    """There is a value that can be compared."""
    return any(not t.is_floating_point() or not t.numel() or bool(t.isfinite().any()) for t in outputs)


def _odd(want: Tensor, have: Tensor) -> Tensor:
    """Where the two differ and one of them is not finite."""
    if not want.is_floating_point():
        return torch.zeros(want.shape, dtype=torch.bool)
    same = (want == have) | (want.isnan() & have.isnan())
    return ~same & ~(want.isfinite() & have.isfinite())


def _in_float64(program: Program, flat: Sequence[Any]) -> list[Tensor] | None:
    try:
        with Float64():
            return program.reference(flat)
    except Exception as e:  # an operator without a float64 form
        log.debug("the module does not run in float64: %s", first_line(e))
        return None
