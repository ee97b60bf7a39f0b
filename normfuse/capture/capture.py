"""Any model becomes one canonical graph: undecomposed ATen calls, parameters as constants, nothing written in place."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.capture.canonical import canonical_module, without_guard_calls
from normfuse.capture.explained import explained
from normfuse.capture.writes import is_write, writes
from normfuse.described import first_line
from normfuse.errors import CaptureError, NormfuseError, UsageError
from normfuse.given.declared_inputs import declared_inputs
from normfuse.given.model_kinds import check_kind, unwrapped, unwrapped_inside
from normfuse.given.original import Call, Original, loses_cache, without_cache
from normfuse.importers import recognise
from normfuse.ir.free_sizes import fixed_after_all, free_sizes, stated_minima
from normfuse.ir.guards import guarded_inputs, guards_of, guards_of_signature, set_guards
from normfuse.ir.optimized import OptimizedGraph
from normfuse.ir.trees import children
from normfuse.reports.record import record
from normfuse.surroundings import undisturbed

__all__ = [
    "Captured",
    "arguments",
    "as_given",
    "cache_notes",
    "calls_of",
    "capture",
    "flat_inputs",
    "program_shapes",
    "shadow_of",
    "usable",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A model as a canonical graph.

    Attributes:
        gm: the graph; it refers to the tensors of the original model and never writes to them.
        args, kwargs: the example inputs it was captured with.
        has_inputs: False when it was traced without any.
        dynamic_shapes: what may vary, as in `torch.export.export`.
        notes: what the user should know: training mode, layers that were recognised, outputs that were left out.
    """

    gm: fx.GraphModule
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    has_inputs: bool = True
    dynamic_shapes: Any = None
    notes: tuple[str, ...] = ()


def capture(model: Any, example_inputs: Any = None, dynamic_shapes: Any = None) -> Captured:
    """The canonical graph of a module, a GraphModule or an ExportedProgram.

    Args:
        model: what to capture; its mode, parameters, hooks and the random state are left as they are.
        example_inputs: a tuple of positional inputs or a dictionary of keyword inputs; None looks for inputs that the
            model declares (timm, Hugging Face, torchvision), else traces it without shapes.
        dynamic_shapes: as in `torch.export.export`; None fixes all sizes to those of the example.

    One thread captures at a time; `autocast` and `inference_mode` around the call are left out.

    Raises:
        CaptureError: the model cannot be traced; the message names the cause and what to try.
        UsageError: `model` or `example_inputs` is not of a kind that can be captured.
    """
    with undisturbed():
        return _captured(model, None if example_inputs is None else arguments(example_inputs), dynamic_shapes)


def _captured(model: Any, given: tuple[tuple[Any, ...], dict[str, Any]] | None, dynamic_shapes: Any) -> Captured:
    if isinstance(model, ExportedProgram):
        return _exported_program(model, given)
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, a GraphModule or an ExportedProgram, got {type(model).__name__}")
    model = unwrapped(model)
    check_kind(model)
    if isinstance(model, fx.GraphModule) and given is None:
        known = _canonical(model)
        if known is not None:
            return known
    shadow, notes, caching = shadow_of(model)
    if given is not None:
        own = _told_apart(model, *given)
        return _export(shadow, *own, dynamic_shapes, notes + cache_notes(shadow, caching, *own))
    declared = declared_inputs(shadow)
    if declared is None:
        return _trace(shadow, notes)
    declared[1].pop("use_cache", None)  # said by the shadow's configuration; an input would become part of the signature
    notes += cache_notes(shadow, caching, *declared)
    try:
        return _export(shadow, *declared, dynamic_shapes or _any_batch(*declared), notes)
    except CaptureError as e:
        log.info("the declared inputs do not fit (%s); tracing without shapes", e)
        return _trace(shadow, notes)


