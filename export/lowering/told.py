"""What attentions, norms and quantized layers of a program are in a file, for the report."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator

from torch import fx

from normfuse.export.lowering.attention.forms import AttentionForms, fallbacks, forms_in
from normfuse.export.lowering.attention.operators import is_of_codes
from normfuse.export.lowering.graphs import graph_of
from normfuse.export.lowering.layers import quantized_layers
from normfuse.export.lowering.lowering import Lowered
from normfuse.export.lowering.spelled_norms import spelled_norm
from normfuse.export.targets import FUSED_NORM_OPSET
from normfuse.ir import operators
from normfuse.ir.graph import path_of
from normfuse.ir.wording import operator_name
from normfuse.passes.attention.eager import EagerAttention
from normfuse.passes.attention.static_masks import StaticMasks
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
_OF_ATTENTION = (AttentionForms.name, EagerAttention.name, StaticMasks.name)


def forms_of(lowered: Lowered, attention: str, form: str | None, opset: int) -> tuple[Form, ...]:
    """An attention, a norm or a quantized layer each, in the order of the graph.

    Args:
        lowered: the program as it is written.
        attention: the form that was wanted for attention.
        form: of its quantized layers; None without any.
        opset: of the file.
    """
    found = [*_norms(lowered, opset), *_layers(lowered, form or "")]
    refused = [site for p in lowered.passes if p.name not in _OF_ATTENTION for site in p.refused]
    return (*_attentions(lowered, attention), *(_explained(each, refused) for each in found))


def _attentions(lowered: Lowered, wanted: str) -> Iterator[Form]:
    """Each with the reason of the first form that refused it, and those that stay spelled out."""
    waiting: defaultdict[str, deque[Site]] = defaultdict(deque)  # what was refused, by module, in the order of the graph
    for site in _refused(lowered, AttentionForms.name):
        waiting[site.path].append(site)
    tried = fallbacks(wanted)
    for node, form in forms_in(lowered.exported.graph.nodes):
        path = _named_as_before(node)
        if is_of_codes(node):
            yield Form("attention", path, f"{form} Attention")
            continue
        missed = tried[: tried.index(form)] if form in tried else tried
        reasons = [waiting[path].popleft() for _ in missed if waiting[path]]
        yield Form("attention", path, form, *((reasons[0].note, reasons[0].remedy) if reasons else ()))
    for site in _refused(lowered, EagerAttention.name):
        yield Form("attention", site.path, _SPELT, site.note, site.remedy)


def _named_as_before(node: fx.Node) -> str:
    """Its path; at the root of a model that is the name of its operator, which a form has changed."""
    return path_of(node).replace(operator_name(node), "scaled_dot_product_attention")


def _refused(lowered: Lowered, name: str) -> list[Site]:
    return [site for p in lowered.passes if p.name == name for site in p.refused]


def _norms(lowered: Lowered, opset: int) -> Iterator[Form]:
    graph = graph_of(lowered.exported)
    for node in graph:
        name = operators.name(node.target)
        if name in operators.NORMS:
            yield _norm(node, name, opset)
        elif spelled := spelled_norm(graph, node):
            yield Form("norm", path_of(node), _SPELT, f"no runtime has an operator for a {spelled}")


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
