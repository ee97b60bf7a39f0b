"""`TwoPassSoftmax`: softmax over the last axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normfuse.export.ops.emitter import Emitter, Op

__all__ = ["TWO_PASS_SOFTMAX"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = exp(x) / Σ exp(x)"""
    return (at.op("Softmax", inputs[0], axis=-1),)


TWO_PASS_SOFTMAX = Op("TwoPassSoftmax", ("two_pass_softmax",), ("x",), ("y",), {}, _expand)