def flat_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """One value for each placeholder of the graph, from a call's arguments.

    Raises:
        UsageError: the arguments do not fit the model's signature.
    """
    codegen = gm.graph._codegen
    spec = getattr(getattr(codegen, "pytree_info", None), "in_spec", None)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    if spec is None:
        return _by_name(gm, names, args, kwargs)
    try:
        _, keyword = children(spec)
        ordered = {k: kwargs[k] for k in keyword.context} if keyword.context else dict(kwargs)
        leaves, got = pytree.tree_flatten((tuple(args), ordered))
    except KeyError as e:
        raise UsageError(f"the model was captured with keyword input {e}, which is missing") from e
    if len(leaves) != len(names):
        raise UsageError(f"the model takes {len(names)} inputs ({', '.join(names)}), got {len(leaves)}: {got}")
    return leaves


def calls_of(gm: fx.GraphModule) -> Callable[[Sequence[Any]], Call]:
    """The other way round: the arguments of a call, from one value for each placeholder of the graph."""
    spec = getattr(getattr(gm.graph._codegen, "pytree_info", None), "in_spec", None)

    def call(values: Sequence[Any]) -> Call:
        return Call(tuple(values)) if spec is None else Call(*pytree.tree_unflatten(list(values), spec))

    return call


def _by_name(gm: fx.GraphModule, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    nodes = gm.graph.find_nodes(op="placeholder")
    values: list[Any] = []
    for i, node in enumerate(nodes):
        name = str(node.target).lstrip("*")
        if i < len(args):
            values.append(args[i])
        elif name in kwargs:
            values.append(kwargs[name])
        elif node.args:
            values.append(node.args[0])
        else:
            raise UsageError(f"the model takes {len(names)} inputs ({', '.join(names)}); {name} is missing")
    return values


# -- ways in -----------------------------------------------------------------------------------------------------------


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from one tensor, a tuple or list, or a dictionary.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise UsageError(f"example_inputs: expected a tuple of inputs or a dictionary of keyword inputs, got {type(example).__name__}")


def as_given(model: Any, example_inputs: Any) -> Original | None:
    """The model as it was given, once it ran on the inputs that were given; None for what `capture` refuses anyway."""
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        check_kind(model)
    elif not isinstance(model, ExportedProgram):
        return None
    try:
        original = Original(model)
    except Exception as e:  # what cannot be copied cannot be captured either, and capture says so
        log.debug("the model cannot be copied: %s", e)
        return None
    if example_inputs is not None:
        original.first(Call(*arguments(example_inputs)))
    return original


def shadow_of(model: nn.Module) -> tuple[nn.Module, tuple[str, ...], list[Any]]:
    """A copy of the modules in eval mode that shares every tensor with the original; notes, and what `without_cache` changed."""
    notes: list[str] = []
    if any(m.training for m in model.modules()) and not isinstance(model, fx.GraphModule):
        notes.append("the model was in training mode; it was optimized as in eval()")
        log.warning("%s", notes[-1])
    own = [
        t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)
    ]  # plain attributes, e.g. of old weight norm
    memo: dict[int, Any] = {id(t): usable(t) for t in (*model.parameters(), *model.buffers(), *own)}
    try:
        shadow = copy.deepcopy(model, memo)
    except Exception as e:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({first_line(e)}); pass an ExportedProgram: torch.export.export(model, args)"
        ) from e
    unwrapped_inside(shadow)
    if not isinstance(shadow, fx.GraphModule):
        shadow, known = recognise(shadow)
        notes.extend(known)
        shadow.eval()
    return shadow, tuple(notes), without_cache(shadow)


