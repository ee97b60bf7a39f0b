"""Any model becomes one canonical graph: undecomposed ATen calls, parameters as constants, nothing written in place."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.declared_inputs import declared_inputs
from normfuse.errors import CaptureError, UsageError
from normfuse.importers import recognise
from normfuse.original import Call, without_cache
from normfuse.record import record
from normfuse.regions import inline_without_autocast

__all__ = ["Captured", "arguments", "calls_of", "capture", "flat_inputs"]

log = logging.getLogger(__name__)

aten = torch.ops.aten


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

    Raises:
        CaptureError: the model cannot be traced; the message names the cause and what to try.
        UsageError: `model` or `example_inputs` is not of a kind that can be captured.
    """
    given = None if example_inputs is None else arguments(example_inputs)
    if isinstance(model, ExportedProgram):
        return _exported_program(model, given)
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, a GraphModule or an ExportedProgram, got {type(model).__name__}")
    if isinstance(model, fx.GraphModule) and given is None:
        known = _canonical(model)
        if known is not None:
            return known
    shadow, notes = _shadow(model)
    if given is not None:
        return _export(shadow, *given, dynamic_shapes, notes)
    declared = declared_inputs(shadow)
    if declared is None:
        return _trace(shadow, notes)
    declared[1].pop("use_cache", None)  # said by the shadow's configuration; an input would become part of the signature
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
        _, keyword = spec.children()
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


def _shadow(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of the modules in eval mode that shares every tensor with the original."""
    notes: list[str] = []
    if any(m.training for m in model.modules()) and not isinstance(model, fx.GraphModule):
        notes.append("the model was in training mode; it was optimized as in eval()")
        log.warning("%s", notes[-1])
    own = [
        t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)
    ]  # plain attributes, e.g. of old weight norm
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers(), *own)}
    try:
        shadow = copy.deepcopy(model, memo)
    except Exception as e:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({_first_line(e)}); pass an ExportedProgram: torch.export.export(model, args)"
        ) from e
    if not isinstance(shadow, fx.GraphModule):
        shadow, known = recognise(shadow)
        notes.extend(known)
        shadow.eval()
    if without_cache(shadow):
        notes.append("use_cache was switched off: the optimized model returns no past_key_values")
    return shadow, tuple(notes)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, notes: tuple[str, ...]
) -> Captured:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as e:
        raise CaptureError(_why(model, e, args, kwargs)) from e
    return Captured(_canonical_module(program), args, kwargs, True, dynamic_shapes, notes)


def _why(model: nn.Module, e: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shapes = ", ".join(_describe(v) for v in pytree.tree_leaves((args, kwargs)))
    name = type(model).__name__
    return f"{name} could not be captured with inputs ({shapes}): {type(e).__name__}: {_first_line(e)}"


def _describe(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _first_line(e: Exception) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


def _any_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Batch size free, and the length of token sequences, wherever the model allows it."""

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return None
        dims = 2 if value.ndim == 2 and not value.is_floating_point() else 1
        return dict.fromkeys(range(dims), Dim.AUTO)

    return {k: free(v) for k, v in kwargs.items()} if kwargs else tuple(free(v) for v in args)


def _trace(model: nn.Module, notes: tuple[str, ...]) -> Captured:
    from normfuse.symbolic import symbolic

    gm = symbolic(model)
    write = next((n for n in gm.graph.nodes if _is_write(n) or (n.op == "call_method" and str(n.target).endswith("_"))), None)
    if write is not None:
        raise CaptureError(
            f"{type(model).__name__} writes in place ({write.name}), and without shapes nobody knows who reads that; "
            "pass example_inputs"
        )
    return Captured(gm, has_inputs=False, kwargs={}, notes=notes)


def _exported_program(program: ExportedProgram, given: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Captured:
    args, kwargs = given or program.example_inputs or ((), {})
    return Captured(_canonical_module(program), tuple(args), dict(kwargs), bool(args or kwargs), _program_shapes(program), ())


def _program_shapes(program: ExportedProgram) -> Any:
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
    if not plain and left is None:
        return None
    graph = copy.copy(gm)
    graph.graph = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, graph.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    _drop_guards(graph)
    if _writes(graph):
        return None
    if left is None:
        return Captured(graph, has_inputs=False, kwargs={})
    return Captured(graph, left.args, left.kwargs, left.has_inputs, left.dynamic_shapes, ())


# -- canonical form ----------------------------------------------------------------------------------------------------


def _canonical_module(program: ExportedProgram) -> fx.GraphModule:
    gm = _module(program)
    inline_without_autocast(gm)
    if _writes(gm) and not _writes_are_local(gm):
        # views of one tensor may be written through another: only functionalization gets that right
        gm = _module(program.run_decompositions({}))
        inline_without_autocast(gm)
        _restore_batch_norm(gm)
    for node in list(gm.graph.nodes):
        if node.target is aten.rms_norm.default and (len(node.args) < 4 or node.args[3] is None) and node.kwargs.get("eps") is None:
            val = node.meta.get("val")
            dtype = val.dtype if isinstance(val, Tensor) else torch.float32
            args = (*node.args, *[None] * (3 - len(node.args)))[:3]
            node.args, node.kwargs = (*args[:2], node.kwargs.get("weight", args[2]), torch.finfo(dtype).eps), {}
    written = [str(n.args[0].target) for n in gm.graph.nodes if n.target is aten.copy_.default and n.args[0].op == "get_attr"]
    if written:
        raise CaptureError(
            f"the model writes to its buffer {written[0]} in eval mode, so that it is not a constant; "
            "make the buffer an input and an output"
        )
    gm.graph.lint()
    gm.recompile()
    return gm


def _module(program: ExportedProgram) -> fx.GraphModule:
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    _drop_guards(gm)
    return gm


def _drop_guards(gm: fx.GraphModule) -> None:
    """The guards check sizes against the example; the optimized model takes what the operators take."""
    for node in gm.graph.find_nodes(op="call_module", target="_guards_fn"):
        gm.graph.erase_node(node)


def _writes(gm: fx.GraphModule) -> bool:
    return any(_is_write(n) for n in gm.graph.nodes)


def _is_write(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target is not aten.batch_norm.default


def _writes_are_local(gm: fx.GraphModule) -> bool:
    """Replace f_(x) by f(x) where x is fresh (no view, no input) and nobody else reads it; False if one is left."""
    for node in gm.graph.nodes:
        if not _is_write(node):
            continue
        target: Any = node.target
        x = node.args[0] if node.args else None
        twin = getattr(getattr(aten, target._schema.name.split("::")[1].rstrip("_"), None), target._overloadname, None)
        if not isinstance(x, fx.Node) or twin is None or not _fresh(x) or len(x.users) != 1:
            return False
        node.target = twin
    return True


def _fresh(x: fx.Node) -> bool:
    """Does the node own its memory? True for operators that return no alias of an input."""
    target = x.target
    if x.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    view = any(r.alias_info is not None for r in target._schema.returns)
    return not view and target not in (
        aten.dropout.default,
        aten.contiguous.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.to.dtype,
    )


def _restore_batch_norm(gm: fx.GraphModule) -> None:
    """Functionalization spells batch_norm in eval as another operator with three results; this is its canonical name."""
    for node in list(gm.graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                with gm.graph.inserting_before(user):
                    new = gm.graph.call_function(aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False))
                new.meta = dict(user.meta)
                user.replace_all_uses_with(new)
                gm.graph.erase_node(user)
        if not node.users:
            gm.graph.erase_node(node)
