"""The integer form: standard ops alone, MatMulInteger and ConvInteger, scales found where the model runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from normfuse.export.onnx.build import Build
from normfuse.export.onnx.quantized.sites import Site, sites

__all__ = ["expand", "lower_integer", "take_over"]


def lower_integer(model: Any, *, int4: bool = False) -> int:
    """Write every marker in standard ops, in place; returns their number.

    `int4`: weights of up to 4 bits as INT4 in the file, expanded by the runtime when it loads.
    """
    shared: dict[Any, Any] = {}
    count = 0
    for site in sites(model):
        expand(model, site, shared, int4=int4)
        count += 1
    return count


def expand(model: Any, site: Site, shared: dict[Any, Any], *, int4: bool = False) -> None:
    """Replace one marker by its definition, computed in float32 (float64 if its input is that)."""
    at = Build(model, site.node, shared)
    types = at.ir.DataType
    half, double = (types.FLOAT16, types.BFLOAT16), types.DOUBLE
    first = site.inputs[0].dtype
    inputs = tuple(at.op("Cast", v, to=1) if v is not None and v.dtype in half else v for v in site.inputs)
    facts: dict[str, Any] = {
        k: (at.const(np.float32(v)) if v else None) if site.op.attributes.get(k) == "FLOAT" else v
        for k, v in site.op.complete(site.facts).items()
    }
    facts |= {"double": first == double and site.has_weight, "int4": int4}
    for old, new in zip(site.node.outputs[: site.count], site.op.expand(at, inputs, facts), strict=False):
        # the type that torch says
        take_over(old, at.op("Cast", new, to=int(old.dtype)) if first in half and old.dtype in half else new)
    model.graph.remove(site.node, safe=True)


def take_over(old: Any, new: Any) -> None:
    """`new` in the place of `old`, as a graph output too."""
    if new.shape is None:
        new.shape = old.shape
    if new.dtype is None:
        new.dtype = old.dtype
    old.replace_all_uses_with(new, replace_graph_outputs=True)