def cache_notes(shadow: nn.Module, caching: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """What to tell of caches that were switched off: nothing where this call returns none anyway."""
    lost = loses_cache(shadow, caching, Call(args, kwargs))
    return ("use_cache was switched off: the optimized model returns no past_key_values",) if lost else ()


def usable(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy of one that was made under inference mode, which can be no parameter outside of it."""
    if not tensor.is_inference():
        return tensor
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, notes: tuple[str, ...]
) -> Captured:
    try:
        with torch.random.fork_rng(devices=[]):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except NormfuseError:  # one of ours captured again, with inputs that it refuses
        raise
    except Exception as e:
        raise CaptureError(explained(type(model).__name__, e, args, kwargs)) from e
    names = [*list(inspect.signature(model.forward).parameters)[: len(args)], *kwargs]
    asked = dict(free_sizes(dynamic_shapes, dict(zip(names, (*args, *kwargs.values()), strict=False))))
    gm = canonical_module(program, stated_minima(asked))
    values = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    inputs = list(zip(guarded_inputs(gm), values, strict=False))
    return Captured(gm, args, kwargs, True, dynamic_shapes, notes + fixed_after_all(asked, inputs))


def _told_apart(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with storages of their own: one tensor for two inputs, or a weight as an input, would be taken for one value."""
    seen = {_storage(t) for t in (*model.parameters(), *model.buffers())}

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        storage = _storage(value)
        if storage not in seen and not value.is_inference():
            seen.add(storage)
            return value
        return value.detach().clone()

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(own, (args, kwargs))
    return found


def _storage(tensor: Tensor) -> int:
    """What two views of one storage share; empty tensors share nothing."""
    plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
    return (tensor.untyped_storage().data_ptr() if plain else 0) or id(tensor)


def _any_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Batch size free, and the length of token sequences, wherever the model allows it."""

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return None
        dims = 2 if value.ndim == 2 and not value.is_floating_point() else 1
        return dict.fromkeys(range(dims), Dim.AUTO)

    return {k: free(v) for k, v in kwargs.items()} if kwargs else tuple(free(v) for v in args)


def _trace(model: nn.Module, notes: tuple[str, ...]) -> Captured:
    from normfuse.capture.symbolic.symbolic import symbolic

    gm = symbolic(model)
    write = next((n for n in gm.graph.nodes if is_write(n) or (n.op == "call_method" and str(n.target).endswith("_"))), None)
    if write is not None:
        raise CaptureError(
            f"{type(model).__name__} writes in place ({write.name}), and without shapes nobody knows who reads that; "
            "pass example_inputs"
        )
    set_guards(gm, guards_of_signature(type(model).forward))
    return Captured(gm, has_inputs=False, kwargs={}, notes=notes)


def _exported_program(program: ExportedProgram, given: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Captured:
    args, kwargs = given or program.example_inputs or ((), {})
    return Captured(canonical_module(program), tuple(args), dict(kwargs), bool(args or kwargs), program_shapes(program), ())


def program_shapes(program: ExportedProgram) -> Any:
    """What varies in the inputs of a program, as `dynamic_shapes`; None when every size is fixed."""
    placeholders = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    inputs = [placeholders.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    free = [
        {i: Dim.AUTO for i, d in enumerate(v.shape) if not isinstance(d, int)} or None if isinstance(v, Tensor) else None
        for v in inputs
    ]
    if not any(free) or program.call_spec.in_spec is None:
        return None
    args, kwargs = pytree.tree_unflatten(free, program.call_spec.in_spec)
    return (*args, *kwargs.values()) if args else dict(kwargs)


def _canonical(gm: fx.GraphModule) -> Captured | None:
    """A GraphModule that is canonical already (our own result, or `ExportedProgram.module()`), as it is."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    plain = all(
        (n.op == "call_function" and (isinstance(n.target, torch._ops.OpOverload) or n.target.__module__ == "_operator"))
        or n.target == "_guards_fn"
        for n in calls
    )
    left = record(gm)
    if not (plain or isinstance(gm, OptimizedGraph)):  # a graph of modules that `fold` returned carries a report too
        return None
    graph = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    graph.meta = dict(gm.meta)
    for old, new in zip(gm.graph.nodes, graph.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    without_guard_calls(graph)
    if writes(graph):
        return None
    if left is None:
        set_guards(graph, guards_of(graph, getattr(gm, "range_constraints", None)))
        return Captured(graph, has_inputs=False, kwargs={})
    return Captured(graph, left.args, left.kwargs, left.has_inputs, left.dynamic_shapes, ())
