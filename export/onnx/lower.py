"""From an exported program to ONNX models, one for each form of attention and of quantized layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from normfuse.errors import ExportError, NormfuseError
from normfuse.export.onnx.attention.rotary import full_rotary_tables
from normfuse.export.onnx.attention.written import attention_markers, write_attention
from normfuse.export.onnx.build import dims, given
from normfuse.export.onnx.experts import grouped_products
from normfuse.export.onnx.own_nodes import add_functions
from normfuse.export.onnx.precision.small_numbers import kept_exact
from normfuse.export.onnx.program import Program
from normfuse.export.onnx.quantized.form import Form as LayerForm
from normfuse.export.onnx.quantized.forms import FORMS, lower_quantized
from normfuse.export.onnx.quiet import quiet
from normfuse.export.onnx.residual import keep_layer_norm_apart
from normfuse.export.onnx.writer.markers import markers
from normfuse.export.onnx.writer.names import name_graph
from normfuse.export.onnx.writer.once import made_once
from normfuse.export.onnx.writer.opset17 import to_opset_17
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN, table
from normfuse.export.runtimes import format_of
from normfuse.export.targets import Target
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["STEPS", "Draft", "Step", "finished", "translated"]

log = logging.getLogger(__name__)

_LONGEST = 300  # letters of somebody else's message

_TRANSLATED_OPSET = 18  # the oldest one that torch translates to; below it the result is converted


def translated(
    program: Program, opset: int, *, contrib: bool = False, more: Mapping[Callable[..., Any], Callable[..., Any]] | None = None
) -> ir.Model:
    """The program as an `onnx_ir.Model`; attention and operators of ours are still markers; `contrib` allows ops of ONNX Runtime.

    `more` are further translations, by operator.

    Raises:
        ExportError: torch has no translation for an op of the model; the message names it.
    """
    need("onnxscript", extra="onnx")
    version = max(opset, _TRANSLATED_OPSET)
    try:
        with quiet(), torch.no_grad(), made_once():
            out = torch.onnx.export(
                program.exported,
                opset_version=version,
                custom_translation_table=_translations(opset, version, contrib=contrib) | dict(more or {}),
                optimize=False,
                verbose=False,
            )
            assert out is not None
            _cast_outputs(out.model.graph, program)
            with kept_exact(out.model):
                out.optimize()
    except Exception as e:
        raise ExportError(f"torch cannot translate the model to ONNX opset {opset}: {_cause(e)}{_place(e, program)}") from e
    with _in_one_line("marked"):
        _keep_constants(out.model.graph)
    return out.model


def _translations(opset: int, version: int, *, contrib: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    return table(opset, contrib=contrib) | markers() | attention_markers() | grouped_products(version)


@dataclass
class Draft:
    """A file that is being written.

    Attributes:
        model: a copy of the translated one; what the steps change.
        program: what it is of.
        target, opset: what it is for.
        layers: form of quantized layers; None without any.
        int4: weights of up to 4 bits as INT4, where the form leaves that open.
    """

    model: ir.Model
    program: Program
    target: Target
    opset: int
    layers: LayerForm | None
    int4: bool


@dataclass(frozen=True)
class Step:
    """One step from markers to a file: what it is, what it does to a draft, and for which."""

    name: str
    apply: Callable[[Draft], object]
    when: Callable[[Draft], bool] = lambda draft: True


def finished(
    model: ir.Model, program: Program, target: Target, opset: int, quantized: str | None = None, *, int4: bool = False
) -> ir.Model:
    """A copy of the translated `model` for `target`, with quantized layers in the form `quantized`, and final names.

    Raises:
        ExportError: the ops do not exist at `opset`.
    """
    layers = None if quantized is None else FORMS[quantized]
    with quiet():
        draft = Draft(model.clone(), program, target, opset, layers, int4)
        for step in STEPS:
            if step.when(draft):
                with _in_one_line(f"written ({step.name})"):
                    step.apply(draft)
    return draft.model


def _is_quantized(draft: Draft) -> bool:
    return draft.layers is not None


def _form(draft: Draft) -> LayerForm:
    assert draft.layers is not None
    return draft.layers


def _at_last(draft: Draft) -> None:
    _form(draft).at_last(draft.model)


def _write_layers(draft: Draft) -> None:
    lower_quantized(draft.model, _form(draft).name, draft.target, draft.opset, int4=draft.int4, program=draft.program)


def _import_domains(draft: Draft) -> None:
    draft.model.opset_imports.update(dict.fromkeys(draft.target.domains, 1))


def _set_format(draft: Draft) -> None:
    draft.model.ir_version = format_of(draft.opset)


def _common(name: str) -> Callable[[Draft], object]:
    """A pass of onnx_ir."""
    return lambda draft: getattr(need("onnx_ir.passes.common", extra="onnx"), name)()(draft.model)


#: What makes a file of a translated model, in order.
STEPS = (
    Step("whole tables of rotary positions", lambda d: full_rotary_tables(d.model)),
    Step("attention in its form", lambda d: write_attention(d.model)),
    Step("LayerNorms apart from additions", lambda d: keep_layer_norm_apart(d.model), lambda d: d.target.runs_here),
    Step("domains of the target", _import_domains),
    Step("quantized layers in their form", _write_layers, _is_quantized),
    Step("no markers any more", lambda d: d.model.opset_imports.pop(MARKER_DOMAIN, None)),
    Step("unused nodes", _common("RemoveUnusedNodesPass")),
    Step("reshapes to the same shape", lambda d: _drop_reshapes_to_same(d.model)),
    Step("common subexpressions", _common("CommonSubexpressionEliminationPass")),
    Step("equal constants", _common("DeduplicateInitializersPass")),
    Step("quantized layers behind that", _at_last, _is_quantized),
    Step("what that left unused", _common("RemoveUnusedNodesPass")),
    Step("opset 17", lambda d: to_opset_17(d.model), lambda d: d.opset < _TRANSLATED_OPSET),
    Step("functions of our own ops", lambda d: add_functions(d.model, d.opset)),
    Step("domains that nobody uses", _common("RemoveUnusedOpsetsPass")),
    Step("outputs that are inputs", _common("OutputFixPass")),
    Step("version of the format", _set_format),
    Step("names", lambda d: name_graph(d.model, d.program.inputs, d.program.outputs, d.program.axes)),
)


def _cast_outputs(graph: ir.Graph, program: Program) -> None:
    """Give the outputs the dtypes of the program: of a half, torch lets sums and maxima leave the graph in float32."""
    ir = need("onnx_ir", extra="onnx")
    adapters = need("onnx_ir.tensor_adapters", extra="onnx")
    last = next(n for n in program.exported.graph.nodes if n.op == "output")
    for i, (value, node) in enumerate(zip(list(graph.outputs), last.args[0], strict=True)):
        dtype = adapters.from_torch_dtype(node.meta["val"].dtype)
        if value.dtype == dtype:
            continue
        cast = ir.node("Cast", [value], {"to": dtype})
        cast.outputs[0].dtype, cast.outputs[0].shape, cast.outputs[0].name = dtype, value.shape, f"{value.name}_cast"
        graph.append(cast)
        graph.outputs[i] = cast.outputs[0]


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """An error of the libraries that handle graphs may print the whole graph."""
    try:
        yield
    except NormfuseError:
        raise
    except Exception as e:
        log.debug("the graph cannot be %s", what, exc_info=e)
        raise ExportError(f"the ONNX graph cannot be {what}: {type(e).__name__}: {_cause(e)}; please report it") from e


def _keep_constants(graph: ir.Graph) -> None:
    """Put into the graph what its nodes read: the optimizer names new constants after a value, twice if it is read twice."""
    for node in graph:
        for v in node.inputs:
            if v is None or v.const_value is None or v.producer() is not None or graph.initializers.get(v.name or "") is v:
                continue
            base, count = v.name or "constant", 1
            while v.name in graph.initializers or v.name is None:
                v.name, count = f"{base}_{count}", count + 1
            v.const_value.name = v.name
            graph.register_initializer(v)


def _drop_reshapes_to_same(model: ir.Model) -> None:
    """Remove Reshape nodes between equal, fully known shapes."""
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        if before is not None and before == after and None not in before and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(given(node))
            model.graph.remove(node, safe=True)


def _cause(e: BaseException) -> str:
    """The innermost message of a chain of exceptions; ours, if one is among them."""
    chain = [e]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    own = [x for x in chain if isinstance(x, ExportError)]
    text = " ".join(str((own or chain)[-1]).split())
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text)
    if missing is not None:
        return f"there is no ONNX form of {missing[1]}{_remedy(missing[1])}"
    return text[:_LONGEST] or type(chain[-1]).__name__


def _remedy(operator: str) -> str:
    library = operator.partition(".")[0]
    return "" if library in ("aten", "prims", "prim") else f", which {library} has made; use its form of plain PyTorch operators"


def _place(e: BaseException, program: Program) -> str:
    """Where in the model the operator stands that an error is about."""
    said: BaseException | None = e
    while said is not None:
        named = re.search(r"translating node %?(\w+)", str(said))
        if named is not None:
            nodes = list(program.exported.graph.nodes)
            # the exporter takes operators apart, and the parts are called after what they compute
            near = [n for n in nodes if n.name == named[1]] or [n for n in nodes if named[1].rstrip("_0123456789") in n.name]
            stack = near[0].meta.get("nn_module_stack") if near else None
            path = next((p for p, _ in reversed(list((stack or {}).values())) if p), "")
            return f" (in {path})" if path else ""
        said = said.__cause__ or said.__context__
    return ""
