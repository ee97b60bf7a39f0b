"""A spec as Python source. Every step runs while it is written, so that the next one knows its shapes; what fails is no model."""

from __future__ import annotations

import linecache
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
import normfuse.nn as nnn
from tests.fuzz.spec import Input, Spec, Step
from tests.zoo_entry import randomise_norms
from tests.zoo_family import trained

__all__ = [
    "BLOCKS",
    "STRUCTURES",
    "Block",
    "Emitter",
    "Invalid",
    "Model",
    "Value",
    "accepts",
    "block",
    "build",
    "default_dtype",
    "emitted",
]

HEADER = """\
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
import normfuse.nn as nnn
from tests.zoo_entry import randomise_norms
from tests.zoo_family import trained
"""

#: how outputs are returned, with {0}, {1}, {2} for the values; the number of values is that of the fields
STRUCTURES = {
    "tensor": "{0}",
    "tuple": "({0}, {1})",
    "tuple of one": "({0},)",
    "list": "[{0}, {1}]",
    "dict": '{{"out": {0}, "aux": {1}}}',
    "nested": '{{"out": ({0}, [{1}]), "aux": {{"last": {2}}}}}',
    "named": "Outputs({0}, {1})",
    "with none": "({0}, None)",
    "repeated": "({0}, {1}, {0})",
    "with number": '{{"out": {0}, "n": 3}}',
}


class Invalid(Exception):
    """The spec is no model: a step does not run on what it reads."""


@dataclass(frozen=True)
class Value:
    """A value of the forward pass; as a string its name."""

    name: str
    kind: str
    data: Any

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def width(self) -> int:
        """Number of channels or features."""
        return self.shape[1 if self.kind in ("image", "sequence", "volume") else -1]

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """That of one number a channel, as it broadcasts: (C, 1, 1) for images, (C,) for tokens."""
        return (self.width,) + (1,) * {"image": 2, "sequence": 1, "volume": 3}.get(self.kind, 0)


@dataclass(frozen=True)
class Block:
    """A building block.

    Attributes:
        write: draws from the emitter, declares what it needs, and returns the expression of its value; None if it does not fit.
        reads: kinds of the values that it reads; `float` is any kind but `ids`, `same` what the first one is.
        gives: kind of its value; empty for that of the first value. `end` is a value that nobody reads.
        weight: how often it is drawn.
        decides: its value jumps where its input hardly moves, so that rounding may change it.
    """

    name: str
    write: Callable[..., str | None]
    reads: tuple[str, ...]
    gives: str
    weight: float
    decides: bool


BLOCKS: dict[str, Block] = {}


def block(*reads: str, gives: str = "", weight: float = 1.0, decides: bool = False) -> Callable[[Any], Any]:
    """Register a function as a building block under its name."""

    def register(write: Callable[..., str | None]) -> Callable[..., str | None]:
        assert write.__name__ not in BLOCKS, write.__name__
        BLOCKS[write.__name__] = Block(write.__name__, write, reads, gives, weight, decides)
        return write

    return register


class _Outputs(NamedTuple):
    out: Any
    aux: Any


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _names() -> dict[str, Any]:
    return {
        "math": math, "torch": torch, "F": F, "nn": nn, "Tensor": Tensor, "normfuse": normfuse, "nnn": nnn, "Outputs": _Outputs,
        "NamedTuple": NamedTuple, "randomise_norms": randomise_norms, "trained": trained,
    }  # fmt: skip


