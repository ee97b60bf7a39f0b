"""An exported program as the canonical graph: undecomposed ATen calls, nothing in place, no regions, names that can be read."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from normfuse.capture.observers import without_idle_observers
from normfuse.capture.regions import inline_regions, name_operands
from normfuse.capture.writes import secret_views, without_writes, writes
from normfuse.described import first_line
from normfuse.errors import CaptureError
from normfuse.ir.attribute_names import readable
from normfuse.ir.dtypes import default_eps
from normfuse.ir.guards import guards_of, set_guards

__all__ = ["canonical_module", "without_guard_calls"]

aten = torch.ops.aten


def canonical_module(program: ExportedProgram, smallest: Mapping[str, int] | None = None) -> fx.GraphModule:
    """The canonical graph of a program, which is not changed; its guards are in its meta.

    Args:
        program: from `torch.export.export`, in the training form.
        smallest: limits of free sizes from below that the caller has stated, by `x.shape[1]`.

    Raises:
        CaptureError: the model writes to its own buffers.
    """
    program = readable(program)
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    guards = guards_of(gm, program.range_constraints, getattr(program, "_guards_code", ()), smallest)
    gm = _plain(gm)
    without_idle_observers(gm)
    if writes(gm) and not without_writes(gm):
        # views of one tensor may be written through another: only functionalization gets that right
        try:
            decomposed = program.run_decompositions(secret_views(gm)).module()
        except Exception as e:
            raise CaptureError(
                f"the model writes to tensors in a way that torch cannot undo ({type(e).__name__}: {first_line(e)}); "
                "a function that it keeps as an attribute may hold modules of another model, which are in training mode"
            ) from e
        assert isinstance(decomposed, fx.GraphModule)
        gm = _plain(decomposed)
        _restore_batch_norm(gm)
    _state_epsilon(gm)
    written = [str(n.args[0].target) for n in gm.graph.nodes if n.target is aten.copy_.default and n.args[0].op == "get_attr"]
    if written:
        raise CaptureError(
            f"the model writes to its buffer {written[0]} in eval mode, so that it is not a constant; "
            "make the buffer an input and an output"
        )
    gm.graph.lint()
    gm.recompile()
    set_guards(gm, guards)
    return gm


def without_guard_calls(gm: fx.GraphModule) -> None:
    """torch's own checks go, in place: they are in `Guards`, in the user's words."""
    for node in gm.graph.find_nodes(op="call_module", target="_guards_fn"):
        gm.graph.erase_node(node)


def _plain(gm: fx.GraphModule) -> fx.GraphModule:
    without_guard_calls(gm)
    inline_regions(gm)
    name_operands(gm)
    return gm


def _state_epsilon(gm: fx.GraphModule) -> None:
    """rms_norm without an epsilon takes that of the dtype it computes in."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        x, shape, weight, eps = _bound(node)
        if eps is not None:
            continue
        val = x.meta.get("val")
        node.args, node.kwargs = (x, shape, weight, default_eps(val.dtype if isinstance(val, Tensor) else torch.float32)), {}


def _bound(node: fx.Node) -> list[Any]:
    names = ("input", "normalized_shape", "weight", "eps")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


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
