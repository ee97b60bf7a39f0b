"""Numbers that an optimizer takes for zero or one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from normfuse.export.onnx.build import const_of, given
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["kept_exact"]

# onnxscript drops x + c for |c| ≤ 1e-8 and x · c for |c − 1| ≤ 1e-5; ten times that is safe
_NEUTRAL = {"Add": (0.0, 1e-7), "Sub": (0.0, 1e-7), "Mul": (1.0, 1e-4), "Div": (1.0, 1e-4)}
_CASTS = ("Cast", "CastLike", "Identity")


@contextlib.contextmanager
def kept_exact(model: ir.Model) -> Iterator[None]:
    """Hide additions of tiny numbers and factors near one from the optimizer that runs in the block.

    It would drop them as no-ops, among them the eps of a norm or of a division: BERT's is 1e-12, that of float64 2e-16,
    and without it a row of zeros becomes NaN.
    """
    for node in model.graph:
        if not node.domain and node.op_type in _NEUTRAL and any(_nearly(node.op_type, v) for v in node.inputs):
            node.domain = MARKER_DOMAIN
    model.opset_imports[MARKER_DOMAIN] = 1
    try:
        yield
    finally:
        for node in model.graph:
            if node.domain == MARKER_DOMAIN and node.op_type in _NEUTRAL:
                node.domain = ""


def _nearly(op: str, value: ir.Value | None) -> bool:
    """A number close to the neutral one of `op`, but another."""
    node = value.producer() if value is not None else None
    while node is not None and not node.domain and node.op_type in _CASTS:
        value = given(node)
        node = value.producer()
    number = const_of(value)
    if number is None or number.size != 1 or number.dtype.kind not in "f":
        return False
    neutral, width = _NEUTRAL[op]
    gap = abs(float(number.reshape(-1)[0]) - neutral)
    return 0 < gap <= width
