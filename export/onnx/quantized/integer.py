"""The integer form: standard ops alone, MatMulInteger and ConvInteger, scales found where the model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.export.onnx.build import Build, Shared, take_over
from normfuse.export.onnx.quantized.form import Form, Wanted
from normfuse.export.onnx.quantized.sites import Site, sites

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Integer", "expand"]


class Integer(Form):
    """Every marker in standard ops."""

    name = "integer"

    def write(self, model: ir.Model, wanted: Wanted) -> None:
        shared: Shared = {}
        for site in sites(model):
            expand(model, site, shared, int4=wanted.int4)


def expand(model: ir.Model, site: Site, shared: Shared, *, int4: bool = False) -> None:
    """Replace one marker by its definition, computed in float32 (float64 if its input is that)."""
    at = Build(model, site.node, shared)
    types = at.ir.DataType
    half, double = (types.FLOAT16, types.BFLOAT16), types.DOUBLE
    first = site.x.dtype
    inputs = tuple(at.op("Cast", v, to=1) if v is not None and v.dtype in half else v for v in site.inputs)
    facts: dict[str, Any] = {
        k: (at.const(np.float32(v)) if v else None) if site.op.attributes.get(k) == "FLOAT" else v
        for k, v in site.op.complete(site.facts).items()
    }
    facts |= {"double": first == double and site.has_weight, "int4": int4}
    for i, (old, new) in enumerate(zip(site.node.outputs[: site.count], site.op.expand(at, inputs, facts), strict=False)):
        # the type that torch says
        take_over(old, at.op("Cast", new, to=int(site.dtype(i))) if first in half and old.dtype in half else new)
    model.graph.remove(site.node, safe=True)
