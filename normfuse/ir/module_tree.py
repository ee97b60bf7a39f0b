"""What a tree of modules can hold of a rewritten graph: other values in the same places, and norms that become less.

A graph may be given any operator; the modules of a model run the code of their classes. So a rewrite that is to be written back
may change the value of a parameter that one operator alone reads, give a bias to a layer whose class has one, and take a
normalization out of a module that does nothing else. Rules ask before they rewrite, and refuse with the reason.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse, identity_of
from normfuse.ir.views import (
    Add,
    Affine,
    BatchNorm,
    Div,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Mul,
    Op,
    RmsNorm,
    Sub,
    Value,
)  # fmt: skip
from normfuse.ir.wording import operator_name

__all__ = ["CORES", "ModuleTree"]

CORES = (LayerNorm, RmsNorm, GroupNorm)
"""Norms that compute statistics of their input; their gain and shift may leave them."""

_STATIC = (BatchNorm, InstanceNorm)
_ARITHMETIC = (Mul, Add, Sub, Div)


class ModuleTree:
    """The modules of a model, and where each constant of its graph lives in them.

    Args:
        model: the model as it was given; it is only looked at.

    Attributes:
        model: the model.
        own: views of the operators that each module computes itself, not its children, by module path.
        gains: stored gains that the code of a module multiplies by and that became one, with the path of that module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own: dict[str, Counter[type]] = {}
        self.gains: dict[str, str] = {}
        self._stored: dict[str, Constant] = {}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._places = _places(model)
        self._homes: dict[int, tuple[Constant, str]] = {}  # by id, which stands for an object as long as that is held here
        self._read_often: dict[str, str] = {}
        self._tied: dict[str, str] = {}
        self._norms: dict[str, list[Op]] = {}

    def read(self, graph: Graph) -> None:
        """Look at the graph of the model, cleaned up and not rewritten: where constants live, who reads them, who computes what."""
        for key, constant in graph.constants.items():
            names = self._places.get(identity_of(constant.tensor), []) if constant.tensor is not None else []
            if not names:
                continue
            home = names[0]
            self._homes[id(constant)], self._stored[home] = (constant, home), constant
            owners = {(id(self._modules[owner]), leaf) for owner, _, leaf in (name.rpartition(".") for name in names)}
            if len(owners) > 1:
                self._tied[home] = f"{home} is tied to {names[1]}"
            paths = [graph.path(user) for n in graph.fx.find_nodes(op="get_attr", target=key) for user in n.users]
            if len(paths) > 1:
                others = list(dict.fromkeys(paths))
                often = (
                    f"{home} is read by {' and '.join(others[:2])}" if len(others) > 1 else f"{others[0]} is called more than once"
                )
                self._read_often[home] = often
        for node in graph:
            if node.op == "call_function":
                path, op = graph.path(node), graph.view(node, 2)
                self.own.setdefault(path, Counter())[_kind(op)] += 1
                if isinstance(op, (*_STATIC, *CORES)):
                    self._norms.setdefault(path, []).append(op)

    def _shared(self, home: str) -> str:
        """Why the tensor may not take another value: somebody else reads it, or may; empty if nobody does."""
        return self._read_often.get(home) or self._tied.get(home, "")

    # -- reading ------------------------------------------------------------------------------------------------------

    def module(self, path: str) -> nn.Module | None:
        """The module at a path; None for the whole model and for what is no path."""
        return self._modules.get(path) if path else None

    def paths(self, module: nn.Module) -> list[str]:
        """All names of a module."""
        return [path for path, m in self._modules.items() if m is module]

    def home(self, constant: Constant) -> str | None:
        """Name of the parameter or buffer whose value the constant is, or is to become; None if it has no such place."""
        held = self._homes.get(id(constant))
        return held[1] if held is not None and held[0] is constant else None

    def written(self, graph: Graph) -> dict[str, Constant]:
        """The tensors that have another value in the rewritten graph, and biases that the model does not have yet."""
        found: dict[str, Constant] = {}
        for constant in graph.constants.values():
            name = self.home(constant)
            if name is not None and constant.tensor is None:
                found[name] = constant
        read = {self.home(c) for c in graph.constants.values()}
        for name in (gain for gain in self.gains if gain not in read):
            of = self._stored[name]
            found[name] = Constant.apply(torch.ones_like, of)
        return found

    def order(self, paths: Sequence[str]) -> list[int]:
        """When each of these modules, or one in it, first computes something; nothing for those that compute nothing."""
        firsts = [next((i for i, p in enumerate(self.own) if f"{p}.".startswith(f"{path}.")), None) for path in paths]
        return [i for i in firsts if i is not None]

    def rebuilt(self, path: str) -> str:
        """Path of the module around `path`, or itself, that is saved without its structure; empty where there is none."""
        parts = path.split(".") if path else []
        for i in range(len(parts) + 1):
            around = self._modules.get(".".join(parts[:i]))
            if around is not None and callable(getattr(around, "save_pretrained", None)):
                return ".".join(parts[:i]) or type(around).__name__
        return ""

    # -- permission ---------------------------------------------------------------------------------------------------

    def check(self, old: Value, new: Op) -> None:
        """May this operator become that one? Then the new constants take the places of the old ones.

        Raises:
            Refuse: the module runs other code than `new`, or its weight is not its own.
        """
        if not isinstance(old, Op) or type(old) is not type(new):
            raise Refuse(
                f"{_name(old)} would have to become {_name(new)}, which the code of its module does not say", blocker=old.node
            )
        for field in dataclasses.fields(new):
            if field.name in ("node", "target"):
                continue
            a, b = getattr(old, field.name), getattr(new, field.name)
            if isinstance(a, Constant) or isinstance(b, Constant):
                self._check_constant(old, a, b)
            elif not _same(a, b):
                raise Refuse(f"{field.name} of {_name(old)} is a number in the code of the model", blocker=old.node)

    def _check_constant(self, old: Op, a: Any, b: Any) -> None:
        if a is b:
            return
        if a is None and isinstance(b, Constant):
            self._homes[id(b)] = b, self._new_bias(old, b)
            return
        if not isinstance(a, Constant) or not isinstance(b, Constant) or a.shape != b.shape or a.dtype != b.dtype:
            raise Refuse(f"{_name(old)} would read a tensor of another shape", blocker=old.node)
        self.check_value(a, old.node)
        self.moves(a, b)

    def check_value(self, constant: Constant, reader: fx.Node | None, *, for_all: bool = False) -> None:
        """May this constant take another value where it lives?

        Args:
            constant: as the graph has it.
            reader: who reads it, for the reason.
            for_all: is the new value meant for all of its readers in the graph?

        Raises:
            Refuse: it lives nowhere, in a place that is not saved, or in one that others read too.
        """
        home = self.home(constant)
        if home is None:
            raise Refuse(f"{constant.name or 'its weight'} is computed by the code of the model, not stored", blocker=reader)
        why = self._tied.get(home, "") if for_all else self._shared(home)
        if why:
            raise Refuse(f"{why}, and a module has one value for all", blocker=reader)
        owner, _, leaf = home.rpartition(".")
        if leaf in self._modules[owner]._non_persistent_buffers_set:
            raise Refuse(f"{home} is not saved with the model", blocker=reader)

    def moves(self, old: Constant, new: Constant) -> None:
        """`new` takes the place of `old`, which may (`check_value`)."""
        home = self.home(old)
        assert home is not None
        self._homes[id(new)] = new, home

    def _new_bias(self, op: Op, bias: Constant) -> str:
        home = self.home(op.weight.value) if op.weight is not None and op.weight.bias_field else None
        owner, _, leaf = (home or "").rpartition(".")
        module = self._modules.get(owner) if home else None
        if module is None or leaf != "weight" or "bias" not in module._parameters or module._parameters["bias"] is not None:
            raise Refuse(f"{_name(op)} has no place for a bias", blocker=op.node)
        assert home is not None
        self._check_saved(owner, "would get a bias")
        if self._shared(home):
            raise Refuse(f"{self._shared(home)}, and a module has one value for all", blocker=op.node)
        return f"{owner}.bias" if owner else "bias"

    def _check_saved(self, path: str, what: str) -> None:
        around = self.rebuilt(path)
        if around:
            raise Refuse(
                f"{path} {what}, and {around} is rebuilt from its configuration when it is loaded (save_pretrained), without that",
                remedy="normfuse.optimize, which need not keep the classes",
            )

    def check_release(self, graph: Graph, node: fx.Node, *, whole: bool) -> None:
        """May the affine at this node go, so that its module does less?

        Args:
            graph: in which the affine stands.
            node: the affine.
            whole: does all of it go? Of a part, what stays must be one operator that the module can be: the gain of an RMSNorm.

        Raises:
            Refuse: its module does something else as well, is called more than once, or is rebuilt without knowing of it.
        """
        path, op = graph.path(node), graph.view(node, 2)
        assert isinstance(op, Affine)
        module = self.module(path)
        core = isinstance(op.x, CORES) and op.x.node is not None and graph.path(op.x.node) == path
        if not (whole or (core and isinstance(op.x, RmsNorm))):
            raise Refuse("a part of it would stay, for which its module has no code", blocker=node)
        origin = node.meta.get("origin")
        if module is None:
            if self._gain(op, origin) is None:
                raise Refuse("it is arithmetic in the forward of the model, in no module of its own", blocker=node)
            return
        self._check_once(path, module, origin)
        if why := self._computed(path, module):
            raise Refuse(why, blocker=node)
        if core:
            self._check_core(path, module, origin)
            if self.why_no_rms_norm(path):  # an RMSNorm may be saved as a LayerNorm
                self._check_saved(path, "would do less")
            return
        if self._alone(path) and not self.rebuilt(path):
            return
        if self._gain(op, origin) is not None:
            return
        if not self._alone(path):
            raise Refuse(f"it stands in the forward of {type(module).__name__}, which does more than that", blocker=node)
        self._check_saved(path, "would do less")

    def released(self, graph: Graph, node: fx.Node) -> None:
        """The affine at this node goes, as `check_release` allowed: a gain in the code of a module becomes one."""
        path, op = graph.path(node), graph.view(node, 2)
        if isinstance(op, Affine) and not (self.module(path) is not None and self._alone(path) and not self.rebuilt(path)):
            gain = self._gain(op, node.meta.get("origin"))
            if gain is not None:
                self.gains[gain] = path

    def _alone(self, path: str) -> bool:
        """Does a module nothing but multiply and add constants, or normalize with constants?"""
        return all(kind in (*_STATIC, *_ARITHMETIC) for kind in self.own.get(path, Counter()))

    def _gain(self, op: Affine, origin: Any) -> str | None:
        """The stored gain of x γ in the code of the model, which may be one; None where it may not, or is none."""
        if isinstance(op.x, CORES) or not isinstance(origin, Mul) or bool(op.t.value.any()):
            return None
        c = origin.y if isinstance(origin.y, Constant) else origin.x
        try:
            self.check_value(c, None)  # type: ignore[arg-type]
        except (AttributeError, Refuse):
            return None
        return self.home(c)  # type: ignore[arg-type]

    def _check_once(self, path: str, module: nn.Module, origin: Any) -> None:
        held = [c for c in vars(origin).values() if isinstance(c, Constant)] if isinstance(origin, Op) else []
        why = next((w for c in held if (w := self._shared(self.home(c) or ""))), "")
        if not why and sum(n for kind, n in self.own.get(path, Counter()).items() if kind in (*_STATIC, *CORES)) > 1:
            why = f"{path} is called more than once"
        if why:
            raise Refuse(f"{why}, and a module is the same for all calls")

    def _computed(self, path: str, module: nn.Module) -> str:
        """Why a hook or a parametrization, which would outlive the module, takes part in what it computes; empty if none does.

        Hooks move to what stands in the place of the module. One that changes its input, its output or its weights (pruning) has
        operators of its own there, and constants that are stored nowhere.
        """
        kind = type(module).__name__
        if is_parametrized(module):
            return f"the parameters of {kind} are computed (parametrize)"
        if not (module._forward_hooks or module._forward_pre_hooks):
            return ""
        norms = self._norms.get(path, [])
        homes = [self.home(c) for op in norms for c in vars(op).values() if isinstance(c, Constant)]
        if len(norms) == self.own.get(path, Counter()).total() and all(homes):
            return ""
        return f"a hook on {kind} takes part in what it computes"

    def norm_parameters(self, path: str) -> list[str]:
        """Names of the parameters of a module that are gain and shift of the norm which it computes."""
        module = self.module(path)
        homes = {self.home(c) for op in self._norms.get(path, []) for c in vars(op).values() if isinstance(c, Constant)}
        return [name for name in module._parameters if f"{path}.{name}" in homes] if module is not None else []

    def _check_core(self, path: str, module: nn.Module, origin: Any) -> None:
        """Are gain and shift parameters that the norm can do without?"""
        if any(self.own[path][kind] for kind in (*_ARITHMETIC, *_STATIC)):
            raise Refuse(f"the forward of {type(module).__name__} multiplies or adds as well, which would stay")
        for c in (getattr(origin, "gamma", None), getattr(origin, "beta", None)):
            if c is None:
                continue
            owner, _, leaf = (self.home(c) or "").rpartition(".") if isinstance(c, Constant) else ("", "", "")
            if self._modules.get(owner) is not module or leaf not in module._parameters:
                raise Refuse(f"its gain is computed in the forward of {type(module).__name__}, not a parameter as it is")

    def why_no_rms_norm(self, path: str) -> str:
        """Why the module of a LayerNorm cannot become an `nn.RMSNorm`; empty if it can."""
        module = self.module(path)
        if module is None:
            return "it is no module of its own"
        if not isinstance(module, nn.LayerNorm) or self.own.get(path) != Counter({LayerNorm: 1}):
            return f"{type(module).__name__} does more than an nn.LayerNorm, so that nn.RMSNorm cannot take its place"
        if why := self._computed(path, module):
            return why
        try:
            self._check_once(path, module, None)
        except Refuse as e:
            return e.reason
        shared = next((w for n in module._parameters if (w := self._shared(f"{path}.{n}"))), "")
        return f"{shared}, and a module is the same for all calls" if shared else ""


def _places(model: nn.Module) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for name, tensor in _tensors(model):
        found.setdefault(identity_of(tensor), []).append(name)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _kind(op: Value) -> type:
    """Of the view of an operator; arithmetic of two values is no affine and counts as what is not known."""
    if isinstance(op, _ARITHMETIC) and isinstance(op.x, Value) and isinstance(op.y, Value):
        return Value
    return type(op)


def _name(op: Value) -> str:
    return type(op).__name__ if op.node is None or op.node.op != "call_function" else operator_name(op.node)


def _same(a: Any, b: Any) -> bool:
    """Literals that are equal; what values an operator reads is not asked here."""
    if isinstance(a, Value) or isinstance(b, Value):
        return isinstance(a, Value) and isinstance(b, Value)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
