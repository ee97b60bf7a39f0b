"""LayerNorm Scaling: the pre-norms of block ℓ are multiplied by 1/√ℓ.

    x ← x + f( N(x) / √ℓ ),   ℓ = 1, 2, …

Checkpoints trained that way hold the factor nowhere: loaded into a stock model they are silently wrong without this pass.
Source: Sun et al., The Curse of Depth in Large Language Models, NeurIPS 2025.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import is_cast
from normfuse.ir.passes import Change, Pass, Rewriting
from normfuse.ir.views import Add, Affine, Div, LayerNorm, Mul, RmsNorm, Value
from normfuse.passes.affine.broadcast import axes
from normfuse.passes.streams.pre_norms import blocks, norms, stacks, steps
from normfuse.reports.model import Site

__all__ = ["DepthScale"]

RULE = "scale_by_depth"

_NONE = (
    "only Pre-LN and Pre-RMSNorm models can be scaled; run recognise first if norms are written by hand, or name them with where="
)

Where = Mapping[str, int] | Callable[[str], "int | None"]


@dataclass(frozen=True)
class DepthScale(Pass):
    """N(x) → N(x) / √ℓ for every pre-norm of block ℓ; the final norm stays. The factor then folds like any gain.

    Comes before `affine`, which moves a β out of its norm. Encoder and decoder count their blocks separately.

    Args:
        base: ℓ of the first block; 1 in the paper.
        where: ℓ by module path of a norm, or of a module around pre-norms (the longest path that fits counts); or a function
            from the path of a norm to ℓ or None. Norms that it does not name stay. None finds the blocks in the graph.

    Raises:
        UsageError: `base` or an ℓ of `where` is below 1, or a path of `where` is no norm of the model.
    """

    name = "depth_scale"
    precedes = "huge_eps"
    changes = "multiplies the output of every pre-norm in block ℓ by 1/√ℓ"

    base: int = 1
    where: Where | None = None

    def __post_init__(self) -> None:
        _depth(self.base, "base")

    def rewrite(self, work: Rewriting) -> None:
        for norm, depth in self._depths(work.graph, work.refused).items():
            work.attempt(RULE, norm, partial(_scaled, work.graph, norm, depth))

    def _depths(self, graph: Graph, refused: list[Site]) -> dict[fx.Node, int]:
        """ℓ of every norm that is to be scaled, in graph order; what cannot be told goes to `refused`."""
        if self.where is not None:
            return _given(graph, self.where)
        try:
            found = stacks(graph)
        except Refuse as refusal:
            refused.append(
                Site(RULE, "" if refusal.blocker is None else graph.path(refusal.blocker), refusal.reason, "", refusal.remedy)
            )
            return {}
        depths: dict[fx.Node, int] = {}
        for stack in found:
            try:
                depths.update({n: self.base + i for n, i in blocks(graph, stack).items()})
            except Refuse as refusal:
                refused.append(graph.site(RULE, stack[0].norms[0], refusal))
        if not found:
            reason = "no pre-norm found: no LayerNorm or RMSNorm whose result is added to the stream that it reads"
            refused.append(Site(RULE, "", reason, remedy=_NONE))
        return {n: depths[n] for n in graph if n in depths}


def _scaled(graph: Graph, norm: fx.Node, depth: int) -> Change:
    """N(x) → (1/√ℓ) N(x), behind γ and β."""
    factor = 1 / math.sqrt(depth)
    last = _last(graph, norm)
    if depth > 1 and _carries_already(graph, last, factor):
        raise Refuse(f"its result is multiplied by 1/√{depth} already")

    def scale() -> None:
        if depth > 1:
            one = torch.ones(1, dtype=torch.float64)
            s, t = (Constant.of(v).cast(_dtype(graph, norm)) for v in (one * factor, one * 0.0))
            readers = list(last.users)
            new = graph.emit(Affine(Value(node=last), s, t), last.next, last)
            for reader in readers:
                reader.replace_input_with(last, new)

    return Change(note=f"ℓ = {depth}: × {factor:.6g}", do=scale)


def _last(graph: Graph, norm: fx.Node) -> fx.Node:
    """The norm with its γ and β: itself, or the arithmetic behind it that they are where it is exposed or written by hand."""
    op = graph.view(norm, 1)
    last, shifted = norm, isinstance(op, RmsNorm) or op.beta is not None  # type: ignore[attr-defined]
    while len(last.users) == 1:
        user = next(iter(last.users))
        of_norm = isinstance(user.meta.get("origin"), (LayerNorm, RmsNorm))
        shifts = _shifts(graph, user, of_norm) if of_norm or graph.path(user) == graph.path(norm) else None
        if shifts is None:
            break
        last, shifted = user, shifted or shifts
    if not shifted and isinstance(graph.owned(f"{graph.path(norm)}.bias"), Tensor):
        raise Refuse("its β has been moved away already and would not be scaled", remedy="put depth_scale before affine")
    return last


def _shifts(graph: Graph, node: fx.Node, of_norm: bool) -> bool | None:
    """Does the node add a β? None where it is neither a gain or shift by a vector of constants nor a cast."""
    match graph.view(node, 2):
        case Mul(Value(), Constant() as c) | Mul(Constant() as c, Value()) if axes(c):
            return False
        case Add(Value(), Constant() as c) | Add(Constant() as c, Value()) if axes(c):
            return True
        case Affine(_, s, t) if of_norm or axes(s, t):
            return of_norm or bool(axes(t))
        case _:
            return False if is_cast(node) else None


def _carries_already(graph: Graph, node: fx.Node, factor: float) -> bool:
    if len(node.users) != 1:
        return False
    match graph.view(next(iter(node.users)), 2):
        case Mul(Value(), Constant() | float() as c) | Mul(Constant() | float() as c, Value()):
            found = _number(c)
        case Div(Value(), Constant() | float() as c):
            found = _number(c)
            found = 1 / found if found else None
        case Affine(_, s):
            found = _number(s)
        case _:
            return False
    return found is not None and math.isclose(found, factor, rel_tol=1e-3)


def _number(c: Constant | float) -> float | None:
    if not isinstance(c, Constant):
        return float(c)
    return None if axes(c) or not c.numel else float(c.value.reshape(-1)[0])


def _dtype(graph: Graph, norm: fx.Node) -> torch.dtype:
    val = norm.meta.get("val")
    gamma = getattr(graph.view(norm, 1), "gamma", None)
    if isinstance(val, Tensor):
        return val.dtype
    return gamma.dtype if isinstance(gamma, Constant) else torch.get_default_dtype()


# -- where= ------------------------------------------------------------------------------------------------------------


def _given(graph: Graph, where: Where) -> dict[fx.Node, int]:
    paths = {n: graph.path(n) for n in norms(graph)}
    if not isinstance(where, Mapping):
        asked = {n: where(p) for n, p in paths.items()}
        return {n: _depth(d, f"where({paths[n]!r})") for n, d in asked.items() if d is not None}
    _known(where, list(paths.values()))
    inner = {n for step in steps(graph) for n in step.norms}
    found: dict[fx.Node, int] = {}
    for node, path in paths.items():
        fits = [k for k in where if k == path or (node in inner and path.startswith(f"{k}."))]
        if fits:
            key = max(fits, key=len)
            found[node] = _depth(where[key], f"where[{key!r}]")
    return found


def _known(where: Mapping[str, int], paths: list[str]) -> None:
    for key in where:
        if not any(p == key or p.startswith(f"{key}.") for p in paths):
            near = difflib.get_close_matches(key, paths, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"where: {key!r} is no LayerNorm or RMSNorm of the model and contains none{hint} (norms: {_some(paths)})"
            )


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:6]) + (", …" if len(paths) > 6 else "") if paths else "none"


def _depth(value: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{what} = {value!r}: expected a whole number from 1 on, because the factor is 1/√ℓ")
    return value
