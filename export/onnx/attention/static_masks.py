"""Attention masks that are known before the model runs.

Hugging Face models build a boolean mask from positions on every call, and for most calls it hides nothing, or just the
future. A mask that provably does so for every size becomes no mask, or `is_causal`.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from normfuse.export.onnx.attention.index_algebra import Affine, AtLeastZero, Indexed, index_values

__all__ = ["simplify_masks"]

log = logging.getLogger(__name__)

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_AND = (torch.ops.aten.__and__.Tensor, torch.ops.aten.bitwise_and.Tensor, torch.ops.aten.logical_and.default)


def simplify_masks(exported: torch.export.ExportedProgram) -> int:
    """Drop masks that hide nothing and turn lower triangles into `is_causal`, in place; returns the number of sites.

    A mask `all_true & m` becomes m, and one that is expanded over queries or the batch becomes what it was expanded from.
    """
    graph = exported.graph_module.graph
    sites = [n for n in graph.nodes if n.target is _SDPA and _mask(n) is not None]
    if not sites:
        return 0
    signature = exported.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    tensors = {**exported.state_dict, **exported.constants}
    known = index_values(graph, lambda name: tensors.get(names.get(name, name)))
    changed = 0
    for site in sites:
        mask = _mask(site)
        if mask is None or mask.meta["val"].dtype != torch.bool:
            continue
        found = known.get(mask)
        if isinstance(found, Affine) and found.fixed and found.constant:
            _set(site, None, causal=_flag(site))
        elif _is_lower_triangle(found) and not _flag(site):
            _set(site, None, causal=True)
        else:
            plain = _without_all_true(mask, known)
            if plain is mask:
                continue
            _set(site, plain, causal=_flag(site))
        changed += 1
        log.debug("%s: mask %s simplified", site.name, mask.name)
    if changed:
        graph.eliminate_dead_code()
        exported.graph_module.recompile()
    return changed


def _is_lower_triangle(value: Indexed | None) -> bool:
    """Key j is seen by query i when i − j ≥ 0."""
    if not isinstance(value, AtLeastZero) or len(value.form.coefficients) < 2 or value.form.constant:
        return False
    *rest, query, key = value.form.coefficients
    return (query, key) == (1, -1) and not any(rest)


def _without_all_true(mask: fx.Node, known: dict[fx.Node, Indexed]) -> fx.Node:
    """`mask` without expansion and without conjunction with what is always true; attention broadcasts it itself."""
    node = mask
    while True:
        inner = None
        if node.target is torch.ops.aten.expand.default:
            inner = node.args[0]
        elif node.target in _AND:
            for one, other in (node.args[:2], node.args[1::-1]):
                value = known.get(one) if isinstance(one, fx.Node) else None
                if isinstance(value, Affine) and value.fixed and value.constant:
                    inner = other
        if not isinstance(inner, fx.Node) or inner.meta["val"].dtype != torch.bool or inner.meta["val"].ndim < 2:
            return node
        node = inner


def _mask(site: fx.Node) -> fx.Node | None:
    mask = site.args[3] if len(site.args) > 3 else site.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _flag(site: fx.Node) -> bool:
    return bool(site.args[5] if len(site.args) > 5 else site.kwargs.get("is_causal", False))


def _set(site: fx.Node, mask: fx.Node | None, *, causal: bool) -> None:
    dropout = site.args[4] if len(site.args) > 4 else site.kwargs.get("dropout_p", 0.0)
    kwargs = {k: v for k, v in site.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    site.args = (*site.args[:3], mask, dropout, causal)
    site.kwargs = kwargs
