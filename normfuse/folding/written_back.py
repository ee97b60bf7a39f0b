"""A rewritten graph, written back into a copy of the modules that it was captured from."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from normfuse.errors import CaptureError
from normfuse.folding.saved_norms import save_as_layer_norm
from normfuse.given.original import with_own_weights
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, identity_of
from normfuse.ir.module_tree import CORES, ModuleTree
from normfuse.ir.views import RmsNorm

__all__ = ["WrittenBack", "write_back"]

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_non_full_backward_hooks",
)  # fmt: skip


@dataclass
class WrittenBack:
    """A copy of a model that holds what a rewritten graph says, as far as modules can.

    Attributes:
        model: the copy, in eval mode.
        values: parameters and buffers that have another value than in the model, by name, exact.
        became: what stands at a module path now, as the rest of a sentence about it.
        left: module paths whose operators the module cannot do without, with the reason; nothing was changed there.
    """

    model: nn.Module
    values: dict[str, Constant] = field(default_factory=dict)
    became: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def exact(self, graph: Graph) -> Graph:
        """The graph, captured from this copy, with the exact values in the place of the rounded ones that the copy holds."""
        names = {identity_of(t): n for n, t in (*self.model.named_parameters(), *self.model.named_buffers())}
        for key, constant in graph.constants.items():
            name = names.get(identity_of(constant.tensor), key) if constant.tensor is not None else key
            if name in self.values:
                graph.constants[key] = self.values[name]
        return graph


def write_back(model: nn.Module, tree: ModuleTree, graph: Graph, paths: Iterable[str]) -> WrittenBack:
    """A copy of `model` with the values of `graph`, and less in the modules at `paths`.

    Args:
        model: as it was given; it is not changed.
        tree: of the model; the constants of the graph have their homes in it.
        graph: rewritten.
        paths: modules of norms and gains that were rewritten.

    Raises:
        CaptureError: the model cannot be copied.
    """
    try:
        found = WrittenBack(with_own_weights(model).eval())
    except Exception as e:
        raise CaptureError(f"{type(model).__name__} cannot be copied ({e})") from e
    own: dict[str, list[fx.Node]] = {}
    for node in graph:
        if node.op == "call_function":
            own.setdefault(graph.path(node), []).append(node)
    _write_values(found, tree.written(graph))
    gains: dict[str, list[str]] = {}
    for name in found.values:
        if name in tree.gains:
            gains.setdefault(tree.gains[name], []).append(name.rpartition(".")[2])
    for path in dict.fromkeys(paths):
        if tree.module(path) is None:  # an operator of the model's own forward: it stays in the code
            continue
        if path in gains:
            found.became[path] = f"{' and '.join(gains[path])} {'is' if len(gains[path]) == 1 else 'are'} one"
            continue
        _lighten(found, tree, path, [graph.view(n, 2) for n in own.get(path, [])])
    return found


def _write_values(found: WrittenBack, values: Mapping[str, Constant]) -> None:
    for name, constant in values.items():
        owner, _, leaf = name.rpartition(".")
        module = found.model.get_submodule(owner)
        old = getattr(module, leaf)
        with torch.no_grad():
            if old is None:
                value = constant.native.detach().clone().contiguous()
                module.register_parameter(leaf, nn.Parameter(value, requires_grad=constant.trained))
            else:
                old.copy_(constant.native)
                if isinstance(old, nn.Parameter):
                    old.requires_grad_(constant.trained)
        found.values[name] = constant


def _lighten(found: WrittenBack, tree: ModuleTree, path: str, rest: list[object]) -> None:
    """Put at `path` what computes the rest of the module's operators and no more."""
    module = found.model.get_submodule(path)
    kind = type(module).__name__
    if not rest:
        children = OrderedDict((n, c) for n, c in module.named_children() if _called(tree, f"{path}.{n}", c))
        order = tree.order([f"{path}.{n}" for n in children])
        if order != sorted(order):
            found.left[path] = f"{kind} calls its parts in another order than it holds them"
            return
        _put(found, tree, path, nn.Sequential(children) if children else nn.Identity())
        left = " and ".join(type(c).__name__ for c in children.values())
        found.became[path] = f"{kind} is {f'its {left}' if left else 'nn.Identity'}"
        return
    cores = [op for op in rest if isinstance(op, CORES)]
    if len(cores) != 1:
        found.left[path] = f"the forward of {kind} does more than what was folded"
        return
    gamma, beta = cores[0].gamma, getattr(cores[0], "beta", None)
    if isinstance(cores[0], RmsNorm) and isinstance(module, nn.LayerNorm):
        new = _rms_norm(module, cores[0])
        if tree.rebuilt(path):
            save_as_layer_norm(new, module)
        _put(found, tree, path, new)
        if gamma is not None:
            found.values[f"{path}.weight"] = gamma
        found.became[path] = f"{kind} is nn.RMSNorm"
    elif gamma is None and beta is None and tree.rebuilt(path):
        found.left[path] = f"it would stay a {kind}, and {tree.rebuilt(path)} is saved with the gain and shift of its norms"
    elif gamma is None and beta is None and (parameters := tree.norm_parameters(path)):
        for name in parameters:
            module.register_parameter(name, None)
        for name in ("elementwise_affine", "affine"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, False)
        found.became[path] = f"{kind} has no gain and shift"


def _called(tree: ModuleTree, path: str, module: nn.Module) -> bool:
    """Does a part of a norm compute something, as far as the graph tells? A dropout does so in training only."""
    return bool(tree.order([path])) or isinstance(module, _DropoutNd)


def _rms_norm(old: nn.LayerNorm, op: RmsNorm) -> nn.RMSNorm:
    like = next((p for p in old.parameters()), None)
    given = {} if like is None else {"device": like.device, "dtype": like.dtype}
    new = nn.RMSNorm(old.normalized_shape, eps=op.eps, elementwise_affine=op.gamma is not None, **given)
    if op.gamma is not None:
        new.weight = nn.Parameter(op.gamma.native.detach().clone().contiguous(), requires_grad=op.gamma.trained)
    return new


def _put(found: WrittenBack, tree: ModuleTree, path: str, new: nn.Module) -> None:
    """In the place of a module, under all of its names, called by whoever hooked it."""
    old = found.model.get_submodule(path)
    for name in _HOOKS:
        if name in vars(old):
            vars(new)[name] = copy.copy(vars(old)[name])
    new.train(old.training)
    module = tree.module(path)
    for name in tree.paths(module) if module is not None else [path]:
        parent, _, leaf = name.rpartition(".")
        setattr(found.model.get_submodule(parent), leaf, new)
