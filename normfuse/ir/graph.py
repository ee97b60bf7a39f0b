"""The graph that passes work on: ATen calls, constants beside it, provenance on every node."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from normfuse.errors import RewriteError
from normfuse.ir.attribute_names import attribute_names
from normfuse.ir.constants import Constant, sharing
from normfuse.ir.decode import decode, pieces
from normfuse.ir.fakes import on_fakes
from normfuse.ir.optimized import OptimizedGraph
from normfuse.ir.views import Op, Value, affine
from normfuse.ir.wording import operator_name
from normfuse.reports.model import Site

__all__ = ["Graph", "Refuse", "identity_of", "path_of"]

log = logging.getLogger(__name__)

_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node", "rank")


class Refuse(Exception):
    """Raised by a rule that recognises a site but may not rewrite it.

    Args:
        reason: why, in one clause, naming what was found.
        blocker: the node that stands in the way, if there is one.
        remedy: the cheapest change to the model or the call that would unblock the rewrite.

    Attributes:
        rule: what the report calls the rule that refused; empty for the rule that was asked.
    """

    def __init__(self, reason: str, *, blocker: fx.Node | None = None, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.blocker = blocker
        self.remedy = remedy
        self.rule = ""


class Modules(Protocol):
    """What rules ask when the result is to be written back into modules, which cannot compute everything (`ModuleTree`).

    The checks raise `Refuse`. `own` counts the operators that a module computes itself, by class of view and module path.
    """

    own: dict[str, Counter[type]]

    def check(self, old: Value, new: Op) -> None: ...

    def check_value(self, constant: Constant, reader: fx.Node | None, *, for_all: bool = False) -> None: ...

    def check_release(self, graph: Graph, node: fx.Node, *, whole: bool) -> None: ...

    def released(self, graph: Graph, node: fx.Node) -> None: ...

    def moves(self, old: Constant, new: Constant) -> None: ...

    def why_no_rms_norm(self, path: str) -> str: ...


class Graph:
    """A graph of ATen calls whose parameters are constants that are replaced, never overwritten.

    Attributes:
        fx: the underlying `torch.fx` graph. Every `get_attr` node that reads a tensor has its target in `constants`.
        constants: constants by name.
        tree: the modules that the result is to be written back into, which limits what rules may do; None for no such limit.
    """

    def __init__(self, graph: fx.Graph, constants: dict[str, Constant], owner: nn.Module) -> None:
        self.fx = graph
        self.constants = constants
        self.tree: Modules | None = None
        self._owner = owner  # holds what is neither tensor nor operator: leaf modules, subgraphs of control flow
        self._fresh = 0
        self._keys = {id(c): key for key, c in constants.items()}

    # -- making and leaving ------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Graph:
        """A graph over the tensors of `gm`, which is not changed; a tensor known under two names is one constant."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        graph.set_codegen(gm.graph._codegen)
        for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
            new.meta = dict(old.meta)
        made = cls(graph, {}, gm)
        made._collect()
        return made

    def _collect(self) -> None:
        first: dict[Any, fx.Node] = {}
        for node in list(self.fx.nodes):
            if node.op != "get_attr":
                continue
            tensor = _attribute(self._owner, str(node.target))
            if not isinstance(tensor, Tensor):
                continue
            key = identity_of(tensor)
            if key in first:
                node.replace_all_uses_with(first[key])
                self.fx.erase_node(node)
                continue
            first[key] = node
            self.constants[str(node.target)] = Constant.of(tensor, str(node.target))
        self._keys = {id(c): key for key, c in self.constants.items()}

    def copy(self) -> Graph:
        """An independent copy; constants are shared, since nobody writes to them."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.fx, {}))
        graph.set_codegen(self.fx._codegen)
        for old, new in zip(self.fx.nodes, graph.nodes, strict=True):
            new.meta, new.name = dict(old.meta), old.name
        made = Graph(graph, dict(self.constants), self._owner)
        made._fresh, made.tree = self._fresh, self.tree
        return made

    def become(self, other: Graph) -> None:
        """Take another graph's nodes and constants, as of a copy that was made before a change."""
        self.fx, self.constants = other.fx, other.constants
        self._keys, self._fresh = other._keys, max(self._fresh, other._fresh)

    @torch.inference_mode(False)
    def to_module(self, name: str = "Optimized") -> fx.GraphModule:
        """A GraphModule of its own: constants cast once to their dtype, nothing shared with the original unless `sharing`."""
        self.clean()
        names = self._final_names()
        root = nn.Module()
        leaves = [str(n.target) for n in self.fx.find_nodes(op="call_module")]
        for path in sorted(leaves, key=len):  # whole modules first: constants may lie inside them
            _place_module(root, path, _attribute(self._owner, path))
        for node in self.fx.nodes:
            if node.op == "get_attr" and node.target in self.constants:
                constant = self.constants[node.target]
                node.target = names[node.target]
                native = constant.native
                shared = (constant.tensor is not None and not sharing()) or native.is_inference()
                _place(root, node.target, native.clone() if shared else native.contiguous(), self._owner, constant)
            elif node.op == "get_attr":
                _place_module(root, str(node.target), _attribute(self._owner, str(node.target)))
        self.constants = {names[k]: Constant.of(_attribute(root, names[k]), names[k]) for k in self.constants}
        meta = {k: v for k, v in getattr(self._owner, "meta", {}).items() if k != "normfuse_record"}
        gm = OptimizedGraph.of(root, self.fx, name, meta)
        gm.graph.lint()
        gm.training = False
        for module in gm.modules():
            module.training = False
        return gm

    def _final_names(self) -> dict[str, str]:
        """Names for the state dict: an expression takes the name of the weight it replaces, if that one is gone."""
        names: dict[str, str] = {k: k for k, c in self.constants.items() if c.tensor is not None and k == c.name}
        taken = set(names.values()) | {
            f"{n.target}.{name}" for n in self.fx.find_nodes(op="call_module") for name in _tensor_names(self.owned(str(n.target)))
        }
        for key, constant in self.constants.items():
            if key in names:
                continue
            base = constant.name or key
            name, number = base, 0
            while name in taken or any(t.startswith(name + ".") for t in taken):
                number += 1
                name = f"{base}_{number}"
            names[key] = name
            taken.add(name)
        readable = attribute_names(names.values())
        return {key: readable[name] for key, name in names.items()}

    # -- reading -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[fx.Node]:
        """The nodes in execution order, as they are now: rules may change the graph while it is walked."""
        return iter(list(self.fx.nodes))

    def operand(self, arg: Any, depth: int = 1) -> Any:
        """What an argument means to a rule: a view, a constant, or the literal itself."""
        if not isinstance(arg, fx.Node):
            return arg
        constant = self.constant(arg)
        return constant if constant is not None else self.view(arg, depth)

    def view(self, node: fx.Node, depth: int = 3) -> Value:
        """The view of a node; operands are looked into down to `depth`, beyond that they are plain values."""
        if depth == 0:
            return Value(node=node)
        return decode(node, lambda arg: self.operand(arg, depth - 1)) or Value(node=node)

    @staticmethod
    def decode(node: fx.Node, operand: Callable[[Any], Any]) -> Value:
        """The view of a node whose arguments are read by `operand` instead of from the graph."""
        return decode(node, operand) or Value(node=node)

    def constant(self, node: fx.Node) -> Constant | None:
        return self.constants.get(str(node.target)) if node.op == "get_attr" else None

    def readers_of(self, constant: Constant) -> list[fx.Node]:
        """The operators that read this very constant: more than one for a tied embedding or a shared module."""
        key = self._keys.get(id(constant))
        return [] if key is None else [user for n in self.fx.find_nodes(op="get_attr", target=key) for user in n.users]

    def shared(self, constant: Constant) -> bool:
        return len(self.readers_of(constant)) > 1

    @staticmethod
    def consumers(node: fx.Node) -> tuple[fx.Node, ...]:
        """Its users without those that only look at its shape."""
        return tuple(user for user in node.users if not _reads_shape_only(user, node))

    @classmethod
    def readers(cls, node: fx.Node) -> tuple[fx.Node, ...]:
        """Who reads the value: its consumers, with the pieces of a split in place of the split."""
        return tuple(r for user in cls.consumers(node) for r in (tuple(user.users) if pieces(user) else (user,)))

    def owned(self, path: str) -> Any:
        """What a `call_module` or a `get_attr` that is no tensor refers to."""
        return _attribute(self._owner, path)

    @property
    def _device(self) -> torch.device:
        """Of the model's constants, whatever the default device is."""
        return next((c.tensor.device for c in self.constants.values() if c.tensor is not None), torch.device("cpu"))

    @property
    def fake_mode(self) -> Any:
        return torch._guards.detect_fake_mode([n.meta["val"] for n in self.fx.nodes if isinstance(n.meta.get("val"), Tensor)][:1])

    # -- modules --------------------------------------------------------------------------------------------------------

    def check(self, old: Value, new: Op) -> None:
        """May an operator become that one? Asked for each operator of a rewrite that is spread over many.

        Raises:
            Refuse: the result is to be written back into modules, and theirs cannot compute `new`.
        """
        if self.tree is not None:
            self.tree.check(old, new)

    # -- writing -----------------------------------------------------------------------------------------------------

    def emit(self, value: Any, before: fx.Node, like: fx.Node | None = None) -> Any:
        """Nodes for a value that a rule has built, placed before `before`.

        Args:
            value: an `Op` without a node becomes a call, a `Constant` a `get_attr`, a `Value` its own node.
            before: the first node that may use it.
            like: the node whose provenance (module path, stack trace) new nodes take; default `before`.
        """
        like = like or before
        if isinstance(value, Constant):
            path = path_of(like)
            name = value.name or (f"{path}.constant" if re.fullmatch(r"[\w.]+", path) else "constant")
            return self.emit_constant(value if value.name else value.named(name), before)
        if not isinstance(value, Value):
            return type(value)(self.emit(v, before, like) for v in value) if isinstance(value, (list, tuple)) else value
        if value.node is not None:
            return value.node
        if not isinstance(value, Op):
            raise RewriteError(f"a rule returned {value!r}, which is neither a node nor an operator")
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("node", "target")]
        args = [self.emit(getattr(value, f), before, like) for f in fields]
        return self.call(value.operator, tuple(args), before, like)

    def call(
        self, target: Any, args: tuple[Any, ...], before: fx.Node, like: fx.Node, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A call of an operator; arguments are cut to its schema, keyword-only ones moved to where they belong."""
        kwargs = dict(kwargs or {})
        if isinstance(target, torch._ops.OpOverload):
            schema = target._schema.arguments
            for argument, value in list(zip(schema, args, strict=False))[::-1]:
                if argument.kwarg_only:
                    args = args[:-1]
                    if value != argument.default_value:
                        kwargs[argument.name] = value
            while args and len(args) <= len(schema) and _is_default(args[-1], schema[len(args) - 1]):
                args = args[:-1]
        with self.fx.inserting_before(before):
            node = self.fx.call_function(target, args, kwargs)
        node.meta = {k: like.meta[k] for k in _PROVENANCE if k in like.meta}
        self._propagate(node)
        return node

    def emit_constant(self, constant: Constant, before: fx.Node) -> fx.Node:
        """A `get_attr` node that reads the constant; one that the graph holds already is read again, not stored again."""
        key = self._keys.get(id(constant))
        if key is not None and self.constants.get(key) is constant:
            earlier: list[fx.Node] = [n for n in self.fx.find_nodes(op="get_attr", target=key) if n < before]
            if earlier:
                return earlier[0]
        else:
            key = self._new_key(constant)
        with self.fx.inserting_before(before):
            node = self.fx.create_node("get_attr", key, name=re.sub(r"\W", "_", constant.name or key))
        node.meta |= {"rank": constant.ndim, "dtypes": frozenset({constant.dtype})}
        mode = self.fake_mode
        if mode is not None:
            with on_fakes(mode):
                node.meta["val"] = torch.empty(constant.shape, dtype=constant.dtype, device=self._device)
        return node

    def _new_key(self, constant: Constant) -> str:
        self._fresh += 1
        while f"_constant_{self._fresh}" in self.constants:
            self._fresh += 1
        key = f"_constant_{self._fresh}"
        self.constants[key] = constant
        self._keys[id(constant)] = key
        return key

    def replace(self, node: fx.Node, value: Any) -> fx.Node:
        """Put `value` in the place of `node` for all its users; the old node dies with the next `clean`."""
        new = self.emit(value, node)
        if not isinstance(new, fx.Node):
            raise RewriteError(f"the replacement of {node.name} is not a tensor of the graph: {new!r}")
        if new is not node:
            if "dtypes" in node.meta:
                new.meta.setdefault("dtypes", node.meta["dtypes"])
            node.replace_all_uses_with(new)
        return new

    def refresh(self, node: fx.Node) -> None:
        """Compute the shape and dtype of a call again, after its arguments have changed."""
        self._propagate(node)

    def clean(self) -> None:
        """Remove what nobody reads: nodes and constants."""
        self.fx.eliminate_dead_code(is_impure_node=_effect)
        read = {str(n.target) for n in self.fx.nodes if n.op == "get_attr"}
        self.constants = {k: c for k, c in self.constants.items() if k in read}

    def _propagate(self, node: fx.Node) -> None:
        args = [a for a in node.all_input_nodes if "val" not in a.meta]
        mode = self.fake_mode
        if mode is None or args:
            return
        a, k = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with on_fakes(mode):
            node.meta["val"] = node.target(*a, **k)  # type: ignore[operator]

    # -- places ------------------------------------------------------------------------------------------------------

    def path(self, node: fx.Node) -> str:
        return path_of(node)

    def site(self, rule: str, node: fx.Node, refusal: Refuse | None = None, note: str = "") -> Site:
        """The report's entry for a rewrite at `node`, or for a refusal."""
        if refusal is None:
            return Site(rule, self.path(node), note)
        blocker = self.path(refusal.blocker) if refusal.blocker is not None else ""
        return Site(rule, self.path(node), refusal.reason, blocker, refusal.remedy)


def path_of(node: fx.Node) -> str:
    """Where a node comes from, as a user would say it: `layer3.0.bn2`; file and line for an operator at the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((p for p, _ in reversed(list(stack.values())) if p), "")
    path = re.sub(r"@\d+", "", path)
    if path:
        return str(path)
    name = operator_name(node) if node.op == "call_function" and node.target is not affine else node.name
    if node.op in ("placeholder", "output"):
        return node.name
    lines = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    return f"{name} ({PurePath(lines[-1][0]).name}:{lines[-1][1]})" if lines else node.name


_SHAPE_ONLY = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int}
_SHAPE_OF_SECOND = {torch.ops.aten.reshape_as.default, torch.ops.aten.view_as.default, torch.ops.aten.expand_as.default}


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    return user.target in _SHAPE_ONLY or (user.target in _SHAPE_OF_SECOND and user.args[0] is not node)


def _effect(node: fx.Node) -> bool:
    """Must the node stay although nobody reads it? A random draw that nobody reads need not, nor one of torch's own layers."""
    if node.op == "call_module":
        return False
    random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return node.is_impure() and not random


def _is_default(value: Any, argument: Any) -> bool:
    if not argument.has_default_value():
        return False
    default = argument.default_value
    return type(value) is type(default) and not isinstance(value, fx.Node) and value == default


def identity_of(tensor: Tensor) -> Any:
    """Two tensors are one constant if they are one object, or plain and the same window on one storage, read alike."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        return id(tensor)
    lazy = (tensor.is_conj(), tensor.is_neg())
    return (tensor.data_ptr() or id(tensor), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride(), *lazy)


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner


def _tensor_names(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))]


def _containers(root: nn.Module, parts: Iterable[str]) -> nn.Module:
    for part in parts:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


def _place(root: nn.Module, path: str, tensor: Tensor, owner: nn.Module, constant: Constant) -> None:
    *folders, leaf = path.split(".")
    parent = _containers(root, folders)
    if hasattr(parent, leaf):
        return
    original = _attribute(owner, constant.name) if constant.name else None
    if isinstance(original, nn.Parameter) or (original is None and tensor.is_floating_point()):
        parent.register_parameter(leaf, nn.Parameter(tensor, requires_grad=constant.trained))
    else:
        parent.register_buffer(leaf, tensor)


def _place_module(root: nn.Module, path: str, value: Any) -> None:
    *folders, leaf = path.split(".")
    parent = _containers(root, folders)
    if not hasattr(parent, leaf):
        setattr(parent, leaf, copy.deepcopy(value) if isinstance(value, nn.Module) else value)
