"""Numbers and codes in the bodies of operators on codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from normfuse.export.ops.emitter import Emitter, number

__all__ = ["FIRST", "LAST", "as_float", "as_type", "coded", "decimal"]

#: Channels to the front, and to the end.
FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def as_type(at: Emitter, fact: Any, kind: int) -> Any:
    """An INT as a value of an ONNX type."""
    return at.op("Cast", number(at, fact), to=kind)


def as_float(at: Emitter, x: Any, zero: Any) -> Any:
    """float(x − zero)"""
    return at.op("Cast", at.op("Sub", at.op("Cast", x, to=6), as_type(at, zero, 6)), to=1)


def decimal(at: Emitter, fact: Any) -> Any:
    """A FLOAT as a value; a graph has None for 0."""
    return at.const(np.float32(0)) if fact is None else fact


def coded(at: Emitter, y: Any, low: Any, high: Any) -> Any:
    """clamp(rne(y), low, high) as uint8"""
    return at.op("Cast", at.op("Clip", at.op("Round", y), as_type(at, low, 1), as_type(at, high, 1)), to=2)
