"""What norms and quantized layers of a program are in a file, for the report."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from normfuse.export.lowering.layers import quantized_layers
from normfuse.export.lowering.lowering import Lowered
from normfuse.export.targets import FUSED_NORM_OPSET
from normfuse.ir import operators
from normfuse.ir.graph import path_of
from normfuse.reports.model import Form, Site

__all__ = ["forms_of"]

_CODES = {"NormQuantize": "norm"}
_KINDS = {"Attention": "attention", "RmsNorm": "norm", "CrmsNorm": "norm", "L1Norm": "norm", **_CODES}
_ONNX = {
    "batch_norm": "BatchNormalization",
    "group_norm": "GroupNormalization",
    "instance_norm": "InstanceNormalization",
    "layer_norm": "LayerNormalization",
}
_SPELT = "arithmetic"


def forms_of(lowered: Lowered, form: str | None, opset: int) -> tuple[Form, ...]:
    """A norm or a quantized layer each, in the order of the graph.

    Args:
        lowered: the program as it is written.
        form: of its quantized layers; None without any.
        opset: of the file.
    """
    found = [*_norms(lowered, opset), *_layers(lowered, form or "")]
    refused = [site for p in lowered.passes for site in p.refused]
    return tuple(_explained(each, refused) for each in found)


def _norms(lowered: Lowered, opset: int) -> Iterator[Form]:
    for node in lowered.exported.graph.nodes:
        name = operators.name(node.target)
        if name in operators.NORMS:
            yield _norm(node, name, opset)


def _norm(node: fx.Node, name: str, opset: int) -> Form:
    if name != "rms_norm":
        return Form("norm", path_of(node), _ONNX[name])
    if opset >= FUSED_NORM_OPSET:
        return Form("norm", path_of(node), "RMSNormalization")
    why = f"opset {opset} has no RMSNormalization"
    return Form("norm", path_of(node), _SPELT, why, f"opset {FUSED_NORM_OPSET} or newer")


def _layers(lowered: Lowered, form: str) -> Iterator[Form]:
    """In the native form by the name of the op; a layer that a pass has joined with another says what it reads and writes."""
    for layer in quantized_layers(lowered.exported):
        kind = _KINDS.get(layer.op.name, "quantized")
        yield Form(kind, layer.layer, f"{form} {layer.op.name}".strip())


def _explained(each: Form, refused: list[Site]) -> Form:
    """The form with the reason of the pass that would have made more of it."""
    if each.form.split()[-1] in _CODES:
        return each
    reason = next((s for s in refused if s.path == each.path), None)
    if each.why or reason is None:
        return each
    where = f" ({reason.blocker})" if reason.blocker else ""
    return Form(each.kind, each.path, each.form, f"{reason.note}{where}", reason.remedy)
