"""Submodules that one call of a model calls more than once: a shared encoder, one head for several scales."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.given.original import Call, with_own_weights
from normfuse.ir.graph import identity_of

__all__ = ["called_often"]


def called_often(model: nn.Module, call: Call) -> dict[str, Call]:
    """The outermost submodules with layers of their own that a call of the model calls more than once, and their first calls.

    Left out are submodules that share a tensor with the rest of the model, and calls with positional and keyword arguments at once.

    Args:
        model: it is copied; hooks see the copy.
        call: what it is called with.
    """
    copied = with_own_weights(model).eval()
    paths = {m: path for path, m in reversed(list(copied.named_modules()))}
    count: Counter[str] = Counter()
    first: dict[str, Call] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = paths[module]
        count[path] += 1
        if path not in first:
            first[path] = Call(*pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    with ExitStack() as stack:
        for module, path in paths.items():
            if path and any(True for _ in module.children()) and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            own = call.copied()
            copied(*own.args, **own.kwargs)
    often = [path for path, n in count.items() if n > 1]
    outermost = [path for path in often if not any(path.startswith(f"{other}.") for other in often)]
    return {path: first[path] for path in outermost if not (first[path].args and first[path].kwargs) and not _shares(copied, path)}


def _shares(model: nn.Module, path: str) -> bool:
    """Is a tensor of the submodule known under a name outside of it?"""
    inside: set[Any] = set()
    outside: set[Any] = set()
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            (inside if name.startswith(f"{path}.") else outside).add(identity_of(tensor))
    return bool(inside & outside)
