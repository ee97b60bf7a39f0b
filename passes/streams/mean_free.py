"""LayerNorm reads a stream whose mean nobody else sees: remove the mean from what writes it, and RMSNorm is enough.

    LN(x) = RMSNorm(P x),   P = I − 11ᵀ/d

Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, arXiv 2305.14858, section 3; generalized to any graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.decode import pieces
from normfuse.ir.graph import Graph, Modules, Refuse
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import (
    Add,
    Affine,
    Cat,
    Identity,
    LayerNorm,
    Mean,
    Movement,
    Op,
    Permute,
    Reshape,
    RmsNorm,
    Sub,
    Value,
)  # fmt: skip
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN, axes, is_zero
from normfuse.passes.streams.streams import Place, centered, centered_writer, named, operands
from normfuse.reports.model import Site

__all__ = ["MeanFree", "Stream", "streams_of"]

RULE = "layer_norm_is_rms_norm"
# Time of one operator on a value of the stream, in units of a LayerNorm: `python -m benchmarks.operators`.
_SAVED = 0.53  # LayerNorm − RMSNorm
_SHIFT = 0.36  # an addition, for a β that no reader takes
_CENTERING = 0.63  # a mean and a subtraction: 0.42, and half as much again because it is two operators, not one
_LEAST = 0.3  # what a stream must save, so that noise in these figures does not decide


@dataclass
class Streams:
    """The values that lead to LayerNorms through operators that commute with P.

    Attributes:
        axis: feature axis of each value.
        edges: for a value made by a commuting operator, the operands that carry the stream.
        sees_mean: for a value whose mean somebody sees, the reader that does.
    """

    axis: dict[fx.Node, int] = field(default_factory=dict)
    edges: dict[fx.Node, list[Place]] = field(default_factory=dict)
    sees_mean: dict[fx.Node, fx.Node] = field(default_factory=dict)


@dataclass
class Stream:
    """One connected stream: the norms that read it and what centering it takes.

    Attributes:
        norms: LayerNorms that read a centered value.
        values: values of the stream; each is mean-free once its writers are centered.
        axis: feature axis of each value.
        explicit: values that need an operator which subtracts their mean, with the reason.
    """

    norms: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)
    explicit: dict[fx.Node, str] = field(default_factory=dict)
    axis: dict[fx.Node, int] = field(default_factory=dict)
    carried: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def centers(self, reader: fx.Node, value: fx.Node) -> bool:
        """Does the reader take the value without its mean?"""
        return reader in self.norms or value in self.carried.get(reader, ())


class MeanFree(Pass):
    """LN(x) = RMSNorm(P x): the mean is removed once, in the weights that write the stream, not in every norm."""

    name = "mean_free"

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        norms = [n for n in graph if isinstance(graph.view(n, 1), LayerNorm)]
        for stream in streams_of(graph, norms, work.refused):
            try:
                _worthwhile(graph, stream)
                if graph.tree is not None:
                    _fits_modules(graph, graph.tree, stream)
            except Refuse as refusal:
                for norm in stream.norms:
                    work.refuse(RULE, norm, refusal)
                continue
            if work.permits(RULE, stream.norms[0]):
                for norm in stream.norms:
                    work.done(RULE, norm, _note(graph, stream))
                _center(graph, stream)
        order = {graph.path(n): i for i, n in enumerate(norms)}
        work.refused.sort(key=lambda site: order.get(site.path, 0))


# -- discovery ---------------------------------------------------------------------------------------------------------


def streams_of(graph: Graph, norms: list[fx.Node], refused: list[Site]) -> Iterable[Stream]:
    """The streams that these LayerNorms read; a norm over several axes or of unknown shape is added to `refused`."""
    readable = []
    for norm in norms:
        try:
            readable.append((norm, _input(graph, norm)))
        except Refuse as refusal:
            refused.append(graph.site(RULE, norm, refusal))
    found = _trace(graph, [place for _, place in readable])
    _find_readers_of_the_mean(graph, found)
    return _connected(graph, found, [(norm, value) for norm, (value, _) in readable])


def _input(graph: Graph, norm: fx.Node) -> Place:
    op = graph.view(norm, 2)
    assert isinstance(op, LayerNorm)
    if len(op.normalized) != 1:
        raise Refuse(
            f"normalizes over {len(op.normalized)} axes at once; only the mean over one feature axis can be moved into weights"
        )
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    if op.x.shape is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    return source, -1


def _trace(graph: Graph, starts: list[Place]) -> Streams:
    """Upwards from every LayerNorm, as far as operators commute with P."""
    found = Streams()
    work = list(starts)
    while work:
        node, axis = work.pop()
        if node in found.axis:
            if found.axis[node] != axis:
                found.sees_mean[node] = node  # one value, two feature axes: no single P
            continue
        found.axis[node] = axis
        places = operands(graph, node, axis)
        if places is not None:
            found.edges[node] = places
            work += places
    for node in [n for n, places in found.edges.items() if any(found.axis[v] != axis for v, axis in places)]:
        del found.edges[node]  # it would need an operand without its mean along another axis
    return found


def _find_readers_of_the_mean(graph: Graph, found: Streams) -> None:
    """Whose mean is seen, and by whom: an output, a matmul, a RMSNorm, or a value further down whose mean is seen."""
    order = {n: i for i, n in enumerate(graph)}
    for node in sorted(found.axis, key=order.__getitem__, reverse=True):
        for reader in graph.readers(node):
            if _blind(graph, reader, node, found.axis[node]):
                continue
            if (node, found.axis[node]) in found.edges.get(reader, ()) and reader not in found.sees_mean:
                continue
            found.sees_mean.setdefault(node, found.sees_mean.get(reader) or _who_looks(graph, reader))


def _who_looks(graph: Graph, reader: fx.Node) -> fx.Node:
    """The operator that a user would name: the first one below `reader` that does more than pass the value on."""
    while isinstance(graph.view(reader, 1), (Add, Identity, Permute, Reshape, Movement)):
        further = graph.readers(reader)
        if not further:
            break
        reader = further[0]
    return reader


def _blind(graph: Graph, reader: fx.Node, node: fx.Node, axis: int) -> bool:
    """LN(P x) = LN(x): a LayerNorm over the feature axis does not see the mean."""
    op = graph.view(reader, 2)
    return isinstance(op, LayerNorm) and op.x.node is node and axis == -1 and len(op.normalized) == 1


def _connected(graph: Graph, found: Streams, reads: list[tuple[fx.Node, fx.Node]]) -> Iterable[Stream]:
    """The streams: values linked by the operators that must stay consistent when one of them is centered."""
    from networkx.utils import UnionFind

    linked = UnionFind()
    reasons: dict[fx.Node, str | None] = {}

    def carried(node: fx.Node) -> list[fx.Node]:
        return [] if reasons[node] is not None else [operand for operand, _ in found.edges.get(node, ())]

    work = [value for _, value in reads]
    while work:
        node = work.pop()
        if node not in reasons:
            reasons[node] = _explicit(graph, found, node)
            linked.union(node, *carried(node))
            work += carried(node)
    merged: dict[fx.Node, Stream] = {}
    order = {n: i for i, n in enumerate(graph)}
    for node in sorted(reasons, key=order.__getitem__):
        stream = merged.setdefault(linked[node], Stream())
        stream.values.append(node)
        stream.axis[node] = found.axis[node]
        why = reasons[node]
        if why is None:
            stream.carried[node] = carried(node)
        else:
            stream.explicit[node] = why
    for norm, value in reads:
        merged[linked[value]].norms.append(norm)
    for stream in merged.values():
        _gather_roots(graph, found, stream)
        yield stream


def _explicit(graph: Graph, found: Streams, node: fx.Node) -> str | None:
    """Why the mean of this value cannot be removed by changing weights; None if it can."""
    if graph.constant(node) is not None:
        return None  # a table or token: the stream reads a centered copy, whoever else reads it keeps the original
    op = graph.view(node, 2)
    if (isinstance(op, Affine) and isinstance(op.x, (LayerNorm, RmsNorm))) or (isinstance(op, LayerNorm) and op.gamma is not None):
        return "the residual stream carries the output of a norm, whose gain and shift give it a mean (Post-LN)"
    if node in found.sees_mean:
        reader = found.sees_mean[node]
        if reader.op == "output":
            return "the stream is an output of the model"
        return f"{named(graph, reader)} reads the residual stream without a norm in between, so that its mean matters"
    if node in found.edges:
        return None
    if isinstance(op, (Reshape, Cat)):
        return f"{named(graph, node)} joins features that have means of their own"
    writer = centered_writer(graph, op, found.axis[node])
    if writer is None and op.weight is not None and op.weight.groups > 1:
        groups = op.weight.groups
        return f"{named(graph, node)} has {groups} groups: no weight of it sees all features, so that none could remove their mean"
    if writer is None:
        return f"{named(graph, node)} has no weights that could be centered"
    shared = [c for c in vars(op).values() if isinstance(c, Constant) and graph.shared(c)]
    if shared and writer is not op:
        return f"{shared[0].name} is shared with another operator"
    return None


def _gather_roots(graph: Graph, found: Streams, stream: Stream) -> None:
    """Center a sum once, not each of its terms: P x + P y = P (x + y), also where a term is moved first: P M x = M P x."""
    read = {v for n in stream.norms for v in n.all_input_nodes}
    carriers: dict[fx.Node, list[fx.Node]] = {}
    for node, taken in stream.carried.items():
        for n in dict.fromkeys(taken):
            carriers.setdefault(n, []).append(node)
    for node in stream.values:
        terms = [n for n, _ in found.edges.get(node, ())]
        heavy = [n for n in terms if n in stream.explicit and n not in read and carriers[n] == [node]]
        moved = len(terms) == 1 and isinstance(graph.view(node, 1), (Identity, Permute, Reshape))
        if (
            node not in stream.explicit
            and len(heavy) > (not moved)
            and all(n in heavy or graph.constant(n) is not None for n in terms)
        ):
            why = stream.explicit[heavy[0]]
            for n in dict.fromkeys(heavy):
                del stream.explicit[n]
            stream.explicit[node] = why
            del stream.carried[node]
            stream.values = [v for v in stream.values if v not in heavy]


# -- decision and rewrite ----------------------------------------------------------------------------------------------


def _worthwhile(graph: Graph, stream: Stream) -> None:
    shifts = sum(_shift_stays(graph, norm) for norm in stream.norms)
    saved = _SAVED * len(stream.norms) - _SHIFT * shifts
    cost = _CENTERING * len(stream.explicit)
    if saved >= 2 * cost and saved - cost >= _LEAST:
        return
    if not stream.explicit:
        raise Refuse("its β has no place to go, and an addition costs about what RMSNorm saves")
    node, why = next(iter(stream.explicit.items()))
    if len(stream.explicit) == len(stream.norms) == 1:
        raise Refuse(why, blocker=node, remedy=_remedy(why))
    count = f"{len(stream.explicit)} explicit centerings for {len(stream.norms)} norms would not pay: {why}"
    raise Refuse(count, blocker=node, remedy=_remedy(why))


def _fits_modules(graph: Graph, tree: Modules, stream: Stream) -> None:
    """Refuse what modules could not compute once the stream is centered: only weights and the classes of norms may change."""
    if stream.explicit:
        node, why = next(iter(stream.explicit.items()))
        raise Refuse(f"its mean would have to be removed by an operator of its own, which no module computes: {why}", blocker=node)
    reasons = [tree.why_no_rms_norm(graph.path(norm)) for norm in stream.norms]
    if all(reasons):
        raise Refuse(reasons[0], blocker=stream.norms[0])
    for node in stream.values:
        axis = stream.axis[node]
        constant = graph.constant(node)
        if constant is not None:
            tree.check_value(constant, node, for_all=True)
            if not all(stream.centers(user, node) for user in graph.readers_of(constant)):
                raise Refuse(f"{constant.name} is read with its mean as well", blocker=node)
            continue
        op = graph.view(node, 2)
        if isinstance(op, Affine) and not is_zero(op.t):
            raise Refuse("a shift in the stream stands in the code of the model", blocker=node)
        value = None if isinstance(op, Affine) else centered_writer(graph, op, axis)
        if value is not None and value is not op:
            graph.check(op, value)


def _shift_stays(graph: Graph, norm: fx.Node) -> bool:
    """Is there a β that the pass `affine` could not move into the readers of the norm?"""
    op = graph.view(norm, 1)
    readers = [graph.view(user, 2) for user in norm.users]
    return isinstance(op, LayerNorm) and (op.beta is not None or any(isinstance(r, Affine) and not is_zero(r.t) for r in readers))


def _remedy(why: str) -> str:
    if "output of a norm" in why:
        return "only a Pre-LN placement of the norms can be converted"
    if "output of the model" in why:
        return "return the normalized value instead of the raw stream"
    return ""


def _note(graph: Graph, stream: Stream) -> str:
    what = "residual stream" if any(len(taken) > 1 for taken in stream.carried.values()) else "input"
    if not stream.explicit:
        return f"its {what} has no mean: the weights that write it are centered"
    roots = ", ".join(dict.fromkeys(graph.path(n) for n in stream.explicit))
    return f"its {what} has no mean: it is centered once, after {roots}"


def _center(graph: Graph, stream: Stream) -> None:
    for node in stream.values:
        axis = stream.axis[node]
        if node in stream.explicit:
            _subtract_mean(graph, node, axis, stream)
        elif (constant := graph.constant(node)) is not None:
            value = centered(constant, constant.ndim + axis)
            if graph.tree is not None:
                graph.tree.moves(constant, value)
            _read_centered(graph, node, value, stream)
        else:
            op = graph.view(node, 2)
            writer = _centered_affine(op, axis) if isinstance(op, Affine) else centered_writer(graph, op, axis)
            if writer is not None and writer is not op:
                if not isinstance(op, Affine):
                    graph.check(op, writer)
                graph.replace(node, writer)
    for norm in stream.norms:
        op = graph.view(norm, 2)
        assert isinstance(op, LayerNorm)
        rms = RmsNorm(op.x, list(op.normalized), op.gamma, op.eps)
        graph.replace(norm, rms if op.beta is None else Affine(rms, op.beta * 0.0 + 1.0, op.beta))


def _centered_affine(op: Affine, axis: int) -> Op:
    """P (s x + t) = s P x + P t   where s does not vary over the features"""
    return Affine(op.x, op.s, centered(op.t, op.t.ndim + axis) if axis in axes(op.t) else op.t * 0.0)


def _subtract_mean(graph: Graph, node: fx.Node, axis: int, stream: Stream) -> None:
    """P x = x − mean(x), for those readers that belong to the stream."""
    users = list(node.users)
    x = Value(node=node)
    before = node.next
    while before.op == "placeholder":
        before = before.next
    new = graph.emit(Sub(x, Mean(x, [axis], True)), before, node)
    for user in users:
        _redirect(graph, user, node, new, stream)


def _redirect(graph: Graph, user: fx.Node, old: fx.Node, new: fx.Node, stream: Stream) -> None:
    if stream.centers(user, old):
        user.replace_input_with(old, new)
    elif pieces(user):
        taken = [piece for piece in user.users if stream.centers(piece, old)]
        if taken:
            split = graph.call(user.target, (new, *user.args[1:]), user, user, dict(user.kwargs))
            for piece in taken:
                piece.replace_input_with(user, split)


def _read_centered(graph: Graph, node: fx.Node, value: Constant, stream: Stream) -> None:
    for user in list(node.users):
        if stream.centers(user, node):
            user.replace_input_with(node, graph.emit_constant(value, user))
