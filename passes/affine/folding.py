"""What depends on constants only is computed once: f(constants) is a constant.

Everything inside is float64, and the result is stored in the dtype that the operator has in the model. Three things are
computed in the dtypes of the model instead, step by step, because there its roundings are part of the function: what a
rounding decides (`normfuse.ir.discontinuous`) and what such an operator reads at run time, results of integers and booleans,
and what a wider dtype reads. Sizes come from the trace or, in a graph without shapes, from the constants themselves.
"""

from __future__ import annotations

import operator
import re
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.aliases import is_returned, may_share
from normfuse.ir.constants import Constant
from normfuse.ir.discontinuous import jumps
from normfuse.ir.graph import Graph
from normfuse.ir.operators import CASTS, CHECKS
from normfuse.ir.passes import Rewriting
from normfuse.ir.views import Identity, Value
from normfuse.reports.model import Site

__all__ = ["Known", "fold", "known_values"]

aten = torch.ops.aten

RULE = "constant_folding"

_GROWTH = 1 << 18  # bytes: a result that needs more than the tensors it comes from is stored up to this size
_LARGEST = 1 << 24  # values of a step in between; larger ones are left to the model
_CHECKED = 1 << 16  # values up to which a result is computed in both precisions, to see whether it leaves the range of its dtype
_STATISTICS = {aten.batch_norm.default, aten.instance_norm.default}  # write running statistics where they are given any
_OBJECTIONS = (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError)


def fold(work: Rewriting) -> None:
    """f(constants) = a constant, where that takes no more bytes than the tensors it comes from, or few.

    Steps in between are not stored. An output keeps memory of its own: it is a copy of the constant, or the view that it was.
    """
    graph = work.graph
    known = Known(graph)
    known.write_numbers()
    for node in graph:
        if node.target in CHECKS and all(n in known.constants for n in node.all_input_nodes):
            graph.fx.erase_node(node)
    sites: dict[fx.Node, Site] = {}
    for node in known.affordable():
        if work.permits(RULE, node):
            site, value = graph.site(RULE, node), graph.emit(known.stored(node), node)
            sites.setdefault(graph.replace(node, Identity(Value(node=value)) if is_returned(node) else Value(node=value)), site)
    graph.clean()
    alive = set(graph)
    work.applied += [site for new, site in sites.items() if new in alive]


def known_values(graph: Graph) -> dict[fx.Node, Any]:
    """The constants and numbers that nodes of a graph compute from constants alone."""
    known = Known(graph)
    return {n: c for n, c in known.constants.items() if n.op != "get_attr"} | known.numbers


