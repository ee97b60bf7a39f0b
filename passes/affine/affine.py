"""Affines move to weights that can absorb them, up into the producer or down into all consumers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import fx

from normfuse.ir.aliases import copy_is_needed
from normfuse.ir.constants import Constant
from normfuse.ir.decode import objection, pieces
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import Affine as AffineOp
from normfuse.ir.views import BatchNorm, GroupNorm, Identity, InstanceNorm, LayerNorm, Mul, Op, RmsNorm, Value
from normfuse.ir.wording import operator_name
from normfuse.passes.affine import into_consumer, into_producer
from normfuse.passes.affine.broadcast import PASS_INPUTS, collapse, is_one, is_zero
from normfuse.passes.affine.shared import check_shared
from normfuse.passes.patterns.known import infer, inherit
from normfuse.passes.patterns.precision import in_range, is_in_range

__all__ = ["Affine", "Plan", "commit", "downward", "into"]

_WIDER = 4  # a new bias may be so many times wider than the features that are shifted: q, k and v at once, an MLP

UP, DOWN = "affine_into_producer", "affine_into_consumers"

Plan = dict[fx.Node, Op]


class Affine(Pass):
    """s x + t is absorbed by the producer (linear, conv, embedding) or by all consumers, through what commutes with it."""

    name = "affine"

    def rewrite(self, work: Rewriting) -> None:
        while True:  # what landed may have been in the way of another
            infer(work.graph)
            before = len(work.applied)
            work.refused.clear()
            _sweep(work)
            if len(work.applied) == before:
                return
            work.graph.clean()


def _sweep(work: Rewriting) -> None:
    """Try every affine once."""
    for node in work.graph:
        if isinstance(work.graph.view(node, 1), AffineOp):
            composed = _composed(work.graph, node)
            if composed is not None:
                _land(work, composed)


def _composed(graph: Graph, node: fx.Node) -> fx.Node | None:
    """s₂ (s₁ x + t₁) + t₂  =  (s₂ s₁) x + (s₂ t₁ + t₂);   1 x + 0 = x"""
    op = graph.view(node, 2)
    assert isinstance(op, AffineOp)
    inner = op.x
    if isinstance(inner, AffineOp) and inner.node is not None and len(inner.node.users) == 1 and _one(graph, inner.node, node):
        origin = _weightiest(inner.node, node)
        dtype = _promoted(inner.s, op.s)
        both = AffineOp(inner.x, (inner.s * op.s).cast(dtype), (op.t + inner.t * op.s).cast(dtype))
        if not is_in_range(op, both):
            return node
        new = graph.emit(both, node, origin)
        inherit(new, node)
        new.meta["origin"], new.meta["composed"] = origin.meta.get("origin"), True
        node.replace_all_uses_with(new)
        node, op = new, graph.view(new, 2)
        assert isinstance(op, AffineOp)
    if is_one(op.s) and is_zero(op.t) and op.x.node is not None:
        graph.replace(node, Identity(op.x) if copy_is_needed(node) else op.x)
        return None
    return node


def _promoted(*factors: Constant) -> torch.dtype:
    """The dtype of a product of constants, and of the result where that of x is not known; a number widens nothing."""
    return functools.reduce(torch.promote_types, [c.dtype for c in factors if c.numel > 1] or [factors[0].dtype])


def _one(graph: Graph, inner: fx.Node, outer: fx.Node) -> bool:
    """May two affines be one? In a tree of modules each stands in its own."""
    return graph.tree is None or graph.path(inner) == graph.path(outer)


def _weightiest(*nodes: fx.Node) -> fx.Node:
    """Of several affines that become one, the one whose name a user looks for: a norm before a constant."""
    return next((n for n in nodes if _is_norm(n)), nodes[-1])


def _is_norm(node: fx.Node) -> bool:
    return isinstance(node.meta.get("origin"), (BatchNorm, InstanceNorm, LayerNorm, RmsNorm, GroupNorm))


def _land(work: Rewriting, node: fx.Node) -> None:
    """Move the affine to where it is free; with an entry among the refused where it stays."""
    graph = work.graph
    op = graph.view(node, 3)
    assert isinstance(op, AffineOp)
    assert op.x.node is not None
    reasons: list[tuple[str, Refuse]] = []
    for rule, s, t, rest in _ways(node, op):
        try:
            if graph.tree is not None:
                graph.tree.check_release(graph, node, whole=rest is None)
            plan = _upward(graph, op.x, s, t) if rule == UP else downward(graph, node, s, t)
            if rule == DOWN and isinstance(op.x, (LayerNorm, RmsNorm, GroupNorm)):
                _cheaper(graph, plan)
        except Refuse as e:
            reasons.append((rule, e))
            continue
        if not work.permits(rule, node):
            return
        if graph.tree is not None:
            graph.tree.released(graph, node)
        stays = op.x.node
        if rest is not None:
            stays = graph.emit(AffineOp(op.x, *rest), node)
            stays.meta["origin"], stays.meta["composed"] = node.meta.get("origin"), True
        work.done(rule, node, into(graph, plan))
        commit(graph, node, stays, plan)
        return
    if _reported(node):
        work.refuse(*_refusal(node, reasons))


def _ways(node: fx.Node, op: AffineOp) -> list[tuple[str, Constant, Constant, tuple[Constant, Constant] | None]]:
    """Where to move what, in order of preference: the rule, the scale and shift that move, and what stays behind.

    The whole affine up, then down. Else a part of it, where what stays is one operator fewer than the whole: the shift
    alone when the scale stays free of charge in an RMSNorm before it; the scale alone when it would be a product of its
    own (not one BatchNorm), or when the value is a graph input, where nothing can take the rest.
    """
    core = isinstance(op.x, (LayerNorm, RmsNorm, GroupNorm))  # takes γ and β back at no cost: see `realise`
    ways: list[tuple[str, Constant, Constant, tuple[Constant, Constant] | None]] = [] if core else [(UP, op.s, op.t, None)]
    ways.append((DOWN, op.s, op.t, None))
    if is_zero(op.t) or is_one(op.s):
        return ways
    one, zero = collapse(op.s * 0.0 + 1.0), collapse(op.t * 0.0)
    if isinstance(op.x, RmsNorm):
        ways.append((DOWN, one, op.t, (op.s, zero)))
    if not core and not _is_norm(node):
        ways.append((UP, op.s, zero, (one, op.t)))
    if op.x.node is not None and op.x.node.op == "placeholder" and bool(op.s.value.all()):
        ways.append((DOWN, op.s, zero, (one, op.t / op.s)))
    return ways


def _refusal(node: fx.Node, reasons: Sequence[tuple[str, Refuse]]) -> tuple[str, fx.Node, Refuse]:
    """One entry for both directions: of each the reason for the whole affine, not for a part tried after it."""
    told = {rule: next(e for r, e in reasons if r == rule) for rule, _ in reasons}
    last_rule, last = list(told.items())[-1] if told else (DOWN, Refuse("nothing can take it"))
    words = {UP: "up", DOWN: "down"}
    apart = len({e.reason for e in told.values()}) > 1
    reason = "; ".join(f"{words[r]}: {e.reason}" for r, e in told.items()) if apart else last.reason
    return last_rule, node, Refuse(reason, blocker=last.blocker, remedy=last.remedy)


def _reported(node: fx.Node) -> bool:
    origin = node.meta.get("origin")
    return _is_norm(node) or (isinstance(origin, Mul) and isinstance(origin.x, Constant) | isinstance(origin.y, Constant))


def into(graph: Graph, plan: Plan) -> str:
    """Where a plan puts an affine, for the report."""
    return "into " + ", ".join(dict.fromkeys(graph.path(n) for n in plan))


def commit(graph: Graph, node: fx.Node, stays: fx.Node, plan: Plan) -> None:
    """Carry out a plan: its operators are replaced, and who else reads the affine at `node` reads `stays`."""
    done: dict[fx.Node, fx.Node] = {}
    for old, new in plan.items():
        done[old] = graph.replace(old, _renewed(new, done))
    node.replace_all_uses_with(done.get(stays, stays))
    for old in [*reversed(plan), node]:  # so that later rules see who reads what now
        if not old.users:
            graph.fx.erase_node(old)


def _renewed(op: Op, done: dict[fx.Node, fx.Node]) -> Op:
    """The operator with operands that were replaced meanwhile brought up to date."""

    def new(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(new(v) for v in value)
        return Value(node=done[value.node]) if isinstance(value, Value) and value.node in done else value

    return dataclasses.replace(op, node=None, **{name: new(value) for name, value in _operands(op)})


# -- up ----------------------------------------------------------------------------------------------------------------


def _upward(graph: Graph, x: Value, s: Constant, t: Constant) -> Plan:
    """Which nodes absorb the affine above it, and how; raises Refuse when one demand cannot be met."""
    plan: Plan = {}
    demands = [(x, s, t)]
    while demands:
        value, s, t = demands.pop()
        node = value.node
        assert node is not None
        consumers = graph.consumers(node)
        if len(consumers) > 1:
            raise Refuse(f"{graph.path(node)} feeds {len(consumers)} consumers", blocker=node)
        if node in plan:
            raise Refuse("the same value is used twice", blocker=node)
        view = graph.view(node, 3)
        new = _first(into_producer.RULES, AffineOp(view, s, t), node, graph.operand)
        nested = _nested(new)
        if pieces_of(node) is not None and len(nested) == 1:
            _own(graph, node)
        demands += nested
        bare = _bare(new)
        if not nested or (isinstance(view, Op) and _changed(bare, view)):
            _affordable(graph, view, bare)
            in_range(view, bare)
            graph.check(view, bare)
            plan[node] = bare
    return plan


def pieces_of(node: fx.Node) -> fx.Node | None:
    """The split that a node takes its value from."""
    whole = node.args[0] if node.args else None
    return whole if isinstance(whole, fx.Node) and pieces(whole) else None


def _own(graph: Graph, node: fx.Node) -> None:
    whole = pieces_of(node)
    assert whole is not None
    source = whole.args[0]
    if isinstance(source, fx.Node) and len(graph.consumers(source)) > 1:
        raise Refuse(f"{graph.path(source)} feeds {len(graph.consumers(source))} consumers", blocker=source)


# -- down --------------------------------------------------------------------------------------------------------------


def downward(graph: Graph, start: fx.Node, s: Constant, t: Constant, *, untie: bool = False) -> Plan:
    """Which nodes absorb the affine below it, and how; raises Refuse when one reader cannot.

    With `untie` a shared weight may be stored once more, however large it is.
    """
    plan: Plan = {}
    pending: dict[fx.Node, AffineOp] = {start: AffineOp(Value(node=start), s, t)}
    queue: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def operand(arg: Any, depth: int = 2) -> Any:
        if isinstance(arg, fx.Node) and arg in pending:
            return pending[arg]
        return graph.operand(arg, depth)

    def push(node: fx.Node) -> None:
        for reader in graph.readers(node):
            if reader not in seen:
                seen.add(reader)
                heappush(queue, reader)

    push(start)
    while queue:
        node = heappop(queue)
        if node.op == "output":
            raise Refuse("the value is an output of the model", blocker=node)
        view = graph.decode(node, operand)
        new = _first(into_consumer.RULES, view, node, operand) if isinstance(view, Op) else None
        if new is None:
            raise _untaken(node, operand)
        if isinstance(new, AffineOp):
            # the operator itself stays and reads the bare value, unless the rule built another one
            if isinstance(new.x, Op) and isinstance(view, Op) and _changed(new.x, view):
                graph.check(view, new.x)
                plan[node] = new.x
            pending[node] = AffineOp(Value(node=node), new.s, new.t)
            push(node)
            continue
        assert isinstance(new, Op)
        if not untie:
            _affordable(graph, view, new)
        in_range(view, new)
        graph.check(view, new)
        plan[node] = new
    return plan


# -- both --------------------------------------------------------------------------------------------------------------


def _first(rules: Sequence[Any], op: Op, node: fx.Node, operand: Callable[[Any], Any]) -> Op:
    for rule in rules:
        try:
            value = rule(op)
        except Refuse as e:
            e.blocker = e.blocker or node
            raise
        if value is not None:
            assert isinstance(value, Op)
            return value
    raise _untaken(node, operand)


def _untaken(node: fx.Node, operand: Callable[[Any], Any]) -> Refuse:
    name = f"the input {node.name}" if node.op == "placeholder" else operator_name(node)
    why = objection(node, operand) if node.op == "call_function" else ""
    remedy = PASS_INPUTS if "unknown" in why else ""
    return Refuse(f"{name} does not take an affine{': ' if why else ''}{why}", blocker=node, remedy=remedy)


def _operands(op: Op) -> list[tuple[str, Any]]:
    return [(f.name, getattr(op, f.name)) for f in dataclasses.fields(op) if f.name not in ("node", "target")]


def _nested(op: Op) -> list[tuple[Value, Constant, Constant]]:
    found = []
    for _, value in _operands(op):
        found += [
            (v.x, v.s, v.t)
            for v in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(v, AffineOp) and v.node is None and not (is_one(v.s) and is_zero(v.t))
        ]
    return found


def _bare(op: Op) -> Op:
    """The operator on its operands without their affines."""

    def strip(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(strip(v) for v in value)
        return value.x if isinstance(value, AffineOp) and value.node is None else value

    return dataclasses.replace(op, node=None, **{name: strip(value) for name, value in _operands(op)})


def _changed(new: Op, old: Op) -> bool:
    """Does the operator read another constant or another literal than before?"""

    def flat(op: Op) -> list[Any]:
        return [
            v
            for _, value in _operands(op)
            for v in (value if isinstance(value, (list, tuple)) else (value,))
            if not isinstance(v, Value)
        ]

    a, b = flat(new), flat(old)
    return (
        type(new) is not type(old)
        or len(a) != len(b)
        or any(x is not y and (isinstance(x, Constant) or x != y) for x, y in zip(a, b, strict=True))
    )


def _cheaper(graph: Graph, plan: Plan) -> None:
    """Refuse a new bias that is much wider than the shift which it would save (a language model's head)."""
    for node, new in plan.items():
        w, before = new.weight, graph.view(node, 1).weight
        if w is None or not w.linear or w.bias is None or (before is not None and before.bias is not None):
            continue
        if w.outputs > _WIDER * w.inputs:
            reason = f"a new bias of {w.outputs} values would cost more than the shift of {w.inputs} that it replaces"
            raise Refuse(reason, blocker=node)


def _affordable(graph: Graph, old: Value, new: Op) -> None:
    """Refuse to store a shared weight a second time if it is large, or a table that a tied head reads too."""
    if not isinstance(old, Op):
        return
    kept = {id(c) for _, c in _operands(new) if isinstance(c, Constant)}
    for name, c in _operands(old):
        if isinstance(c, Constant) and id(c) not in kept:
            check_shared(graph, c, old.node, "folding", name)
