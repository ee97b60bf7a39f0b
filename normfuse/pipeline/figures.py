"""Figures of a report: norms by kind, sizes, and which refusals of a pass that runs twice stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

from normfuse.ir.census import placed
from normfuse.ir.graph import Graph
from normfuse.ir.wording import operator_name
from normfuse.passes import PASSES
from normfuse.reports.model import NormFate, PassReport

__all__ = ["fates", "last_word", "operators", "paired", "recognised", "tensor_sizes"]


def last_word(reports: Sequence[PassReport]) -> list[PassReport]:
    """Of a pass that runs twice, only the last refusals stand: what it refused first may have succeeded since."""
    last = {r.name: i for i, r in enumerate(reports)}
    return [r if last[r.name] == i else replace(r, refused=()) for i, r in enumerate(reports)]


def recognised(graph: Graph) -> Graph:
    """A copy for counting: norms that are written by hand are operators, whether or not the pipeline recognised them."""
    probe = graph.copy()
    PASSES["recognise"](probe)
    return probe


def fates(before: Graph, after: Graph) -> tuple[NormFate, ...]:
    """What became of each norm of `before`: the norm of `after` at the same path, in the order of either; both `recognised`."""
    now: dict[str, list[str]] = {}
    for path, kind in placed(after):
        now.setdefault(path, []).append(kind)
    return tuple(NormFate(path, kind, now[path].pop(0) if now.get(path) else "") for path, kind in placed(before))


def operators(graph: Graph) -> dict[str, int]:
    """Operators by name, the most frequent first."""
    return dict(Counter(operator_name(n) for n in graph if n.op == "call_function" and n.target is not getitem).most_common())


def paired(before: Counter[str], after: Counter[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Both with the kinds of either."""
    kinds = sorted({*before, *after})
    return {k: before[k] for k in kinds}, {k: after[k] for k in kinds}


def tensor_sizes(before: Graph, after: Graph, packed: bool) -> tuple[int, int, int, int]:
    """Values and bytes that two graphs read, as `Report` takes them; `packed`: is the second one quantized?"""

    def of(graph: Graph, size: Callable[[Any], int]) -> int:
        return sum(size(c) for c in graph.constants.values())

    surplus = 0
    if packed:
        from normfuse.passes.quantize.summary import packed_surplus

        surplus = packed_surplus(after)
    return (
        of(before, lambda c: c.numel),
        of(after, lambda c: c.numel) - surplus,
        of(before, lambda c: c.numel * c.dtype.itemsize),
        of(after, lambda c: c.numel * c.dtype.itemsize),
    )