class Known:
    """The values of a graph that depend on constants only.

    Attributes:
        constants: those that are tensors, by node; originals among them.
        numbers: sizes of constants, and arithmetic on such sizes.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.constants: dict[fx.Node, Constant] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self._pure: set[fx.Node] = set()
        self._beneath: dict[fx.Node, frozenset[fx.Node]] = {}
        self._done: dict[Any, Constant | None] = {}
        for node in graph.fx.nodes:
            read = node.all_input_nodes
            if graph.constant(node) is not None or (read and _pure(node) and self._pure.issuperset(read)):
                self._pure.add(node)
        for node in graph.fx.nodes:
            self._look(node)

    def _look(self, node: fx.Node) -> None:
        constant = self._graph.constant(node)
        if constant is not None:
            self.constants[node], self._beneath[node] = constant, frozenset({node})
            return
        number = self._number(node)
        if number is not None:
            self.numbers[node] = number
            return
        constant = self._value(node)
        if constant is not None:
            self.constants[node] = constant
            self._beneath[node] = frozenset().union(*(self._beneath[n] for n in self._operands(_call(node)[0])))

    def write_numbers(self) -> None:
        """Put each number into whatever reads it."""
        for node in self.numbers:
            for user in list(node.users):
                user.args, user.kwargs = fx.node.map_arg((user.args, dict(user.kwargs)), lambda n: self.numbers.get(n, n))

    def affordable(self) -> list[fx.Node]:
        """The computed constants to store, in execution order: those that something else reads, or what stays computed."""
        stays: set[fx.Node] = set()
        found: list[fx.Node] = []
        for node in reversed(self.constants):
            if node.op == "get_attr" or not any(self._needed(user, stays) for user in node.users):
                continue
            large = self._bytes(node) > max(_GROWTH, sum(self._bytes(n) for n in self._beneath[node]))
            if large or (is_returned(node) and self._shares(node)) or (self._graph.tree is not None and self._is_code(node)):
                stays.add(node)
            else:
                found.append(node)
        return found[::-1]

    def stored(self, node: fx.Node) -> Constant:
        """The constant to store; a large one in half precision is looked at only now, for what has left its range."""
        c = self.constants[node]
        large = c.numel > _CHECKED and c.dtype == torch.float16
        return c.rounded() if large and not bool(c.eager.isfinite().all()) else c

    def _needed(self, user: fx.Node, stays: set[fx.Node]) -> bool:
        if user in self.constants or user in self.numbers:
            return user in stays
        pieces = [u for u in user.users if u.target is operator.getitem]
        return not pieces or len(pieces) < len(user.users) or any(self._needed(u, stays) for u in pieces)

    def _bytes(self, node: fx.Node) -> int:
        c = self.constants[node]
        return c.numel * c.dtype.itemsize

    def _is_code(self, node: fx.Node) -> bool:
        """In a graph that is written back into modules: is it a table, or a part of a tensor? Their code goes on computing it."""
        c = self.constants[node]
        return sum(n > 1 for n in c.shape) > 1 or all(self.constants[n].numel > c.numel for n in self._beneath[node])

    def _shares(self, node: fx.Node) -> bool:
        """Is it a view or a copy of a constant, whose memory an output has to share, or not to share, as it does?"""
        return may_share(node) or isinstance(self._graph.view(node, 1), Identity)

    # -- one value --

    def _operands(self, call: fx.Node | None) -> list[fx.Node]:
        return [] if call is None else [n for n in call.all_input_nodes if n not in self.numbers]

    def _given(self, call: fx.Node) -> tuple[Any, Any]:
        def one(n: fx.Node) -> Any:
            return self.numbers[n] if n in self.numbers else self.constants[n]

        return fx.node.map_arg((call.args, dict(call.kwargs)), one)

    def _number(self, node: fx.Node) -> Any:
        """A size of a constant, or arithmetic on such sizes."""
        if node.target is aten.sym_size.int and node.args[0] in self.constants:
            return self.constants[node.args[0]].shape[node.args[1]]  # type: ignore[index]
        if node.op != "call_function" or getattr(node.target, "__module__", "") != "_operator" or node.target is operator.getitem:
            return None
        args = [self.numbers.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
        return node.target(*args) if all(isinstance(a, int) for a in args) else None  # type: ignore[operator]

    def _value(self, node: fx.Node) -> Constant | None:
        call, piece = _call(node)
        operands = self._operands(call)
        if call is None or not operands or not _pure(call) or any(n not in self.constants for n in operands):
            return None
        args, kwargs = self._given(call)
        like = _like(node, call.target, piece, args, kwargs)
        if like is None or like.numel() > max(_LARGEST, sum(self.constants[n].numel for n in operands)):
            return None
        decides = any(u not in self._pure and jumps(u.target) for u in node.users)
        first = self.constants[operands[0]]
        if isinstance(self._graph.view(call, 1), Identity) or (call.target in CASTS and first.dtype == like.dtype):
            return first.rounded() if decides else first
        key = (call.target, piece, like.dtype, decides, repr(_identified((args, kwargs))))
        if key not in self._done:
            self._done[key] = _evaluated(call.target, piece, args, kwargs, like, decides)
        return self._done[key]


def _call(node: fx.Node) -> tuple[fx.Node | None, int | None]:
    """The operator that a node calls, and which of its results the node is; one whose pieces are taken has no own value."""
    if node.op != "call_function":
        return None, None
    if node.target is operator.getitem:
        whole, piece = node.args
        single = isinstance(whole, fx.Node) and isinstance(piece, int) and isinstance(whole.target, torch._ops.OpOverload)
        return (whole, piece) if single else (None, None)  # type: ignore[return-value]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None, None
    returns = node.target._schema.returns
    return (node, None) if len(returns) == 1 and str(returns[0].type) == "Tensor" else (None, None)


def _pure(node: fx.Node) -> bool:
    """An operator that gives the same for the same operands and writes to none."""
    target: Any = node.target
    if getattr(target, "__module__", "") == "_operator":
        return True
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if target in _STATISTICS:
        return all(a is None for a in node.args[3:5])
    return not target._schema.is_mutable


def _like(node: fx.Node, target: Any, piece: int | None, args: Any, kwargs: Any) -> Tensor | None:
    """Shape and dtype of the result in the model, without data."""
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return val if all(isinstance(d, int) for d in val.shape) else None
    args, kwargs = _mapped(lambda c: torch.empty(c.shape, dtype=c.dtype, device="meta"), (args, kwargs))
    try:
        out: Any = target(*args, **kwargs)
        out = out if piece is None else out[piece]
    except _OBJECTIONS:
        return None
    return out if isinstance(out, Tensor) else None


def _evaluated(target: Any, piece: int | None, args: Any, kwargs: Any, like: Tensor, decides: bool) -> Constant | None:
    operands = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, Constant)]
    name = next((c.name for c in operands if c.name), "")

    def function(*a: Any, **k: Any) -> Any:
        out = target(*a, **k)
        return out if piece is None else out[piece]

    def eager() -> Tensor:
        a, k = _mapped(lambda c: c.eager, (args, kwargs))
        out: Tensor = function(*a, **k)
        return out

    value = Constant.decided(eager, like.shape, like.dtype, name)
    if not (decides or jumps(target)) and _inexact(like.dtype) and any(_inexact(c.dtype) for c in operands):
        with suppress(*_OBJECTIONS):  # an operator without a form in float64
            precise = _precise(target, function, args, kwargs, like)
            value = precise.computed(eager) if _in_range(precise, eager) else value
    return value.named(_as_weight(value.name)).asking(_differentiable(function, args, kwargs)) if _runs(value) else None


def _differentiable(function: Any, args: Any, kwargs: Any) -> bool:
    """Does a gradient flow from the result to a tensor that is trained? None does through `zeros_like` or `detach`."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    if not any(isinstance(c, Constant) and c.trained for c in leaves):
        return False
    a, k = _mapped(lambda c: torch.empty(c.shape, dtype=c.dtype, device="meta").requires_grad_(c.trained), (args, kwargs))
    try:
        with torch.enable_grad():
            return bool(function(*a, **k).requires_grad)
    except (*_OBJECTIONS, AttributeError):
        return True