class Emitter:
    """Writes one module, step by step.

    Attributes:
        values: by name, in order.
        made: (expression, kind, width) of modules that a later step may call again.
    """

    def __init__(self, dtype: str, inputs: tuple[Input, ...], seed: int) -> None:
        self.dtype = dtype
        self.inputs = inputs
        self.seed = seed
        self.values: dict[str, Value] = {}
        self.made: list[tuple[str, str, int]] = []
        self.parameters: list[str] = []
        self.rng = random.Random(0)
        self._count = 0
        self._init: list[str] = []
        self._forward: list[str] = []
        self._module = nn.Module()
        self._names = _names() | {"self": self._module}
        self._pending: tuple[list[str], list[str]] = ([], [])
        for i in inputs:
            value = draw(i, dtype, seed, 0)
            if i.optional and not i.given:
                value = None
            self.values[i.name] = Value(i.name, "missing" if value is None else i.kind, value)
            self._names[i.name] = value
        self._fixed = [v.data for v in self.values.values() if isinstance(v.data, Tensor)]

    # -- what blocks say -----------------------------------------------------------------------------------------------

    def module(self, code: str, hint: str, reads: Value | None = None) -> str:
        """Declare a submodule; its expression. With `reads`, later steps may call it on values of that kind and width."""
        name = self._name(hint)
        self._declare(f"self.{name} = {code}")
        if reads is not None:
            self._made_now.append((f"self.{name}", reads.kind, reads.width))
        return f"self.{name}"

    def odd_module(self, name: str, code: str) -> str:
        """A submodule with a name of its own, which may be no identifier."""
        if hasattr(self._module, name) and name in dict(self._module.named_children()):
            raise Invalid(f"{name} is taken")
        self._declare(f"self.add_module({name!r}, {code})")
        return f"self.get_submodule({name!r})"

    def parameter(self, shape: tuple[int, ...], *, dtype: str = "", scale: float = 1.0, shift: float = 0.0) -> str:
        name = self._name("p")
        sizes = ", ".join(map(str, shape))
        code = f"torch.randn({sizes}{', ' if sizes else ''}dtype=torch.{dtype})" if dtype else f"torch.randn({sizes or '()'})"
        code += f" * {scale}" if scale != 1 else ""
        code += f" + {shift}" if shift else ""
        self._declare(f"self.{name} = nn.Parameter({code})")
        return f"self.{name}"

    def gain(self, shape: tuple[int, ...], *, dtype: str = "") -> str:
        """A parameter with values of both signs, away from zero."""
        name = self._name("gain")
        sizes = ", ".join(map(str, shape)) or "()"
        typed = f", dtype=torch.{dtype}" if dtype else ""
        self._declare(f"self.{name} = nn.Parameter(torch.randn({sizes}{typed}).sign() * (torch.rand({sizes}{typed}) + 0.5))")
        return f"self.{name}"

    def buffer(self, code: str, *, persistent: bool = True) -> str:
        name = self._name("b")
        self._declare(f'self.register_buffer("{name}", {code}{"" if persistent else ", persistent=False"})')
        return f"self.{name}"

    def line(self, code: str) -> None:
        """A statement of `forward` in front of the expression."""
        self._run(code)
        self._pending[1].append(code)

    def local(self, code: str) -> str:
        """A local variable with the value of an expression."""
        name = self._name("t")
        self.line(f"{name} = {code}")
        return name

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def flag(self, p: float = 0.5) -> bool:
        return self.rng.random() < p

    def new_width(self, width: int) -> int:
        return self.pick(width, width, width, 4, 6, 8, 12)

    def fresh(self, x: Value) -> bool:
        """May the step write to this value? Not to the caller's inputs and not to the model's own tensors."""
        own = [*self._fixed, *self._module.parameters(), *self._module.buffers()]
        return all(_storage(x.data) != _storage(t) for t in own)

    # -- the module ----------------------------------------------------------------------------------------------------

    def apply(self, step: Step) -> Value:
        """Write one step.

        Raises:
            Invalid: it does not fit or does not run; nothing is left of it.
        """
        found = BLOCKS[step.block]
        self.rng = random.Random(step.seed)
        self._pending = ([], [])
        self._made_now: list[tuple[str, str, int]] = []
        try:
            values = [self.values[name] for name in step.reads]
        except KeyError as e:
            raise Invalid(f"{step.name} reads {e}, which is not there") from None
        if not _fits(found, values):
            raise Invalid(f"{step.block} does not read {[v.kind for v in values]}")
        before = {v.name: v.data.clone() for v in values if isinstance(v.data, Tensor)}
        try:
            with torch.no_grad(), default_dtype(self.dtype):
                code = found.write(self, *values)
            if code is None:
                raise Invalid(f"{step.block} does not fit {[v.shape for v in values]}")
            self.line(f"{step.name} = {code}")
            data = self._names[step.name]
            if isinstance(data, Tensor) and data.numel() > 1 << 14:
                raise Invalid("too large")
            if not isinstance(data, Tensor) and found.gives != "end":
                raise Invalid("no tensor")  # the sum of no tensors is a number
        except Invalid:
            self._restore(before)
            raise
        except Exception as e:
            self._restore(before)
            raise Invalid(f"{step.block}: {type(e).__name__}: {e}") from e
        self._prune()
        self._init += self._pending[0]
        self._forward += self._pending[1]
        self.made += self._made_now
        self.parameters += [c.split(" = ")[0] for c in self._pending[0] if "nn.Parameter" in c]
        value = Value(step.name, found.gives or values[0].kind, data)
        self.values[step.name] = value
        return value

    def source(self, outputs: tuple[str, ...], structure: str) -> str:
        """The class `Model`."""
        template = STRUCTURES[structure]
        for name in outputs:
            if name.startswith("self.") and name not in self.parameters:
                raise Invalid(f"{name} is not there")
            if not name.startswith("self.") and (name not in self.values or self.values[name].data is None):
                raise Invalid(f"{name} is not there")
        result = template.format(*outputs)
        arguments = ["self"]
        for i in self.inputs:
            if not i.is_tensor:
                arguments.append(f"{i.name}={i.value!r}")
            else:
                arguments.append(f"{i.name}=None" if i.optional else i.name)
        init = ["super().__init__()", *self._init]
        named = "class Outputs(NamedTuple):\n    out: Tensor\n    aux: Tensor\n\n\n" if structure == "named" else ""
        body = "\n".join("        " + line for text in init for line in text.split("\n"))
        forward = "\n".join("        " + line for text in [*self._forward, f"return {result}"] for line in text.split("\n"))
        return (
            f"{named}class Model(nn.Module):\n    def __init__(self):\n{body}\n\n"
            f"    def forward({', '.join(arguments)}):\n{forward}\n"
        )

    # -- internals -----------------------------------------------------------------------------------------------------

    def _name(self, hint: str) -> str:
        self._count += 1
        return f"{hint}{self._count}"

    def _declare(self, code: str) -> None:
        self._run(code)
        self._module.eval()
        self._pending[0].append(code)

    def _run(self, code: str) -> None:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            default_dtype(self.dtype if code.startswith("self.") else "float32"),
        ):
            exec(code, self._names)

    def _prune(self) -> None:
        """Drop what was declared for options that were not taken."""
        init, forward = self._pending
        while True:
            text = "\n".join(init + forward)
            unused = [
                c
                for c in init + forward
                if (m := re.match(r"(t\d+)(?= = )|self\.(\w+)(?= = )|self\.register_buffer\(\"(\w+)", c))
                and len(re.findall(rf"\b{next(filter(None, m.groups()))}\b", text)) == 1
            ]
            if not unused:
                break
            for c in unused:
                (init if c in init else forward).remove(c)
        self._made_now = [m for m in self._made_now if m[0] in text]

    def _restore(self, before: dict[str, Tensor]) -> None:
        """Undo what a step that failed half-way wrote in place."""
        for name, data in before.items():
            held = self.values[name].data
            if held.shape == data.shape and 0 not in held.stride():  # an expanded value cannot be written
                held.copy_(data)


