"""What a captured graph may be called with: sizes, dtypes and constants that its operators were chosen for.

    gm(x)   ->   UsageError: input x is float32[4, 8]; the model was captured with float32[2, 8]: ...

A graph is the model at the inputs that it was captured with. `Guards` says which other calls it stands for, as Python conditions
over the leaves of the inputs, and is a forward pre-hook of the optimized module: one compiled expression when all is well.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from normfuse.described import dtype_name
from normfuse.errors import UsageError
from normfuse.ir.free_sizes import sizes_of
from normfuse.ir.trees import children

__all__ = ["Condition", "Guards", "Input", "attach_guards", "guarded_inputs", "guards_of", "guards_of_signature", "set_guards"]

_KEY = "normfuse_guards"
_ANOTHER_KIND = (AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError)  # of conditions about another kind of value


@dataclass(frozen=True)
class Input:
    """One input, or one leaf of a nested one, as it was captured.

    Attributes:
        name: what the caller calls it: `x`, `batch['mask']`.
        text: the captured value, for messages: `float32[2, 8]`, `2.0`.
        rank: number of dimensions; None for numbers, flags and None.
    """

    name: str
    text: str
    rank: int | None


@dataclass(frozen=True)
class Condition:
    """A Python expression over the leaves `v0`, `v1`, … that holds for every call that the graph stands for.

    Attributes:
        code: the expression.
        input: index of the input that is to blame where it does not hold.
        must: what should hold, after the words of the message; empty where the two descriptions say it.
        remedy: what to do.
    """

    code: str
    input: int
    must: str
    remedy: str


@dataclass
class Guards:
    """Conditions on a call, checked as a forward pre-hook.

    Attributes:
        names: parameters of forward, in order.
        inputs: leaves of the inputs, in the order of the graph's placeholders.
        conditions: what must hold of them.
        structures: the nesting of each parameter; None where none is nested.
        optional: parameters that a call may leave out.
    """

    names: tuple[str, ...]
    inputs: tuple[Input, ...]
    conditions: tuple[Condition, ...]
    structures: tuple[Any, ...] | None = None
    optional: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.inputs)
        self._holds = _function(count, " and ".join(c.code for c in self.conditions) or "True")
        self._each = [_function(count, c.code) for c in self.conditions]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises a UsageError that names the input, what was captured, what was given and what to do."""
        if not kwargs and self.structures is None and len(args) == len(self.inputs):
            self.check(args)
        else:
            self.check(self._leaves(args, kwargs))

    def check(self, leaves: Sequence[Any]) -> None:
        """The same for the leaves of a call, one a placeholder."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # sizes are values of the trace
            return
        try:
            if self._holds(*leaves):
                return
        except _ANOTHER_KIND:
            pass
        for condition, holds in zip(self.conditions, self._each, strict=True):
            try:
                right = holds(*leaves)
            except _ANOTHER_KIND:
                right = False
            if not right:
                raise UsageError(_message(self.inputs[condition.input], leaves[condition.input], condition))

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if len(args) > len(self.names):
            raise UsageError(
                f"got {len(args)} positional inputs; the model was captured with {len(self.names)} ({', '.join(self.names)}): "
                "optimize it again with all of them as example_inputs"
            )
        for name in kwargs:
            if name not in self.names:
                raise UsageError(
                    f"input {name} is not one that the model was captured with ({', '.join(self.names)}): "
                    "optimize it again with that input among example_inputs"
                )
            if name in self.names[: len(args)]:
                raise UsageError(f"input {name} is given twice, by position and by keyword")
        given = list(args)
        for i, name in enumerate(self.names[len(args) :], len(args)):
            if name in kwargs:
                given.append(kwargs[name])
            elif name in self.optional:
                given.append(self.optional[name])
            else:
                known = f" as {self.inputs[i].text}" if self.structures is None else ""
                raise UsageError(f"input {name} is missing; the model was captured with it{known}: pass it")
        if self.structures is None:
            return given
        leaves: list[Any] = []
        for name, value, structure in zip(self.names, given, self.structures, strict=True):
            found, shape = pytree.tree_flatten(_in_order(value, structure))
            if shape != structure:
                raise UsageError(
                    f"input {name} is nested as {_nesting(shape)}; the model was captured with {_nesting(structure)}: "
                    "optimize it again with such an input"
                )
            leaves += found
        return leaves


class CheckedCodeGen(fx.graph._PyTreeCodeGen):
    """Checks the guards where a graph is interpreted instead of called: torch.export runs no hooks of a GraphModule."""

    def __init__(self, info: Any, guards: Guards) -> None:
        super().__init__(info)
        self.guards = guards

    def process_inputs(self, *args: Any) -> Any:
        leaves = super().process_inputs(*args)
        self.guards.check(leaves)
        return leaves


def set_guards(gm: fx.GraphModule, guards: Guards | None) -> None:
    """Say what `gm` may be called with; modules that are made from its graph take it over."""
    gm.meta[_KEY] = guards


def guarded_inputs(gm: fx.GraphModule) -> tuple[str, ...]:
    """What the caller calls each placeholder of a captured graph: `x`, `batch['mask']`."""
    guards = gm.meta.get(_KEY)
    return () if guards is None else tuple(i.name for i in guards.inputs)


def attach_guards(gm: fx.GraphModule) -> None:
    """Have `gm` check its calls against the guards in its meta, if there are any."""
    guards = gm.meta.get(_KEY)
    if guards is None:
        return
    gm.register_forward_pre_hook(guards, with_kwargs=True)
    if isinstance(gm.graph._codegen, fx.graph._PyTreeCodeGen):
        gm.graph._codegen = CheckedCodeGen(gm.graph._codegen.pytree_info, guards)


_DTYPES = {str(d).replace(".", "_"): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def _function(count: int, code: str) -> Callable[..., bool]:
    """`lambda v0, v1: …`; a condition is made of names, sizes, literals and arithmetic only. Each shape is read once."""
    read: set[str] = set()

    def once(found: re.Match[str]) -> str:
        i, first = found[1], found[1] not in read
        read.add(i)
        return f"(s{i} := v{i}.shape)" if first else f"s{i}"

    names = ", ".join(f"v{i}" for i in range(count))
    code = re.sub(r"\bv(\d+)\.shape\b", once, code)
    made: Callable[..., bool] = eval(f"lambda {names}: {code}", dict(_DTYPES))
    return made


def _message(wanted: Input, value: Any, condition: Condition) -> str:
    remedy = condition.remedy
    if wanted.rank is None:
        return f"input {wanted.name} is {_text(value)}; it was captured as the constant {wanted.text}: {remedy}"
    must = f", {condition.must}" if condition.must else ""
    if not isinstance(value, Tensor) or value.ndim != wanted.rank:
        must, remedy = "", _AGAIN
    return f"input {wanted.name} is {_text(value)}; the model was captured with {wanted.text}{must}: {remedy}"


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}{[int(d) if isinstance(d, int) else str(d) for d in value.shape]}".replace("'", "")
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_order(value: Any, structure: Any) -> Any:
    """Dictionaries with their keys in the order of the example; everything else as it is."""
    if type(value) not in (dict, list, tuple) or structure.type is not type(value) or len(value) != len(children(structure)):
        return value
    if isinstance(value, dict):
        keys = structure.context
        if any(k not in value for k in keys):
            return value
        return {k: _in_order(value[k], s) for k, s in zip(keys, children(structure), strict=True)}
    return type(value)(_in_order(v, s) for v, s in zip(value, children(structure), strict=True))


def _nesting(spec: Any) -> str:
    text = re.sub(r"\s+", " ", str(pytree.tree_unflatten(["…"] * spec.num_leaves, spec))).replace("'…'", "…")
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- from a graph ------------------------------------------------------------------------------------------------------

_ENLARGE = "give dynamic_shapes to optimize so that this size stays free"
_WIDEN = "optimize again with a Dim of wider limits in dynamic_shapes"
_AGAIN = "optimize again with such an input"
_CONSTANT = "optimize again with that value"


def guards_of(
    gm: fx.GraphModule, ranges: Mapping[Any, Any] | None = None, code: Sequence[str] = (), smallest: Mapping[str, int] | None = None
) -> Guards | None:
    """The guards of an exported graph; None if its placeholders carry no values.

    Args:
        gm: `ExportedProgram.module()`.
        ranges: what free sizes may be, by symbol.
        code: further conditions as torch writes them, over `L['x'].size()[1]`.
        smallest: limits from below that the caller has stated, by `x.shape[1]`; torch itself says 2 for all free sizes that were
            not 1 in the example, which 1 need not heed.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if not placeholders or any("val" not in n.meta for n in placeholders):
        return None
    names, structures, labels = _signature(gm, len(placeholders))
    values = [n.meta["val"] for n in placeholders]
    places = _places(values)
    inputs = tuple(Input(label, _captured(v, ranges), _rank(v)) for label, v in zip(labels, values, strict=True))
    conditions: list[Condition] = []
    for i, value in enumerate(values):
        conditions += _own(i, value, labels, places, ranges or {}, smallest or {})
    for expression in [*_traced(values), *(_from_torch(c, gm, labels) for c in code)]:
        condition = None if expression is None else _relation(expression, labels, places)
        if condition is not None and condition not in conditions:
            conditions.append(condition)
    nested = structures if any(not s.is_leaf() for s in structures) else None
    return Guards(names, inputs, tuple(conditions), nested)


