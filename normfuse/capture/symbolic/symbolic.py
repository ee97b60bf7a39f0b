"""The front end for a module without example inputs: symbolic tracing, then ATen.

The same form as `torch.export.export(model, args).module()` gives for the model in eval mode, as far as it can be known without
shapes. torch's own wrappers (`nn.Linear`, `F.layer_norm`) are traced through by running their Python bodies, so what is recorded is
what reaches ATen; a wrapper whose body looks at shapes is recorded as it is and lowered by `aten_table`, or stays.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.capture.in_place import functionalise
from normfuse.capture.symbolic.aten_table import WRITES, to_aten
from normfuse.capture.symbolic.rank import propagate_ranks
from normfuse.capture.symbolic.traced_values import isinstance_answered
from normfuse.capture.symbolic.tracer import Tracer
from normfuse.errors import CaptureError
from normfuse.ir.attribute_names import attribute_names
from normfuse.ir.dtypes import propagate_dtypes

__all__ = ["symbolic"]


def symbolic(model: nn.Module) -> fx.GraphModule:
    """The ATen graph of `model` in eval mode, captured without example inputs.

    Parameters and buffers are `get_attr` nodes under their dotted names and the same objects as in `model`, which is not touched.
    An argument of `forward` whose default is None, a bool or a string is fixed to that default, and the graph checks it; other
    arguments stay free. Nodes carry `nn_module_stack` and `stack_trace` as export writes them, no `val`, and `rank` (number of
    dimensions) where the model guarantees it.

    Raises:
        CaptureError: the Python code of the model depends on shapes or values, or draws random numbers; names module and line.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        # torch.fx calls forward of the outermost module itself
        raise CaptureError(
            f"{type(model).__name__} has forward hooks, which tracing without shapes would skip; pass example_inputs"
        )
    root = _private_copy(model)
    # export, too, writes cudnn_enabled=False
    with _random_state_kept() as drawn, torch.backends.cudnn.flags(enabled=False), isinstance_answered():
        tracer, before = Tracer(), _state(root)
        try:
            graph = tracer.trace(root, concrete_args=_fixed_arguments(root))
        except Exception as e:
            raise CaptureError(tracer.explain(e)) from e
    if drawn():
        raise CaptureError(f"{type(model).__name__}.forward draws random numbers in Python while it is traced; pass example_inputs")
    _restore_names(graph, root)
    _refuse_state(graph, root)
    _refuse_changes(root, before)
    propagate_ranks(to_aten(graph), root)
    # again, for what could be lowered once its rank was known
    propagate_ranks(to_aten(graph), root)
    propagate_dtypes(graph, root)
    functionalise(graph, root)
    _refuse_hidden_writes(graph, root)
    return _module(graph, root)


@contextmanager
def _random_state_kept() -> Iterator[Callable[[], bool]]:
    """Restores the random states of Python and torch; the yielded function says, afterwards, whether they had moved."""
    moved = False
    python, cpu = random.getstate(), torch.get_rng_state()
    try:
        yield lambda: moved
    finally:
        moved = random.getstate() != python or not torch.equal(torch.get_rng_state(), cpu)
        random.setstate(python)
        torch.set_rng_state(cpu)


def _private_copy(model: nn.Module) -> nn.Module:
    """`model` in eval mode, copied around its tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
    try:
        root = copy.deepcopy(model, {id(t): t for t in tensors})
    except Exception as e:
        raise CaptureError(f"{type(model).__name__} cannot be copied ({e}), and the original may not be touched") from e
    return root.eval()


def _fixed_arguments(root: nn.Module) -> dict[str, Any]:
    """Arguments of forward that steer Python code rather than carry a value."""
    parameters = inspect.signature(type(root).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, bool | str)}


def _restore_names(graph: fx.Graph, root: nn.Module) -> None:
    """fx renames the arguments that it fixes (`mask_1`); callers pass them by their own names."""
    names = list(inspect.signature(type(root).forward).parameters)[1:]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        if not str(node.target).startswith("*"):
            node.target = name


def _refuse_state(graph: fx.Graph, root: nn.Module) -> None:
    """Parameters and buffers are those of the user's model, which is never written to."""
    for node in graph.nodes:
        if node.target is torch.batch_norm and node.args[5] is True and node.args[3] is not None:
            raise CaptureError(f"{type(root).__name__}.forward updates running statistics in eval mode; pass example_inputs")
        name = str(getattr(node.target, "__name__", node.target))
        written = node.target in WRITES or (name.endswith("_") and not name.endswith("__"))
        if node.op in ("call_function", "call_method") and written and getattr(node.args[0], "op", "") == "get_attr":
            state = node.args[0].target
            raise CaptureError(f"{type(root).__name__}.forward writes to {state!r} in eval mode; pass example_inputs")


def _state(root: nn.Module) -> dict[str, Any]:
    """What a call may not change: tensors by identity, numbers and flags by value."""
    found: dict[str, Any] = {}
    for path, module in root.named_modules():
        tensors = {**module._parameters, **module._buffers}
        own = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "training"}
        found |= {f"{path}.{k}".lstrip("."): v if k in own else id(v) for k, v in {**tensors, **own}.items()}
    return found


def _refuse_changes(root: nn.Module, before: dict[str, Any]) -> None:
    after = _state(root)
    changed = next((name for name, value in before.items() if name not in after or after[name] != value), None)
    if changed is not None:
        raise CaptureError(f"{type(root).__name__}.forward writes to {changed!r} in eval mode; pass example_inputs")


def _refuse_hidden_writes(graph: fx.Graph, root: nn.Module) -> None:
    """Writes that no schema shows: `out=`, lists of tensors (`torch._foreach_add_`), `y += 1` where nobody knows what y is."""
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", ""))
        plain = node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload)
        in_place = plain and (node.target in WRITES or (name.endswith("_") and not name.startswith("_assert")))
        if in_place or node.kwargs.get("out") is not None:
            written = "out=" if node.kwargs.get("out") is not None else name
            raise CaptureError(
                f"{type(root).__name__} writes in place ({written}), and without shapes nobody knows who reads that; "
                "pass example_inputs"
            )


def _module(graph: fx.Graph, root: nn.Module) -> fx.GraphModule:
    """The graph with what it reads, under names that generated code can read."""
    graph = _renumbered(graph)
    held = {str(n.target): n for n in graph.nodes if n.op in ("get_attr", "call_module")}
    names = attribute_names(held)
    found = {names[path]: functools.reduce(getattr, path.split("."), root) for path in held}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = names[str(node.target)]
    gm = fx.GraphModule(found, graph, class_name=type(root).__name__)
    return gm.eval()


def _renumbered(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes are named as export names them: conv2d, conv2d_1, ..."""
    new, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        name = node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else node.name
        args, kwargs = fx.map_arg((node.args, node.kwargs), nodes.__getitem__)
        nodes[node] = new.create_node(node.op, node.target, args, kwargs, name, node.type)
        nodes[node].meta = {key: value for key, value in node.meta.items() if key not in ("is_wrapped", "type")}
    new.lint()
    return new
