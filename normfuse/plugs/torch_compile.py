"""`torch.compile(model, backend="normfuse")`: the captured graph optimized, then compiled by Inductor.

    Dynamo's graph      parameters and buffers of modules are inputs, sizes that vary are integers among them
    frozen              the same graph with them as constants: what `normfuse.optimize` takes
    outer               the optimized graph, called as Dynamo calls its own; Inductor compiles it

A graph that is not for inference goes to Inductor as it is, with a line in the log that says why. The result is for the weights
that it was made from: each call looks whether they are the same tensors with nothing written into them, and optimizes again
where they are not.
"""

from __future__ import annotations

import inspect
import logging
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx
from torch.export import Dim

from normfuse.api import Verify, optimize
from normfuse.described import first_line
from normfuse.errors import NormfuseError, UsageError, did_you_mean
from normfuse.passes import PassName
from normfuse.quant.scheme import Scheme
from normfuse.quant.words import Widths
from normfuse.reports.record import report
from normfuse.reports.report import Report

__all__ = ["Options", "backend", "reports"]

Then = Literal["inductor", "eager"]
Compiled = Callable[..., Any]

_AGAIN = 4  # times that a graph is optimized anew because weights were written; then it runs as it was given
_KEPT = 64  # reports
_STEPS = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_log = logging.getLogger(__name__)
_reports: list[Report] = []


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="normfuse", options={…})` takes.

    Attributes:
        passes, quantize, verify: see `normfuse.optimize`; layers are calibrated on the first call.
        then: "inductor" compiles the result; "eager" runs it in PyTorch, which is also done where there is no compiler.
    """

    passes: Sequence[PassName] | None = None
    quantize: Scheme | Widths | None = None
    verify: Verify = "end"
    then: Then = "inductor"

    @classmethod
    def of(cls, given: dict[str, Any] | None) -> Options:
        known = [str(name) for name in inspect.signature(cls).parameters]
        for name in given or {}:
            if name not in known:
                raise UsageError(
                    f"the backend normfuse has no option {name!r}{did_you_mean(name, known)} (options: {', '.join(known)})"
                )
        options = cls(**(given or {}))
        if options.then not in get_args(Then):
            hint = did_you_mean(options.then, get_args(Then))
            raise UsageError(f"then={options.then!r}: expected {' or '.join(map(repr, get_args(Then)))}{hint}")
        return options


def reports() -> tuple[Report, ...]:
    """What was done to each graph that this process compiled with the backend, the newest last; at most 64."""
    return tuple(_reports)


def backend(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """The backend that Dynamo calls with each graph it captures.

    Args:
        gm: the graph; weights and buffers of modules are inputs of it.
        inputs: those of the first call.
        options: see `Options`.
        mode: of `torch.compile`, for Inductor.

    Raises:
        UsageError: an option is wrong.
    """
    how = Options.of(options)
    compile_ = _Inductor(mode) if how.then == "inductor" else _eagerly
    why = _not_for_inference(gm, inputs)
    if why:
        _log.warning("torch.compile: a graph stays as it is: %s", why)
        return compile_(gm, inputs)
    try:
        graph = _Graph.of(gm, inputs)
        outer = graph.optimized(inputs, how)
    except UsageError as e:
        if _own_fault(e):
            raise
        return _untouched(e, gm, inputs, compile_)
    except Exception as e:  # whatever it is, the graph as it was given is right
        return _untouched(e, gm, inputs, compile_)
    return _Checked(graph, how, compile_, compile_(outer, inputs), graph.constants_of(inputs), graph.numbers_of(inputs))


def _own_fault(e: UsageError) -> bool:
    """The user's options are wrong, and not the graph."""
    return str(e).startswith(("quantize=", "verify=", "passes", "there is no pass"))


def _untouched(e: Exception, gm: fx.GraphModule, inputs: Sequence[Any], compile_: Any) -> Compiled:
    said = first_line(e) if isinstance(e, NormfuseError) else f"{type(e).__name__}: {first_line(e)}"
    _log.warning("torch.compile: a graph stays as it is: %s", said)
    _log.debug("where it happened", exc_info=e)
    return compile_(gm, inputs)  # type: ignore[no-any-return]


# -- what is no inference ----------------------------------------------------------------------------------------------


def _not_for_inference(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Why this graph stays as it is; empty if it need not."""
    if any(isinstance(v, torch._subclasses.FakeTensor) for v in inputs):
        return "its inputs have no values"
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs):
        return "it may be asked for gradients; call it under torch.inference_mode() or torch.no_grad()"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "it runs under autocast; convert the model instead, as with .half()"
    for node in gm.graph.nodes:
        if node.op == "call_function" and _trains(node):
            return f"{node.name} is in training mode; call .eval() on the model"
    return ""


def _trains(node: fx.Node) -> bool:
    """A dropout or a norm that takes its statistics from the batch: the function says `training`, `train` or `use_input_stats`."""
    names: list[str] = []
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        schemas = torch.jit._builtins._find_builtin(node.target)
        if schemas is not None:
            names = [a.name for a in torch._C._jit_get_schemas_for_operator(schemas)[0].arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return any(given.get(name) is True for name in ("training", "train"))


# -- graphs ------------------------------------------------------------------------------------------------------------


@dataclass
class _Graph:
    """Dynamo's graph, and what each of its inputs is.

    Attributes:
        gm: as Dynamo gave it.
        constants: names of weights and buffers by the position of their placeholder.
        sizes: where to read each integer: (position of a tensor, dimension) by the position of its placeholder.
        numbers: positions of the floats of modules (ε of a norm), which Dynamo hands in as tensors where all may vary.
        tensors: positions of the inputs that are left.
    """

    gm: fx.GraphModule
    constants: dict[int, str]
    sizes: dict[int, tuple[int, int]]
    numbers: list[int]
    tensors: list[int]

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[Any]) -> _Graph:
        constants: dict[int, str] = {}
        for i, (node, value) in enumerate(zip(_placeholders(gm), inputs, strict=True)):
            name = _name_of(node)
            if isinstance(value, Tensor) and name:
                if value.is_inference():
                    raise UsageError(
                        f"{name} was made under inference_mode, where nothing tells that it is written; make it outside"
                    )
                constants[i] = name if name not in constants.values() else f"{name}_{i}"
        numbers = [i for i, node in enumerate(_placeholders(gm)) if _is_number(node, inputs[i])]
        rest = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and i not in constants and i not in numbers]
        return cls(gm, constants, _sizes(gm, inputs, rest), numbers, rest)

    @property
    def fixed(self) -> bool:
        """No size varies."""
        return not self.sizes

    def constants_of(self, inputs: Sequence[Any]) -> list[tuple[int, Tensor, int]]:
        """Position, tensor and version of each constant among these inputs."""
        return [(i, inputs[i], inputs[i]._version) for i in self.constants]

    def numbers_of(self, inputs: Sequence[Any]) -> list[tuple[int, float]]:
        """Position and value of each number."""
        return [(i, inputs[i].item()) for i in self.numbers]

    def optimized(self, inputs: Sequence[Any], how: Options) -> fx.GraphModule:
        """The optimized graph, called as Dynamo's."""
        example = tuple(inputs[i].detach() for i in self.tensors)
        with torch._guards.tracing(None), torch.no_grad():
            fast = optimize(
                self._frozen(inputs), example, dynamic_shapes=self._free(), passes=how.passes, quantize=how.quantize,
                verify=how.verify, allow_random_calibration=True,
            )  # fmt: skip
        found = report(fast)
        _log.info("torch.compile: %d applied, %d refused", len(found.applied), len(found.refused))
        _reports[:] = [*_reports[1 - _KEPT :], found]
        self._promise(fast)
        return self._outer(fast)

    def _frozen(self, inputs: Sequence[Any]) -> fx.GraphModule:
        """The graph over the tensors alone."""
        held: dict[str, Any] = {}
        graph = fx.Graph()
        made: dict[fx.Node, Any] = {}
        places = _placeholders(self.gm)
        for i in self.tensors:
            made[places[i]] = graph.placeholder(places[i].name)
        for i, name in self.constants.items():
            held[name] = inputs[i]
            made[places[i]] = graph.get_attr(name)
        for i, (tensor, dimension) in self.sizes.items():
            made[places[i]] = graph.call_method("size", (made[places[tensor]], dimension))
        for i, number in self.numbers_of(inputs):
            made |= {places[i]: number} | dict.fromkeys(places[i].users, number)
        for node in self.gm.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                held[str(node.target)] = operator.attrgetter(str(node.target))(self.gm)
            if node not in made:
                made[node] = graph.node_copy(node, made.__getitem__)
        return fx.GraphModule(held, graph, "Compiled")

    def _free(self) -> Any:
        """What may vary, as `torch.export` takes it."""
        if self.fixed:
            return None
        values = [_placeholders(self.gm)[i].meta["example_value"] for i in self.tensors]
        return tuple({d: Dim.AUTO for d, n in enumerate(v.shape) if isinstance(n, torch.SymInt)} or None for v in values)

    def _promise(self, fast: fx.GraphModule) -> None:
        """Have Dynamo check what the optimized graph asks of sizes: its own symbols are asked, which makes guards of them."""
        guards = fast.meta.get("normfuse_guards")
        if guards is not None and not self.fixed:
            guards.check([_placeholders(self.gm)[i].meta["example_value"] for i in self.tensors])

    def _outer(self, fast: fx.GraphModule) -> fx.GraphModule:
        graph = fx.Graph()
        outer = [graph.node_copy(node) for node in _placeholders(self.gm)]
        for node, given in zip(outer, _placeholders(self.gm), strict=True):
            if hasattr(given, "_dynamo_source"):
                node._dynamo_source = given._dynamo_source
        made: dict[fx.Node, Any] = dict(zip(_placeholders(fast), (outer[i] for i in self.tensors), strict=True))
        held = {
            str(n.target): operator.attrgetter(str(n.target))(fast) for n in fast.graph.nodes if n.op in ("get_attr", "call_module")
        }
        for node in fast.graph.nodes:
            if node.op == "output":
                graph.output(tuple(fx.map_arg(list(node.args[0]), made.__getitem__)))
            elif node not in made:
                made[node] = graph.node_copy(node, made.__getitem__)
        return fx.GraphModule(held, graph, "Optimized")


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _name_of(node: fx.Node) -> str:
    """`blocks.0.norm.weight` of a weight or buffer of a module; empty for what the caller gives."""
    name = _source(node)
    return ".".join(_STEPS.findall(name)) if re.search(r"\._(?:parameters|buffers)\['", name) else ""


def _source(node: fx.Node) -> str:
    """Where Dynamo has it from: `L['self']._modules['norm']._parameters['weight']`."""
    source = getattr(node, "_dynamo_source", None)
    return "" if source is None else str(source.name() if callable(source.name) else source.name)


def _is_number(node: fx.Node, value: Any) -> bool:
    """A float of a module, of which nothing but the value is asked.

    Raises:
        UsageError: it is the caller's, so that it may vary.
    """
    taken = isinstance(value, Tensor) and value.ndim == 0 and node.users and all(u.target == "item" for u in node.users)
    if taken and "._modules[" not in _source(node) and not _source(node).startswith("L['self']"):
        raise UsageError(f"its input {node.name} is a number that may vary")
    return bool(taken)


def _sizes(gm: fx.GraphModule, inputs: Sequence[Any], tensors: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Where each integer among the inputs stands in the shape of a tensor.

    Raises:
        UsageError: an integer stands nowhere; it would become a constant.
    """
    places = _placeholders(gm)
    where: dict[Any, tuple[int, int]] = {}
    for i in tensors:
        for d, size in enumerate(places[i].meta["example_value"].shape):
            if isinstance(size, torch.SymInt):
                where.setdefault(size.node.expr, (i, d))
    found = {}
    for i, value in enumerate(inputs):
        if isinstance(value, Tensor):
            continue
        expression = getattr(getattr(value, "node", None), "expr", None)
        if expression not in where:
            raise UsageError(f"its input {places[i].name} is a number that no shape holds")
        found[i] = where[expression]
    return found


# -- compiled ----------------------------------------------------------------------------------------------------------


def _eagerly(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    return gm.forward


@dataclass(frozen=True)
class _Inductor:
    """Inductor where there is a compiler for it; else the graph runs in PyTorch."""

    mode: str | None

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        on_cpu = all(v.device.type == "cpu" for v in inputs if isinstance(v, Tensor))
        missing = _no_compiler() if on_cpu else ""
        if missing:
            _log.warning("torch.compile: runs in PyTorch, not in Inductor: %s", missing)
            return gm.forward
        patches = None if self.mode is None else list_mode_options(self.mode)
        made: Compiled = compile_fx(gm, list(inputs), config_patches=patches)  # type: ignore[assignment]
        return made


def _no_compiler() -> str:
    """Why Inductor cannot make code for the CPU here; empty if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as e:
        return f"there is no C++ compiler ({first_line(e)})"
    return ""


@dataclass
class _Checked:
    """A compiled graph that is for the weights it was made from."""

    graph: _Graph
    how: Options
    compile: Callable[[fx.GraphModule, Sequence[Any]], Compiled]
    compiled: Compiled
    weights: list[tuple[int, Tensor, int]]
    numbers: list[tuple[int, float]]
    again: int = 0

    def __call__(self, *inputs: Any) -> Any:
        changed = any(inputs[i] is not tensor or tensor._version != version for i, tensor, version in self.weights)
        if changed or any(inputs[i].item() != number for i, number in self.numbers):
            self._renew(inputs)
        return self.compiled(*inputs)

    def _renew(self, inputs: Sequence[Any]) -> None:
        self.weights, self.numbers = self.graph.constants_of(inputs), self.graph.numbers_of(inputs)
        self.again += 1
        if self.graph.fixed and self.again <= _AGAIN:
            _log.info("torch.compile: weights have changed; optimizing again")
            try:
                self.compiled = self.compile(self.graph.optimized(inputs, self.how), inputs)
                return
            except Exception as e:
                _log.warning("torch.compile: %s", first_line(e))
        _log.warning("torch.compile: weights have changed; the graph runs in PyTorch as it was given until torch._dynamo.reset()")
        self.compiled, self.weights, self.numbers = self.graph.gm.forward, [], []