def guards_of_signature(forward: Callable[..., Any]) -> Guards | None:
    """The guards of a graph that was traced without inputs: their names, and the flags that were fixed to their defaults.

    Sizes are free. None for a function that takes any number of inputs.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    fixed = {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, bool | str)}
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    names = tuple(p.name for p in parameters)
    inputs = tuple(Input(name, repr(fixed[name]) if name in fixed else "any value", None) for name in names)
    conditions = tuple(_constant(i, fixed[name]) for i, name in enumerate(names) if name in fixed)
    return Guards(names, inputs, conditions, optional={p.name: p.default for p in parameters if p.default is not p.empty})


def _signature(gm: fx.GraphModule, count: int) -> tuple[tuple[str, ...], tuple[Any, ...], list[str]]:
    """Parameters of forward, the nesting of each, and a name for every leaf."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
        return tuple(names), (pytree.tree_structure(0),) * count, names
    positional, keyword = children(info.in_spec)
    structures = (*children(positional), *children(keyword))
    names = [str(a) for a in info.orig_args]
    labels = [f"{name}{path}" for name, s in zip(names, structures, strict=True) for path in _paths(s)]
    return tuple(names), structures, labels


def _paths(structure: Any) -> list[str]:
    if structure.is_leaf():
        return [""]
    whole = pytree.tree_unflatten(range(structure.num_leaves), structure)
    try:
        return [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(whole)]
    except ValueError:  # a class that is registered without keys
        return [f"[{i}]" for i in range(structure.num_leaves)]