def _precise(target: Any, function: Any, args: Any, kwargs: Any, like: Tensor) -> Constant:
    """In float64, once what has been rounded to a narrower dtype than the result is as the model has it."""
    args, kwargs = _mapped(lambda c: c.rounded() if _narrower(c.dtype, like.dtype) else c, (args, kwargs))
    if target in CASTS:
        source: Constant = args[0]
        return source.cast(like.dtype)
    args, kwargs = torch.utils._pytree.tree_map(_wide, (args, kwargs))
    return Constant.apply(function, *args, **kwargs).cast(like.dtype)


def _runs(value: Constant) -> bool:
    """Can a small constant be computed here? Else its operator stays; a large one waits until it is asked for."""
    try:
        return value.numel > _CHECKED or value.value is not None
    except _OBJECTIONS:
        return False


def _in_range(value: Constant, eager: Any) -> bool:
    """Is everything finite that the model computes? What has left the range of a dtype on the way is part of the function."""
    return value.numel > _CHECKED or bool(eager().isfinite().all())


def _inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    return _inexact(dtype) and torch.finfo(dtype).eps > torch.finfo(than).eps


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.dtype) or not _inexact(value):
        return value
    return torch.complex128 if value.is_complex else torch.float64


def _mapped(one: Any, value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: one(v) if isinstance(v, Constant) else v, value)


def _identified(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: id(v) if isinstance(v, Constant) else v, value)


def _as_weight(name: str) -> str:
    """`conv.parametrizations.weight.original0`, `conv.weight_v`, `conv.bias_mask`: what is evaluated is the weight or the bias."""
    name = re.sub(r"\bparametrizations\.(\w+)\..*$", r"\1", name)
    return re.sub(r"\b(weight|bias)_(g|v|orig|mask)$", r"\1", name)
