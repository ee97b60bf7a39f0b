"""The native form: one node of the domain `normfuse` each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from normfuse import native
from normfuse.export.lowering.attention.forms import KernelAttention
from normfuse.export.lowering.layers import Layer
from normfuse.export.onnx.build import Build, Shared, dims, take_over
from normfuse.export.onnx.own_nodes import MIN_NATIVE_OPSET, native_node
from normfuse.export.onnx.quantized.form import Form, Wanted
from normfuse.export.onnx.quantized.integer import expand
from normfuse.export.onnx.quantized.sites import Site, sites
from normfuse.extras import need
from normfuse.passes.fuse import FUSED

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Native", "keep_nodes"]


class Native(Form):
    """Nodes of normfuse's kernels. What these cannot take (float64, groups of channels with exponents of their own) becomes
    standard ops."""

    name = "native"
    packs = True
    kernels = True
    passes = (*FUSED, KernelAttention())

    def refuses(self, layers: Sequence[Layer], wanted: Wanted) -> str | None:
        if wanted.opset >= MIN_NATIVE_OPSET:
            return None
        return f"form='native' needs opset {MIN_NATIVE_OPSET}, not {wanted.opset}; use form='integer' or form='qdq'"

    def offers_itself(self) -> bool:
        return native.available()

    def write(self, model: ir.Model, wanted: Wanted) -> None:
        shared: Shared = {}
        for site in sites(model):
            if _takes(site):
                _place(model, site, shared)
            else:
                expand(model, site, shared)


def keep_nodes(model: ir.Model, names: Sequence[str]) -> Counter[str]:
    """Write the markers of `torch.ops.normfuse.<name>` for these names as nodes of `DOMAIN` in the dtype that they have, in place;
    returns how many of each. What a kernel of another runtime is to take; see `normfuse.export.tensorrt.plugins`."""
    kept: Counter[str] = Counter()
    for site in sites(model):  # one by one: a marker may read what stood in the place of the one before it
        if site.node.op_type not in names:
            continue
        at = Build(model, site.node)
        outputs = native_node(at, site.op.name, site.inputs, site.facts, count=site.count)
        for old, new in zip(site.node.outputs[: site.count], outputs, strict=True):
            take_over(old, new)
        model.graph.remove(site.node, safe=True)
        kept[site.node.op_type] += 1
    return kept


def _takes(site: Site) -> bool:
    ir = need("onnx_ir", extra="onnx")
    grouped = site.op.name == "ShiftQuantConv2d" and site.facts["group"] > 1
    # the bodies multiply by a column
    one_scale = site.op.name.startswith("ShiftQuantMatMul") and dims(site.inputs[1]) in (None, ())
    return site.x.dtype != ir.DataType.DOUBLE and not grouped and not one_scale


def _place(model: ir.Model, site: Site, shared: Shared) -> None:
    at = Build(model, site.node, shared)
    half = (at.ir.DataType.FLOAT16, at.ir.DataType.BFLOAT16)
    inputs = tuple(
        at.op("Cast", v, to=1, dtype=at.ir.DataType.FLOAT) if v is not None and v.dtype in half else v for v in site.inputs
    )
    outputs = native_node(at, site.op.name, inputs, site.facts, count=site.count)
    for i, (old, new) in enumerate(zip(site.node.outputs[: site.count], outputs, strict=True)):
        if old.dtype in half:
            new.dtype, new.shape = at.ir.DataType.FLOAT, old.shape
            new = at.op("Cast", new, to=int(site.dtype(i)))
        take_over(old, new)
    model.graph.remove(site.node, safe=True)