def _places(values: Sequence[Any]) -> dict[str, str]:
    """Where each symbol can be read off: `s77` -> `v0.shape[1]`, also from `2*s77`."""
    places: dict[str, str] = {}
    derived: list[tuple[str, Any]] = []
    for place, size in _sizes(values):
        expression = None if isinstance(size, int) else size.node.expr
        if expression is not None and expression.is_Symbol:
            places.setdefault(str(expression), place)
        elif expression is not None:
            derived.append((place, expression))
    for place, expression in derived:
        unknown = [s for s in expression.free_symbols if str(s) not in places]
        if len(unknown) == 1:
            step, start = expression.diff(unknown[0]), expression.subs(unknown[0], 0)
            if step.is_Integer and start.is_Integer and int(step) > 0:
                places[str(unknown[0])] = f"(({place} - {int(start)}) // {int(step)})"
    return places


def _sizes(values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            yield from ((f"v{i}.shape[{d}]", size) for d, size in enumerate(sizes_of(value)))
        elif isinstance(value, torch.SymInt):
            yield f"v{i}", value


def _rank(value: Any) -> int | None:
    return value.ndim if isinstance(value, Tensor) else 0 if isinstance(value, torch.SymInt) else None


def _captured(value: Any, ranges: Mapping[Any, Any] | None) -> str:
    if isinstance(value, Tensor):
        sizes = [str(d) if isinstance(d, int) else _free(d.node.expr, ranges or {}) for d in sizes_of(value)]
        return f"{dtype_name(value.dtype)}[{', '.join(sizes)}]"
    return "a free number" if isinstance(value, torch.SymInt) else _text(value)


def _free(expression: Any, ranges: Mapping[Any, Any]) -> str:
    low, high = _limits(ranges.get(expression))
    return "any" if low <= 2 and high is None else f"{low}…{'' if high is None else high}"


def _limits(span: Any) -> tuple[int, int | None]:
    if span is None:
        return 0, None
    low = int(span.lower) if span.lower.is_Integer else 0
    return low, int(span.upper) if span.upper.is_Integer else None


def _own(
    i: int, value: Any, labels: Sequence[str], places: Mapping[str, str], ranges: Mapping[Any, Any], smallest: Mapping[str, int]
) -> Iterator[Condition]:
    """Conditions on one leaf: its dtype, its fixed sizes, the limits of its free ones."""
    if not isinstance(value, (Tensor, torch.SymInt)):
        yield _constant(i, value)
        return
    if isinstance(value, Tensor):
        yield Condition(f"v{i}.dtype is torch_{dtype_name(value.dtype)}", i, "", _AGAIN)
        sizes = sizes_of(value)
        if all(isinstance(d, int) for d in sizes):
            yield Condition(f"v{i}.shape == {tuple(sizes)}", i, "", _ENLARGE)
            return
        yield Condition(f"len(v{i}.shape) == {value.ndim}", i, "", _AGAIN)
    else:
        yield Condition(f"type(v{i}) is int", i, "", _AGAIN)
    for place, size in _sizes([None] * i + [value]):
        where = re.sub(rf"^v{i}", labels[i], place)
        if isinstance(size, int):
            yield Condition(f"{place} == {size}", i, f"{where} must be {size}", _ENLARGE)
            continue
        expression = size.node.expr
        low, high = _limits(ranges.get(expression))
        low = max(low if low > 2 else 0, smallest.get(where, 0))
        if low > 0:
            yield Condition(f"{place} >= {low}", i, f"{where} must be at least {low}", _WIDEN)
        if high is not None:
            yield Condition(f"{place} <= {high}", i, f"{where} must be at most {high}", _WIDEN)
        same = _code(_printed(expression), places)
        if same is not None and same != place:
            told = f"of the form {expression}" if place in same else _told(same, labels)
            yield Condition(f"{place} == {same}", i, f"{where} must be {told}", _AGAIN)


def _constant(i: int, value: Any) -> Condition:
    if value is None:
        return Condition(f"v{i} is None", i, "", _CONSTANT)
    if isinstance(value, float) and value != value:
        return Condition(f"v{i} != v{i}", i, "", _CONSTANT)
    if type(value) in (bool, int, float, str):
        literal = f"float({str(value)!r})" if isinstance(value, float) else repr(value)
        return Condition(f"type(v{i}) is {type(value).__name__} and v{i} == {literal}", i, "", _CONSTANT)
    return Condition(f"repr(v{i}) == {repr(value)!r}", i, "", _CONSTANT)  # a dtype, a device


def _traced(values: Sequence[Any]) -> list[str]:
    """Conditions that the model's own code asked about while it was traced, without those that are implied."""
    env = next((v.fake_mode.shape_env for v in values if isinstance(v, FakeTensor)), None)
    simple = () if env is None else (env.simplify(guard.expr) for guard in env.guards)
    return [_printed(e) for e in simple if e.free_symbols]


def _printed(expression: Any) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expression))


