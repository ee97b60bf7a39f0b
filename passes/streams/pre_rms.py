"""A Pre-LN model becomes a Pre-RMSNorm model that can be trained on, without loss.

    LN(x) = RMSNorm(P x),   P = I − 11ᵀ/d,   P (W h + b) = (P W) h + P b

The parameters that write a residual stream lose their mean whenever they are read, and the norms that read it need not
subtract one any more. The function of the *raw* parameters is the same, so their gradients are the same too.
Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, arXiv 2305.14858, section 3.2.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normfuse.capture.capture import Captured, capture, flat_inputs
from normfuse.errors import RewriteError, UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import LayerNorm
from normfuse.nn.rms_with_bias import RMSNormWithBias
from normfuse.nn.zero_mean import ZeroMean
from normfuse.passes.streams.mean_free import Stream, streams_of
from normfuse.passes.streams.streams import named, writes
from normfuse.proof.prove import Proof
from normfuse.reports.model import Site

__all__ = ["pre_rms"]

log = logging.getLogger(__name__)

aten = torch.ops.aten

Owner = tuple[str, str]  # path of a module, name of its parameter or buffer


@dataclass
class _Plan:
    """What has to change for a stream.

    Attributes:
        centered: parameters and buffers that write it, each with its feature dimension.
        norms: paths of the LayerNorm modules that read it.
        dropouts: places where single elements of the stream are dropped in training.
    """

    centered: dict[Owner, int] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    dropouts: list[str] = field(default_factory=list)


def pre_rms(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """The same function of the same parameters with RMSNorm where LayerNorm was: a new module, for training on.

    Parameters that write a residual stream get a `ZeroMean` parametrization (`proj.weight` is then kept as
    `proj.parametrizations.weight.original`), buffers are centered once, and the LayerNorms that read the stream become
    RMSNorms with the same γ and β. Outputs are equal in eval and in training, and so is the gradient of every parameter.
    `torch.nn.utils.parametrize.remove_parametrizations` or `normfuse.optimize` makes the means permanent.

    A stream that no parameter can keep mean-free (it starts at a nonlinearity, is multiplied by a LayerScale, is an
    output, or is written by a tied embedding) keeps its LayerNorms; a warning is logged for it. Dropout of single elements
    in a stream gives it a mean in training, which RMSNorm keeps: a warning is logged for that too.

    Args:
        model: a Pre-LN model; it is not changed.
        example_inputs: as in `normfuse.optimize`.

    Returns:
        A new module in the mode of `model`.

    Raises:
        UsageError: there is no LayerNorm, or none can be converted; the message names the first place and the reason.
        CaptureError: the model could not be traced.
        RewriteError: the result is not the same function (a bug of normfuse).
    """
    result = copy.deepcopy(model)
    modes = {new: old.training for old, new in zip(model.modules(), result.modules(), strict=True)}
    captured = capture(result.eval(), example_inputs)
    graph = Graph.of(captured.gm)
    norms = [n for n in graph if isinstance(graph.view(n, 1), LayerNorm)]
    if not norms:
        raise UsageError(f"{type(model).__name__} has no LayerNorm that could become an RMSNorm")
    plans, kept = _plans(graph, result, norms)
    if not plans:
        site = kept[0]
        hint = f"; {site.remedy}" if site.remedy else ""
        raise UsageError(f"no LayerNorm of {type(model).__name__} can become an RMSNorm: at {site.path}, {site.note}{hint}")
    _warn(plans, kept)
    _convert(result, plans, modes)
    _check(graph, captured, result)
    for module, training in modes.items():
        module.training = training
    for module in result.modules():
        if parametrize.is_parametrized(module):
            module.get_submodule("parametrizations").train(module.training)
    return result


def _warn(plans: list[_Plan], kept: list[Site]) -> None:
    for site in kept:
        log.warning("%s stays a LayerNorm: %s", site.path, site.note)
    for place in dict.fromkeys(d for plan in plans for d in plan.dropouts):
        log.warning(
            "%s drops single elements of the stream: in training, LayerNorm would subtract the mean that this leaves", place
        )


def _check(graph: Graph, captured: Captured, result: nn.Module) -> None:
    """Raise RewriteError unless the converted model computes what was captured of the original."""
    inputs = flat_inputs(captured.gm, captured.args, captured.kwargs or {})
    after = capture(result.eval(), captured.args or captured.kwargs, captured.dynamic_shapes)
    fault = Proof(graph, inputs).judge(Graph.of(after.gm)).fault
    if fault:
        raise RewriteError(f"pre_rms changed the function of {type(result).__name__}: {fault}")


# -- what has to change --------------------------------------------------------------------------------------------------


def _plans(graph: Graph, model: nn.Module, norms: list[fx.Node]) -> tuple[list[_Plan], list[Site]]:
    """One plan a stream that can be converted, and the norms of those that cannot, with the reasons."""
    refused: list[Site] = []
    streams = list(streams_of(graph, norms, refused))
    owners = _owners(model)
    plans: dict[int, _Plan] = {}
    for i, stream in enumerate(streams):
        try:
            plans[i] = _plan(graph, owners, stream)
        except Refuse as refusal:
            refused += [graph.site("pre_rms", n, refusal) for n in stream.norms]
    while (bad := _read_elsewhere(graph, model, norms, streams, plans)) is not None:
        i, why = bad
        del plans[i]
        refused += [graph.site("pre_rms", n, why) for n in streams[i].norms]
    for i, plan in plans.items():
        plan.norms = list(dict.fromkeys(graph.path(n) for n in streams[i].norms))
    order = {graph.path(n): i for i, n in enumerate(norms)}
    return list(plans.values()), sorted(refused, key=lambda site: order.get(site.path, 0))


def _plan(graph: Graph, owners: dict[Any, list[Owner]], stream: Stream) -> _Plan:
    if stream.explicit:
        node, why = next(iter(stream.explicit.items()))
        raise Refuse(f"{why}, which no parametrization can undo", blocker=node, remedy=_remedy(why))
    plan = _Plan()
    inside = set(stream.values)
    for node in stream.values:
        constant = graph.constant(node)
        if constant is not None:
            written = {constant: constant.ndim + stream.axis[node]}
        else:
            op = graph.view(node, 2)
            written = {getattr(op, name): dim for name, dim in (writes(op, stream.axis[node]) or {}).items()}
        for c, dim in written.items():
            owner = _owner(graph, owners, c, inside)
            if plan.centered.setdefault(owner, dim) != dim:
                raise Refuse(f"{c.name} is centered along two dimensions", blocker=node)
        if node.target is aten.dropout.default and node.args[1]:
            plan.dropouts.append(graph.path(node))
    return plan


def _remedy(why: str) -> str:
    if re.search(r"\bmul\b", why):
        return "a gain on the stream (LayerScale) has to be multiplied into the weights before it"
    return "subtract the mean in the model itself where the stream starts"


def _owners(model: nn.Module) -> dict[Any, list[Owner]]:
    """Who owns each tensor: a module's path and the tensor's name in it. A module that stands at two places counts once."""
    found: dict[Any, list[Owner]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(_identity(tensor), []).append((path, name))
    return found


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _owner(graph: Graph, owners: dict[Any, list[Owner]], constant: Constant, inside: set[fx.Node]) -> Owner:
    """The only place of a tensor that only the stream reads."""
    known = [] if constant.tensor is None else owners.get(_identity(constant.tensor), [])
    if not known:
        raise Refuse(f"{constant.name or 'a constant'} is neither a parameter nor a buffer of the model")
    if len(known) > 1:
        raise Refuse(f"{constant.name} is tied to {'.'.join(known[1]).lstrip('.')}", remedy="untie the weights first")
    others = [n for n in graph.readers_of(constant) if n not in inside]
    if others:
        raise Refuse(
            f"{constant.name} is shared with {named(graph, others[0])}", blocker=others[0], remedy="untie the weights first"
        )
    return known[0]


def _read_elsewhere(
    graph: Graph, model: nn.Module, norms: Iterable[fx.Node], streams: list[Stream], plans: dict[int, _Plan]
) -> tuple[int, Refuse] | None:
    """The first stream with a norm that is no `nn.LayerNorm` module, or whose module is used outside of the plans as well."""
    converted = {n for i in plans for n in streams[i].norms}
    modules = {n: _module(model, graph.path(n)) for n in norms}
    for i in plans:
        for node in streams[i].norms:
            module = modules[node]
            if not _is_layer_norm(module):
                kind = "a function call" if not isinstance(module, nn.LayerNorm) else f"a {type(module).__name__}"
                return i, Refuse(
                    f"{graph.path(node)} is {kind}, not an nn.LayerNorm", blocker=node, remedy="use nn.LayerNorm modules"
                )
            outside = [n for n in norms if modules[n] is module and n not in converted]
            if outside:
                return i, Refuse(f"{graph.path(node)} also normalizes a value that keeps its mean", blocker=outside[0])
    return None


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _is_layer_norm(module: nn.Module | None) -> bool:
    """A layer norm over the last axis as it stands; a subclass may call the same function in its own way (timm's)."""
    if not isinstance(module, nn.LayerNorm):
        return False
    return type(module).forward is nn.LayerNorm.forward or type(module).__name__ == "LayerNorm"


# -- the new module ------------------------------------------------------------------------------------------------------


def _convert(result: nn.Module, plans: list[_Plan], modes: dict[nn.Module, bool]) -> None:
    """Swap the norms and center the writers, in place; `modes` learns the mode of every norm that is new."""
    for path in dict.fromkeys(p for plan in plans for p in plan.norms):
        old = result.get_submodule(path)
        if not isinstance(old, nn.LayerNorm):
            continue  # the same module at another place, which has been swapped with the first
        new = _rms_norm(old)
        modes[new] = modes.pop(old)
        for place, module in list(result.named_modules(remove_duplicate=False)):
            if module is old:
                parent, _, name = place.rpartition(".")
                setattr(result.get_submodule(parent), name, new)
    for (path, name), dim in {o: d for plan in plans for o, d in plan.centered.items()}.items():
        module = result.get_submodule(path)
        if name in module._parameters:
            parametrize.register_parametrization(module, name, ZeroMean(dim))
        else:
            module._buffers[name] = ZeroMean(dim)(module.get_buffer(name))


def _rms_norm(old: nn.LayerNorm) -> nn.Module:
    """The RMSNorm with the parameters of a LayerNorm, the very same objects."""
    shape, eps = tuple(old.normalized_shape), old.eps
    if not old.elementwise_affine:
        return nn.RMSNorm(shape, eps, elementwise_affine=False).eval()
    biased = old.bias is not None
    new: Any = RMSNormWithBias(shape, eps, device="meta") if biased else nn.RMSNorm(shape, eps, device="meta")
    new.weight = old.weight
    if biased:
        new.bias = old.bias
    return new.eval()  # type: ignore[no-any-return]
