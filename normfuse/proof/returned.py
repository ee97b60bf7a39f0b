"""The module that is returned, called as the user will call it: its structure, its dtypes and whose memory its outputs are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.errors import RewriteError
from normfuse.given.original import Call, Returned, run

__all__ = ["settle"]

aten = torch.ops.aten


def settle(gm: fx.GraphModule, call: Call, model: Returned) -> tuple[str, ...]:
    """Hold a call of `gm` against the same call of the model; outputs that newly share memory are cloned.

    Args:
        gm: the result; changed in place where an output needs memory of its own.
        call: the example inputs.
        model: what the model did with them.

    Returns:
        Notes for the user: outputs that no longer share memory with an input.

    Raises:
        RewriteError: the result does not run, or returns another structure, other shapes or dtypes.
    """
    found = _called(gm, call)
    shared = [i for i, (a, b) in enumerate(zip(model.origins, found.origins, strict=False)) if b and a != b]
    if shared and len(model.origins) == len(found.origins):
        _clone(gm, shared)
        found = _called(gm, call)
    if found.structure != model.structure:
        raise RewriteError(f"the optimized module returns {found.structure}, the model {model.structure}")
    if (mine := _kinds(found.outputs)) != (theirs := _kinds(model.outputs)):
        raise RewriteError(f"the optimized module returns {mine}, the model {theirs}")
    lost = [
        f"output {i} is memory of its own; in the model it is that of {a}"
        for i, (a, b) in enumerate(zip(model.origins, found.origins, strict=True))
        if a.startswith("input") and a != b
    ]
    return tuple(lost)


def _called(gm: fx.GraphModule, call: Call) -> Returned:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return run(gm, call.copied(), [*gm.parameters(), *gm.buffers()])
    except Exception as e:
        raise RewriteError(f"the optimized module does not run on the example inputs: {type(e).__name__}: {e}") from e


def _clone(gm: fx.GraphModule, which: Sequence[int]) -> None:
    """Give the tensors at these places of the output memory of their own."""
    output = gm.graph.output_node()
    leaves, spec = pytree.tree_flatten(output.args[0])
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and _is_tensor(leaf)]
    with gm.graph.inserting_before(output):
        for i in which:
            node = leaves[tensors[i]]
            leaves[tensors[i]] = clone = gm.graph.call_function(aten.clone.default, (node,))
            clone.meta = dict(node.meta)
    output.args = (pytree.tree_unflatten(leaves, spec),)
    gm.recompile()


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _kinds(outputs: Sequence[Tensor]) -> list[str]:
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in outputs]
