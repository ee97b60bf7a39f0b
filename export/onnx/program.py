"""A module and its inputs as an exported program with flat, named tensors on both sides."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from normfuse.capture.explained import IN_PARTS
from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.precision.recast import changes_for, computes_in, in_other_dtypes, is_quantized_graph, recast
from normfuse.export.onnx.writer.dims import axis_names, exportable
from normfuse.export.targets import Target
from normfuse.ir.trees import children, named_leaves
from normfuse.reports.record import record

__all__ = ["Program", "program"]


@dataclass(frozen=True)
class Program:
    """An exported program, and how a call of the module maps to it.

    Attributes:
        exported: its outputs are the tensors among the module's outputs, flat, in order.
        module: the module itself, the reference.
        args, kwargs: example inputs.
        inputs: names of the tensor inputs, in order; those that the model does not read are among them.
        outputs: names of the tensor outputs, in order.
        axes: readable name of each symbolic size, by symbol.
        notes: outputs that are no tensors and were left out.
        dtype: what the products of the module compute in, as it was given.
        given: the same program of the module as it was given, where `module` is a copy in other dtypes.
    """

    exported: torch.export.ExportedProgram
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: dict[str, str]
    notes: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    given: Program | None = None

    def flat_inputs(self) -> tuple[Any, ...]:
        """Leaves of the example inputs in the order of the program, those that are no tensors included."""
        return tuple(_flat_inputs(self.exported, self.args, self.kwargs))

    def feeds(self, flat: Sequence[Any]) -> dict[str, Tensor]:
        """Graph inputs for the leaves `flat`."""
        return dict(zip(self.inputs, (leaf for leaf in flat if isinstance(leaf, Tensor)), strict=True))

    def reference(self, flat: Sequence[Any], *, rounding: float = 0.0) -> list[Tensor]:
        """Tensor outputs of the module on copies of `flat`; with all its floats changed by up to `rounding`, relatively."""
        with _disable_current_modes():  # a mode would give the copies another dtype, and the module checks those of its inputs
            own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in flat]  # a model may write to its inputs
        args, kwargs = pytree.tree_unflatten(own, self.exported.call_spec.in_spec)
        with torch.no_grad():
            if rounding:
                state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
                shaken = {k: _shaken(v, rounding) for k, v in state.items() if v.is_floating_point()}
                out = torch.func.functional_call(self.module, shaken, args, kwargs)
            else:
                out = self.module(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def _shaken(t: Tensor, by: float) -> Tensor:
    return t * (1 + by * (2 * torch.rand_like(t) - 1))


def program(
    module: nn.Module,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    *,
    dtype: str | None = None,
    target: Target | None = None,
) -> Program:
    """Capture `module` for export; what is not given comes from the record that `normfuse.optimize` left.

    Args:
        dtype: what the file is to compute in, a name of `normfuse.export.onnx.precision.spelling`; None for the nearest that the
            target takes.
        target: what the file is for; without one the program stays in the dtypes of the module.

    Raises:
        UsageError: there are no example inputs, or they do not fit.
        ExportError: the module does not run on them, has no tensor output, or cannot be captured.
    """
    args, kwargs, dynamic_shapes = _inputs(module, example_inputs, dynamic_shapes)
    if module.training and not isinstance(module, fx.GraphModule):  # the flag of a captured graph means nothing
        raise UsageError(
            f"{type(module).__name__} is in training mode: call .eval() on it, or export what normfuse.optimize returns"
        )
    graph_module = module if isinstance(module, fx.GraphModule) else _captured(module, args, kwargs, dynamic_shapes).module()
    if not isinstance(graph_module, fx.GraphModule):
        raise ExportError(f"cannot export {type(module).__name__}: torch.export did not return a graph")
    leaves = _outputs(module, args, kwargs)
    native = computes_in(graph_module, (args, kwargs))
    changes = {} if target is None else changes_for(native, dtype, target, quantized=is_quantized_graph(graph_module))
    given = (module, args, kwargs)
    if changes and _holds(graph_module, (args, kwargs), changes):
        graph_module = recast(graph_module, changes)
        module, (args, kwargs) = graph_module, in_other_dtypes((args, kwargs), changes)
    keep = [i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not keep:
        raise ExportError("the model returns no tensor; an ONNX file needs at least one")
    exported = _captured(_flat(graph_module, keep), args, kwargs, dynamic_shapes)
    inputs = tuple(
        spec.arg.name
        for spec, leaf in zip(_user_inputs(exported), _flat_inputs(exported, args, kwargs), strict=True)
        if isinstance(leaf, Tensor)
    )
    if not inputs:
        raise ExportError("the model takes no tensor; an ONNX file of it would be a constant")
    names = _output_names([".".join(path) for path, _ in leaves], keep, taken=set(inputs))
    dropped = [".".join(path) or "output" for i, (path, _) in enumerate(leaves) if i not in keep]
    notes = (f"outputs that are no tensors were left out: {', '.join(dropped)}",) if dropped else ()
    axes = axis_names(exported, args, kwargs, dynamic_shapes, inspect.signature(graph_module.forward))
    found = Program(exported, module, args, kwargs, inputs, names, axes, notes, native)
    if module is given[0]:
        return found
    return dataclasses.replace(found, given=dataclasses.replace(found, module=given[0], args=given[1], kwargs=given[2]))


def _holds(gm: fx.GraphModule, inputs: Any, changes: Mapping[torch.dtype, torch.dtype]) -> bool:
    """Any value, weight or input is of a dtype that changes."""
    values = (leaf for node in gm.graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val")))
    held = [*gm.parameters(), *gm.buffers(), *pytree.tree_leaves(inputs), *values]
    return any(isinstance(t, Tensor) and t.dtype in changes for t in held)


def _inputs(module: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    found = record(module)
    if example_inputs is None:
        if found is None or not found.has_inputs:
            raise UsageError(
                "this module was made without example inputs: pass example_inputs=(tensor, ...) or a dict of keyword inputs"
            )
        args, kwargs = found.args, dict(found.kwargs)
    elif isinstance(example_inputs, Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        args, kwargs = tuple(example_inputs), {}
    else:
        raise UsageError(
            f"example_inputs must be a tuple of positional inputs or a dict of keyword inputs, not {type(example_inputs).__name__}"
        )
    if dynamic_shapes is None and found is not None:
        dynamic_shapes = found.dynamic_shapes
    return args, kwargs, dynamic_shapes


def _captured(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(module, args, kwargs, dynamic_shapes=exportable(dynamic_shapes))
    except Exception as e:  # torch.export raises errors of many kinds, none of them ours
        hint = (
            " (a module captured with fixed shapes stays fixed: pass dynamic_shapes to normfuse.optimize)" if dynamic_shapes else ""
        )
        found = record(module)
        parts = IN_PARTS if found is not None and found.report.parts else ""
        raise ExportError(f"torch.export cannot capture the module on these inputs{hint}: {_first_lines(e)}{parts}") from e


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    try:
        own_args, own_kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
        with torch.no_grad():
            return list(named_leaves(module(*own_args, **own_kwargs)))
    except Exception as e:
        raise UsageError(f"the module does not run on the example inputs: {_first_lines(e)}") from e


_EXTREMES = (torch.ops.aten.amin.default, torch.ops.aten.amax.default)  # over all axes: the exporter wants them named


def _flat(gm: fx.GraphModule, keep: Sequence[int]) -> fx.GraphModule:
    """A copy of `gm` that returns the leaves `keep` of its output as a tuple; it shares the parameters."""
    graph = copy.deepcopy(gm.graph)
    output = graph.output_node()
    leaves = pytree.tree_leaves(output.args[0], is_leaf=lambda x: isinstance(x, fx.Node))
    output.args = (tuple(leaves[i] for i in keep),)
    codegen = graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        spec = pytree.tree_structure((0,) * len(keep))
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            # a view depends on strides, which attention has others of when it is traced again; ONNX has none
            node.target = torch.ops.aten.reshape.default
        elif node.target in _EXTREMES and len(node.args) == 1 and "dim" not in node.kwargs:
            value = node.args[0].meta.get("val")
            if isinstance(value, Tensor) and value.ndim:
                node.args = (node.args[0], list(range(value.ndim)))
    graph.eliminate_dead_code()
    return fx.GraphModule(gm, graph)


def _user_inputs(exported: torch.export.ExportedProgram) -> list[Any]:
    return [s for s in exported.graph_signature.input_specs if s.kind == torch.export.graph_signature.InputKind.USER_INPUT]


def _flat_inputs(exported: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    # keyword inputs come in the order of the program, which need not be the order of the call
    names = children(exported.call_spec.in_spec)[1].context if exported.call_spec.in_spec is not None else list(kwargs)
    return pytree.tree_leaves((args, {name: kwargs[name] for name in names}))


def _output_names(paths: list[str], keep: Sequence[int], taken: set[str]) -> tuple[str, ...]:
    """Names after the place of each tensor: `logits`, `past_key_values.0.0`, `output_1`; unique, also among the inputs."""
    names: list[str] = []
    for i in keep:
        label = paths[i] or "output"
        if label[0].isdigit():
            label = f"output_{label}"
        name, n = label, 1
        while name in taken:
            name, n = f"{label}_out{n if n > 1 else ''}", n + 1
        taken.add(name)
        names.append(name)
    return tuple(names)


def _first_lines(e: BaseException, lines: int = 3) -> str:
    text = [line.strip() for line in str(e).splitlines() if line.strip()]
    return " ".join(text[:lines]) or type(e).__name__