def _fits(found: Block, values: list[Value]) -> bool:
    if len(found.reads) != len(values):
        return False
    return all(accepts(kind, v, values[0]) for kind, v in zip(found.reads, values, strict=True))


def accepts(kind: str, v: Value, first: Value) -> bool:
    """Is `v` of the kind that a block reads? `same` is that of the first value."""
    if v.kind in ("missing", "end"):
        return False
    if kind == "float":
        return v.kind in ("image", "tokens", "sequence", "table", "volume")
    return v.kind == (first.kind if kind == "same" else kind)


def _storage(t: Any) -> int:
    return t.untyped_storage().data_ptr() if isinstance(t, Tensor) and not t.is_sparse else 0


def draw(i: Input, dtype: str, seed: int, again: int, *, grow: tuple[int, int] = (0, 0)) -> Any:
    """A value for an argument: normal floats, or ids below 16; `grow` is added to the batch and to the other free axes."""
    if not i.is_tensor:
        return i.value
    generator = torch.Generator().manual_seed(seed * 1000 + again * 100 + sum(map(ord, i.name)))
    shape = grown(i, grow)
    if i.kind == "ids":
        return torch.randint(0, 16, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def grown(i: Input, by: tuple[int, int]) -> tuple[int, ...]:
    """The shape of an input at another batch and another length (or height and width)."""
    free = {"image": (2, 3), "tokens": (1,), "sequence": (2,), "volume": (2, 3, 4), "ids": (1,)}.get(i.kind, ())
    return tuple(n + (by[0] if axis == 0 else by[1] if axis in free else 0) for axis, n in enumerate(i.shape))


# -- whole models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A spec that was built.

    Attributes:
        module: in eval mode, with random weights and statistics.
        source: of its class.
        values: (kind, shape) of each value.
        decides: does a value jump where another one hardly moves?
    """

    module: nn.Module
    source: str
    decides: bool
    blocks: tuple[str, ...] = field(default=())


def emitted(spec: Spec) -> str:
    """The source of the class of a spec.

    Raises:
        Invalid: it is no model.
    """
    emitter = Emitter(spec.dtype, spec.inputs, spec.seed)
    for step in spec.steps:
        emitter.apply(step)
    return emitter.source(spec.outputs, spec.structure)


def build(spec: Spec) -> Model:
    """The module of a spec, the same each time.

    Raises:
        Invalid: it is no model.
    """
    source = emitted(spec)
    name = f"<fuzz {spec.seed}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = _names() | {"__name__": "tests.fuzz.model"}
    exec(compile(source, name, "exec"), names)
    with torch.random.fork_rng(devices=[]), default_dtype(spec.dtype):
        torch.manual_seed(spec.seed)
        module = trained(randomise_norms(names["Model"]())).eval()
    used = tuple(s.block for s in spec.steps)
    return Model(module, source, any(BLOCKS[b].decides for b in used), used)
