"""The blocks of a model before and after, as a report shows them: what each computes, alike ones together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import fx

from normfuse.ir.graph import Graph, path_of
from normfuse.ir.views import Identity, Movement, Permute, Reshape, affine
from normfuse.ir.wording import operator_name
from normfuse.reports.model import Block

__all__ = ["blocks"]

_MOVES = (Identity, Movement, Permute, Reshape)
_MOVE_NAMES = frozenset(
    "unbind split split_with_sizes chunk contiguous clone to detach alias expand sym_size sym_numel sym_stride".split()
)
_REPEATED = re.compile(r"(.*(blocks|layers?|stages?)\d*|h)", re.IGNORECASE)  # names of what holds blocks
_NUMBER = re.compile(r"\d+")
_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
_MOST = 48  # kinds of blocks that a report shows


def blocks(before: Graph, after: Graph) -> tuple[Block, ...]:
    """The model's blocks, in order. Those that compute the same, before and after, stand together, wherever they are.

    Norms that are written out are one operator where the graphs are `recognised`.
    """
    told = [_told(graph) for graph in (before, after)]
    inside = {path.rpartition(".")[0] for operators in told for path, _ in operators}
    holders = {".".join(path.split(".")[: i + 1]) for path in inside for i in range(path.count(".") + 1)}
    was, now = map(_by_block, _in_runs([[(block_of(path, holders), name) for path, name in operators] for operators in told]))
    groups: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for path in dict.fromkeys((*was, *now)):
        alike = _NUMBER.sub("#", path), tuple(was.get(path, ())), tuple(now.get(path, ()))
        groups.setdefault(alike, []).append(path)
    return tuple(Block(tuple(paths), had, has) for (_, had, has), paths in groups.items())[:_MOST]


def _in_runs(told: list[list[tuple[str, str]]]) -> Iterator[list[tuple[str, str]]]:
    """Layers that follow each other outside of numbered blocks, such as a stem, are one block: `conv1 … maxpool`."""
    runs: list[list[str]] = []
    for path in dict.fromkeys(path for operators in told for path, _ in operators):
        if runs and not any(map(_NUMBERED.search, (path, runs[-1][-1]))):
            runs[-1].append(path)
        else:
            runs.append([path])
    named = {path: run[0] if len(run) == 1 else f"{run[0]} … {run[-1]}".strip(" …") for run in runs for path in run}
    for operators in told:
        yield [(named[path], name) for path, name in operators]


def _by_block(operators: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, name in operators:
        found.setdefault(path, []).append(name)
    return found


def _told(graph: Graph) -> list[tuple[str, str]]:
    """Module path and name of each operator."""
    return [(path_of(node), operator_name(node)) for node in _operators(graph)]


def _operators(graph: Graph) -> Iterator[fx.Node]:
    """Operators on the values of the model: not the arithmetic of sizes, of positions and of masks."""
    for node in graph:
        value = node.meta.get("val")
        if not isinstance(node.target, torch._ops.OpOverload) and node.target is not affine:
            continue
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            continue
        name = operator_name(node)
        if name not in _MOVE_NAMES and not name.startswith("_assert") and not isinstance(graph.view(node, 1), _MOVES):
            yield node


def block_of(path: str, holders: Collection[str]) -> str:
    """`blocks.3` for `blocks.3.attn.qkv`, `layers.0.blocks.1` for what is in it, `head` for `head.fc`; empty for the model itself.

    Args:
        path: module path of an operator.
        holders: paths of the modules that hold other modules: only these are blocks.
    """
    if " (" in path:  # an operator at the root, by its line
        return ""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit() and ".".join(parts[: i + 1]) in holders]
    if numbers:
        held = [i for i in numbers if i and _REPEATED.fullmatch(parts[i - 1])]
        last = (held or numbers[:1])[-1]
        while last + 1 in numbers:  # stage and block: `features.3.1`
            last += 1
        return ".".join(parts[: last + 1])
    return "" if len(parts) == 1 and parts[0].isdigit() else parts[0]