def _from_torch(code: str, gm: fx.GraphModule, labels: Sequence[str]) -> str | None:
    """`L['x'].size()[1] % 4 == 0` -> `v0.shape[1] % 4 == 0`; None for what is about no input."""
    for i, label in enumerate(labels):
        name = re.match(r"\w+", label)
        if name is not None:
            code = code.replace(f"L[{name[0]!r}]{label[name.end() :]}.size()", f"v{i}.shape")
    return None if "L[" in code else code


def _relation(expression: str, labels: Sequence[str], places: Mapping[str, str]) -> Condition | None:
    code = _code(expression, places)
    if code is None:
        return None
    first = re.search(r"\bv(\d+)\b", code)
    return None if first is None else Condition(f"({code})", int(first[1]), f"{_told(code, labels)} must hold", _AGAIN)


def _told(code: str, labels: Sequence[str]) -> str:
    return re.sub(r"\bv(\d+)\b", lambda m: labels[int(m[1])], code)


_PARTS = (
    ast.Expression, ast.Load, ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp,
    ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_CALLS = {"torch.sym_min": "min", "torch.sym_max": "max", "min": "min", "max": "max"}


def _code(expression: str, places: Mapping[str, str]) -> str | None:
    """The expression over `v0.shape[1]` instead of symbols; None if it is about anything but sizes of the inputs.

    Files hold such expressions, too: what is no plain arithmetic is not evaluated.
    """
    text = re.sub(r"torch\.sym_(min|max)\b", r"\1", expression)
    text = re.sub(r"\b[a-z]+\d+\b(?!\.shape)", lambda m: places.get(m[0], m[0]), text)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, RecursionError, ValueError):
        return None
    return text.strip() if all(_is_plain(node) for node in ast.walk(tree)) else None


def _is_plain(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in ("min", "max") or re.fullmatch(r"v\d+", name) is not None
        case ast.Attribute(value=ast.Name(), attr=attr):
            return attr == "shape"
        case ast.Constant(value=value):
            return isinstance(value, int)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return name in _CALLS
        case _:
            return isinstance(node, _PARTS) and not isinstance(node, (ast.Attribute, ast.Call))
