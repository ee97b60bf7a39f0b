"""Operators of `torch.ops.normfuse` in the place of their arithmetic, for kernels on a GPU: see `normfuse.passes.fuse.kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from normfuse.errors import UsageError, did_you_mean
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Run
from normfuse.passes.fuse.kernels import KERNELS as PASSES
from normfuse.reports.record import record

__all__ = ["KERNELS", "with_kernels"]

#: What can be asked for, in the order in which it is tried. Quantized layers have their operators already.
KERNELS = (*(each.name for each in PASSES), "shiftquant_linear")


def with_kernels(gm: fx.GraphModule, ops: Sequence[str] = KERNELS) -> fx.GraphModule:
    """The same function as `gm`, with operators of `torch.ops.normfuse` where their arithmetic stands.

    Args:
        gm: what `normfuse.optimize` returned from example inputs; it is not changed. In a graph without shapes nothing is found.
        ops: names of `KERNELS`. A norm that one linear layer alone reads goes into `rms_norm_linear` where both are asked for, one
            behind an addition into `add_rms_norm`.

    Returns:
        A module of its own, with the record of `gm`.

    Raises:
        UsageError: there is no such kernel.
    """
    _check(ops)
    graph = Graph.of(gm)
    for check in graph.fx.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.fx.erase_node(check)  # it would count as a reader
    for each in (p for p in PASSES if p.name in ops):
        each(graph, Run())
    made = graph.to_module(type(gm).__name__)
    found = record(gm)
    return made if found is None else found.attach(made)


def _check(ops: Sequence[str]) -> None:
    if isinstance(ops, str):
        raise UsageError(f"ops={ops!r}: expected a list of names, e.g. [{ops!r}]")
    for name in ops:
        if name not in KERNELS:
            hint = did_you_mean(name, KERNELS)
            raise UsageError(f"there is no kernel {name!r}: expected {', '.join(KERNELS)}{hint}")
