"""From what `torch.fx` records - torch functions, tensor methods, Python operators - to ATen calls, node by node.

A name that PyTorch and ATen share needs no entry: `overloads.resolve` finds it by schema. The tables here hold the rest: operators,
casts, and functions whose Python body looks at shapes. What neither knows stays as it was traced and keeps working.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from normfuse.capture.symbolic.indexing import lower_index
from normfuse.capture.symbolic.kinds import attribute_kind, name_of, overload_kind, placeholder_kind, proven_tensors
from normfuse.capture.symbolic.overloads import Kind, resolve

__all__ = ["WRITES", "Lowering", "to_aten"]

aten = torch.ops.aten

# fmt: off
_OPERATORS: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.pow: "pow",
    operator.iadd: "add_", operator.isub: "sub_", operator.imul: "mul_", operator.itruediv: "div_", operator.ipow: "pow_",
    operator.floordiv: "floor_divide", operator.mod: "remainder", operator.matmul: "matmul",
    operator.neg: "neg", operator.pos: "positive", operator.abs: "abs", operator.invert: "bitwise_not",
    operator.and_: "__and__", operator.or_: "__or__", operator.xor: "__xor__",
    operator.lt: "lt", operator.le: "le", operator.gt: "gt", operator.ge: "ge", operator.eq: "eq", operator.ne: "ne",
}
_CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16, "bool": torch.bool,
    "int": torch.int32, "long": torch.int64, "short": torch.int16, "char": torch.int8, "byte": torch.uint8,
}
_UPSAMPLES = {
    ("nearest", 3): "upsample_nearest1d", ("nearest", 4): "upsample_nearest2d", ("nearest", 5): "upsample_nearest3d",
    ("linear", 3): "upsample_linear1d", ("bilinear", 4): "upsample_bilinear2d", ("bicubic", 4): "upsample_bicubic2d",
    ("trilinear", 5): "upsample_trilinear3d",
}
# fmt: on
WRITES = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "pow", "floordiv", "mod", "and", "or", "xor")}
_DUNDERS = {f"__{op.__name__.strip('_')}__": op for op in (*_OPERATORS, operator.getitem)}
_MODE_RANKS = {"linear": 3, "bilinear": 4, "bicubic": 4, "trilinear": 5}
_FACTS = ("rank", "dtypes", "takes")  # of a value; what it is computed from on the way has its own
_PROPERTIES = {"T": "numpy_T", "mT": "mT", "H": "matrix_H", "mH": "mH"}


def to_aten(graph: fx.Graph) -> fx.Graph:
    """Lower every node of a traced graph that can be lowered, in place; dead nodes without effects are dropped."""
    lowering = Lowering(graph)
    for node in list(graph.nodes):
        lowering.visit(node)
    for node in graph.nodes:
        node.meta["kind"] = lowering.kind(node)
    graph.eliminate_dead_code(_has_effect)
    return graph


def _has_effect(node: fx.Node) -> bool:
    """May somebody see that the node ran, other than through its value?"""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.target is torch._assert and node.args[0] is True:
        return False
    name = str(getattr(node.target, "__name__", ""))
    is_check, is_write = (
        name.startswith("_assert"),
        node.target in WRITES or name.endswith("_") or node.kwargs.get("out") is not None,
    )
    return node.op == "call_module" or is_write or is_check or node.is_impure(impure_random=False)


class Lowering:
    """One walk over a graph in execution order; `kinds` knows what every value seen so far is."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.kinds: dict[fx.Node, Kind] = {}
        self.proven = proven_tensors(graph)
        self.node: fx.Node | None = None
        self.last_part: dict[fx.Node, fx.Node] = {}

    def kind(self, node: fx.Node) -> Kind:
        return self.kinds.get(node)

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and self.kind(value) == "tensor"

    def emit(self, overload: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in front of the node that is being lowered, with its provenance."""
        assert self.node is not None
        with self.graph.inserting_before(self.node):
            new = self.graph.create_node("call_function", overload, args, kwargs, name=_node_name(overload))
        new.meta = {k: v for k, v in self.node.meta.items() if k not in _FACTS}
        self.kinds[new] = self.kind_of_item(*args) if overload is operator.getitem else overload_kind(overload)
        self.gather_part(new)
        return new

    def call(self, name: str, *args: Any, **kwargs: Any) -> fx.Node | None:
        """The ATen call of that name, or None when no overload takes these arguments."""
        return self.emit_found(resolve(name, args, kwargs, self.kind))

    def emit_found(self, found: Any) -> fx.Node | None:
        """The call of an overload with its arguments; several results only where no reader could tell a list from a named tuple."""
        if found is None:
            return None
        overload, args, kwargs = found
        assert self.node is not None
        if overload_kind(overload) == "tensors" and not all(_reads_part(user, overload) for user in self.node.users):
            self.kinds[self.node] = "tensors"
            return None
        return self.emit(overload, *args, **kwargs)

    def visit(self, node: fx.Node) -> None:
        """Replace `node` by its ATen form, or note what kind of value it stays."""
        self.node = node
        new = None
        match node.op:
            case "call_function":
                new = self.function(node.target, node.args, dict(node.kwargs))
            case "call_method":
                new = self.method(str(node.target), node.args, dict(node.kwargs))
        if new is None:
            self.kinds[node] = self.kinds.get(node) or self.kind_of_rest(node)
            self.gather_part(node)
        else:
            new.meta = {k: node.meta[k] for k in _FACTS if k in node.meta} | new.meta
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def gather_part(self, node: fx.Node) -> None:
        """Move one of several results right behind the call that makes them, where export has it."""
        if node.target is not operator.getitem or not isinstance(source := node.args[0], fx.Node) or self.kind(source) != "tensors":
            return
        last = self.last_part.get(source, source)
        last.append(node)
        self.last_part[source] = node

    def function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
        if isinstance(target, torch._ops.OpOverload):
            return None
        if isinstance(target, torch._ops.OpOverloadPacket):
            return self.call(target.__name__, *args, **kwargs) if target._qualified_op_name.startswith("aten::") else None
        if target is builtins.getattr:
            return self.attribute(*args)
        if target is operator.getitem:
            return self.getitem(*args)
        if target in _OPERATORS:
            return self.arithmetic(target, args)
        if target is torch._assert and isinstance(args[0], fx.Node):
            self.drop_shape_check(args[0])
            return None
        if target in _FUNCTIONS:
            return self.by_table(_FUNCTIONS[target], args, kwargs)
        name = name_of(target)
        if name in _METHODS:
            return self.by_table(_METHODS[name], args, kwargs)
        return None if name is None else self.call(name, *args, **kwargs)

    def method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
        if not self.is_tensor(args[0]):
            return None
        if name in _DUNDERS:
            return self.function(_DUNDERS[name], args, kwargs)
        if name in _CASTS and len(args) == 1 and not kwargs:
            return self.emit(aten.to.dtype, args[0], _CASTS[name])
        if name in _METHODS:
            return self.by_table(_METHODS[name], args, kwargs)
        if name == "where":
            return self.call("where", args[1], args[0], *args[2:], **kwargs) if len(args) == 3 else None
        found = resolve(name, args, kwargs, self.kind, method=True)
        # x.polygamma(n) is polygamma(n, x): only a schema that begins with the tensor is the method
        is_method = found is not None and found[0]._schema.arguments[0].name == "self"
        return self.emit_found(found) if is_method else None

    def by_table(self, lower: Callable[..., fx.Node | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
        """What a function of the tables makes of a call; None for a spelling of the arguments that it does not know."""
        try:
            inspect.signature(lower).bind(self, *args, **kwargs)
        except TypeError:
            return None
        return lower(self, *args, **kwargs)

    def attribute(self, x: Any, name: str, *default: Any) -> fx.Node | None:
        """`x.mT`, or a result by its name, as in `x.max(1).values`."""
        if not isinstance(x, fx.Node) or default:
            return None
        if self.is_tensor(x):
            return self.call(_PROPERTIES[name], x) if name in _PROPERTIES else None
        names = _result_names(x.target)
        return self.emit(operator.getitem, x, names.index(name)) if name in names else None

    def getitem(self, x: Any, index: Any) -> fx.Node | None:
        if self.is_tensor(x):
            return lower_index(self.emit, x, index, self.kind)
        is_size = isinstance(x, fx.Node) and self.kind(x) == "size"
        if is_size and isinstance(index, int) and _is_shape(x):
            return self.emit(aten.sym_size.int, x.args[0], index)
        return None

    def drop_shape_check(self, condition: fx.Node) -> None:
        """Remove `torch._assert` of a rank or of sizes, as export removes its guards; a rank is kept as `meta["rank"]`."""
        assert self.node is not None
        if not self.reads_sizes_only(condition) or not self.node.args:
            return
        if condition.target is operator.eq and isinstance(condition.args[1], int) and _is_rank(condition.args[0]):
            condition.args[0].args[0].meta.setdefault("rank", condition.args[1])  # type: ignore[union-attr]
        self.node.args = (True, *self.node.args[1:])

    def reads_sizes_only(self, value: Any) -> bool:
        if not isinstance(value, fx.Node):
            return isinstance(value, int | float)
        if value.target is aten.sym_size.int or (self.kind(value) in ("size", "number") and _is_rank(value)):
            return True
        return value.target in _OPERATORS and all(self.reads_sizes_only(a) for a in value.args)

    def arithmetic(self, target: Any, args: tuple[Any, ...]) -> fx.Node | None:
        left = args[0]
        right = args[1] if len(args) > 1 else left
        if self.is_tensor(left):
            return self.call(_OPERATORS[target], *args)
        if target in WRITES and self.kind_of_arithmetic(args) in ("number", "size"):
            assert self.node is not None
            self.node.target = getattr(operator, target.__name__[1:])  # numbers are not written to: `n += 1` makes another one
            return None
        if not self.is_tensor(right) or not (isinstance(left, int | float) or self.kind(left) in (None, "number")):
            return None
        # a number in front: Tensor.__radd__ and its kin
        known = not isinstance(left, fx.Node) or self.kind(left) == "number"
        match _OPERATORS[target]:
            case "add" | "mul" as name:
                return self.call(name, right, left)
            case "sub" if known:
                return self.call("rsub", right, left)
            case "div" if known:
                return self.call("mul", self.emit(aten.reciprocal.default, right), left)
            case "pow" if known:
                return self.call("pow", left, right)
        return None

    def kind_of_rest(self, node: fx.Node) -> Kind:
        """Kind of a node that was not lowered."""
        found: Kind = None
        match node.op:
            case "placeholder":
                found = placeholder_kind(node)
            case "get_attr":
                found = "tensor"
            case "call_method" if self.is_tensor(node.args[0]):
                found = {"size": "size", "dim": "number", "numel": "number", "item": "number"}.get(str(node.target))
                found = "number" if found == "size" and len(node.args) + len(node.kwargs) > 1 else found
            case "call_function" if isinstance(node.target, torch._ops.OpOverload):
                found = overload_kind(node.target)
            case "call_function" if node.target is builtins.getattr and self.is_tensor(node.args[0]):
                found = attribute_kind(str(node.args[1]))
            case "call_function" if node.target is operator.getitem:
                found = self.kind_of_item(*node.args)
            case "call_function" if node.target in _OPERATORS:
                found = self.kind_of_arithmetic(node.args)
        return "tensor" if found is None and node in self.proven else found

    def kind_of_item(self, x: Any, index: Any) -> Kind:
        match self.kind(x) if isinstance(x, fx.Node) else None:
            case "tensor":
                return "tensor"
            case "tensors":
                return None if isinstance(index, slice) else "tensor"
            case "size":
                return "size" if isinstance(index, slice) else "number"
        return None

    def kind_of_arithmetic(self, args: tuple[Any, ...]) -> Kind:
        kinds = {self.kind(a) if isinstance(a, fx.Node) else "size" if isinstance(a, tuple | list) else "number" for a in args}
        if "tensor" in kinds:
            return "tensor"
        return "size" if kinds == {"size"} else "number" if kinds == {"number"} else None


def _result_names(target: Any) -> list[str]:
    return [r.name for r in target._schema.returns if r.name] if isinstance(target, torch._ops.OpOverload) else []


def _reads_part(user: fx.Node, overload: Any) -> bool:
    """Does the user read one result by number or by its name, or is it a function of torch that takes any sequence of tensors?"""
    if user.target is operator.getitem:
        return isinstance(user.args[1], int)
    if user.target is builtins.getattr:
        return user.args[1] in _result_names(overload)
    return user.op == "call_function" and name_of(user.target) is not None


def _node_name(overload: Any) -> str:
    if overload is operator.getitem:
        return "getitem"
    return str(overload._schema.name.split("::")[-1])


def _is_shape(node: fx.Node) -> bool:
    """`x.shape` or `x.size()`, not a slice of one."""
    return node.target == "size" if node.op == "call_method" else node.target is builtins.getattr and str(node.args[1]) == "shape"


def _is_rank(value: Any) -> bool:
    """`x.ndim` or `x.dim()`."""
    if not isinstance(value, fx.Node):
        return False
    return value.target == "dim" if value.op == "call_method" else value.target is builtins.getattr and str(value.args[1]) == "ndim"


def _size(low: Lowering, x: fx.Node, dim: Any = None) -> fx.Node | None:
    return None if dim is None else low.emit(aten.sym_size.int, x, dim)


def _split(low: Lowering, x: Any, size: Any, dim: Any = 0) -> fx.Node | None:
    # torch.split also takes the name split_size_or_sections; passed by name it stays as it is
    if isinstance(size, int) or (isinstance(size, fx.Node) and low.kind(size) == "number"):
        return low.call("split", x, size, dim)
    return low.call("split_with_sizes", x, size, dim)


def _norm(
    low: Lowering, x: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> fx.Node | None:
    if out is not None or p == "nuc" or p is None or (p == "fro" and not (dim is None or isinstance(dim, int) or len(dim) <= 2)):
        return None
    dims = [dim] if isinstance(dim, int) else dim
    if p == "fro" and dims is None and not keepdim and dtype is None:
        return low.call("linalg_vector_norm", x)
    return low.call("linalg_vector_norm", x, 2 if p == "fro" else p, dims, keepdim, dtype=dtype)


def _cast(low: Lowering, x: Any, dtype: Any) -> fx.Node | None:
    known = isinstance(dtype, torch.dtype) or (isinstance(dtype, fx.Node) and low.kind(dtype) == "dtype")
    return low.emit(aten.to.dtype, x, dtype) if known else None


def _to(low: Lowering, x: Any, *args: Any, **kwargs: Any) -> fx.Node | None:
    # only the forms whose ATen call does not have to make up a dtype for a device
    other = args[0] if args else kwargs.get("dtype", kwargs.get("other"))
    if isinstance(other, torch.dtype) or (isinstance(other, fx.Node) and low.kind(other) in ("dtype", "tensor")):
        return low.call("to", x, *args, **kwargs)
    return None


def _group_norm(
    low: Lowering, input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> fx.Node | None:
    return low.call("group_norm", input, num_groups, weight, bias, eps, False)


def _glu(low: Lowering, input: Any, dim: int = -1) -> fx.Node | None:
    return low.call("glu", input, dim)


def _feature_dropout(low: Lowering, input: Any, p: Any = 0.5, training: Any = True, inplace: bool = False) -> fx.Node | None:
    return low.call("feature_dropout_" if inplace else "feature_dropout", input, p, training)


def _interpolate(
    low: Lowering,
    input: fx.Node,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> fx.Node | None:
    given = size if scale_factor is None else scale_factor
    rank = _MODE_RANKS.get(mode) or (len(given) + 2 if isinstance(given, list | tuple) else input.meta.get("rank"))
    if rank not in (3, 4, 5) or recompute_scale_factor or antialias or (mode, rank) not in _UPSAMPLES:
        return None
    input.meta.setdefault("rank", rank)
    sizes, scales = (v if v is None or isinstance(v, list | tuple) else [v] * (rank - 2) for v in (size, scale_factor))
    corners = () if mode == "nearest" else (bool(align_corners),)
    return low.call(_UPSAMPLES[mode, rank], input, sizes, *corners, scales)


def _einsum(low: Lowering, equation: Any, *operands: Any) -> fx.Node | None:
    listed = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    return low.call("einsum", equation, list(listed)) if isinstance(equation, str) else None


# tensor methods and built-in functions whose arguments differ from ATen's
_METHODS: dict[str, Callable[..., fx.Node | None]] = {"size": _size, "split": _split, "norm": _norm, "type": _cast, "to": _to}
# functions with a Python body that looks at shapes, so that it cannot be traced through
_FUNCTIONS: dict[Any, Callable[..., fx.Node | None]] = {
    F.group_norm: _group_norm,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    F.glu: _glu,
    F.interpolate: _interpolate,
    torch.norm: _norm,
    torch.split: _split,
    torch.einsum: _einsum,
}
