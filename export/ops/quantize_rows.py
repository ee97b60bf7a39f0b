"""`QuantizeRows`: floats to codes and one scale a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normfuse.export.ops.activations import dynamic_codes, signed
from normfuse.export.ops.emitter import Emitter, Op

__all__ = ["QUANTIZE_ROWS"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any, Any]:
    """q = rne(x · (qmax / max|x|)),   scale = max|x| / qmax"""
    codes, scale = dynamic_codes(at, inputs[0], facts["bits"])
    return signed(at, codes), scale


QUANTIZE_ROWS = Op("QuantizeRows", ("quantize_rows",), ("x",), ("q", "scale"), {"bits": "INT"}, _expand)
