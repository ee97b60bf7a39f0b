"""Which values of a program are codes between its quantized layers, for runtimes that compute whole networks in codes.

    q = clip(rne(x / scale) + zero, 0, 255)

    conv → relu → Q → DQ → conv → Q → DQ ┐
                  └────→ DQ ─────────────┴→ add → relu → Q → DQ → …

A layer with a static scale multiplies codes. Its runtime also adds, pools and concatenates codes if a pair of QuantizeLinear and
DequantizeLinear stands at each input and at the output of such an operator, and only then are its layers integers from the first
to the last: one addition in float cuts the chain twice. What a layer reads has a scale; what only additions and pools read or write
has the range that calibration noted on its node (`normfuse.ir.ranges`).

Behind a ReLU codes start at 0 and use all 255 steps, where the module's own use 127: the bound is the same, the steps are half as
wide. What is negative, too, and read by a layer keeps the module's scale, with a zero point of 128; what no layer reads takes its
range.

The weight of such a layer is one int8. Exponents that do not fit beside its bits (`weight_bits + groups > 9`) are rounded into it,
by `narrowed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.export.onnx.program import Program
from normfuse.ir.ranges import range_of

__all__ = ["Chain", "Codes", "chain_of", "narrowed"]

aten, ops = torch.ops.aten, torch.ops.normfuse

_TOP = 127  # of the module's codes
_BYTES = 255
_CONV, _LINEAR = ops.shiftquant_conv2d.default, ops.shiftquant_linear.default
_RELUS = (aten.relu.default, aten.relu_.default)
_CLIPS = (aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.clamp.default, aten.clamp_.default)
_POOLS = (aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
#: Operators that copy values: their codes are those of what they read.
_COPIES = (
    aten.max_pool2d.default, aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.upsample_nearest2d.vec,
    aten.pixel_shuffle.default, aten.channel_shuffle.default, aten.cat.default, aten.clone.default, aten.contiguous.default,
)  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """Bytes with a scale and a zero point."""

    scale: float
    zero: int

    def rounded(self, x: Tensor) -> Tensor:
        """What the codes of x stand for."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, _BYTES)


@dataclass(frozen=True)
class Chain:
    """The codes of a program, by the names of its nodes.

    Attributes:
        codes: of each value that is codes.
        inside: those that every reader takes as codes; of the others only `layers` do.
        layers: quantized layers that multiply them, and what they read.
        pools: averages of images, and what they read.
    """

    codes: dict[str, Codes]
    inside: frozenset[str]
    layers: dict[str, str]
    pools: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.layers)


def narrowed(operand: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A shifted weight [N, …] as int8 and a factor for each output [N]: itself and 1 where it fits, else rounded to 127 steps."""
    largest = np.abs(operand).reshape(len(operand), -1).max(1, initial=0)
    factor = np.where(largest > _TOP, largest / _TOP, 1.0).astype(np.float32)
    steps = np.rint(operand / factor.astype(np.float64).reshape(-1, *[1] * (operand.ndim - 1)))
    return np.clip(steps, -_TOP, _TOP).astype(np.int8), factor


def chain_of(program: Program) -> Chain:
    """The codes between the quantized layers of `program`; none where it does not compute in float32."""
    return _Planning(program).chain()


class _Planning:
    def __init__(self, program: Program) -> None:
        from networkx.utils import UnionFind

        self._program = program
        self._nodes = [n for n in program.exported.graph.nodes if n.op in ("call_function", "placeholder")]
        self._sites = {n: scale for n in self._nodes if (scale := self._static_scale(n)) is not None}
        self._root = UnionFind(self._nodes)  # of values that are copies of each other
        for node in self._nodes:
            if node.target in _COPIES:
                self._root.union(node, *_operands(node))
        self._known = self._codes_of_classes()

    def chain(self) -> Chain:
        inside = self._useful(self._integer())
        coded = {n for n in inside if not _goes_into_its_reader(n)}
        layers = {n for n in self._sites if self._x(n) in coded or (n.target is _CONV and self._written(n) in coded)}
        every = coded | {self._x(n) for n in layers}
        codes = {n.name: found for n in every if (found := self._codes(n)) is not None}
        pools = {n.name: next(_operands(n)).name for n in self._nodes if n.target in _POOLS and n in inside}
        return Chain(codes, frozenset(n.name for n in coded), {n.name: self._x(n).name for n in self._nodes if n in layers}, pools)

    # -- layers ------------------------------------------------------------------------------------------------------------

    def _static_scale(self, node: fx.Node) -> float | None:
        """The scale of what a layer reads, where it is static and of 8 bits, and its values are float32."""
        if node.target not in (_CONV, _LINEAR):
            return None
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
        scale = self._constant(given["input_scale"])
        x = given["x"].meta.get("val")  # type: ignore[union-attr]
        if scale is None or given["activation_bits"] != 8 or not isinstance(x, Tensor) or x.dtype != torch.float32:
            return None
        odd = given.get("residual") is not None or (node.target is _LINEAR and x.ndim != 2)
        return None if odd else float(scale)

    def _constant(self, node: Any) -> Tensor | None:
        if not isinstance(node, fx.Node):
            return None
        exported = self._program.exported
        signature = exported.graph_signature
        name = signature.inputs_to_buffers.get(node.name) or signature.inputs_to_parameters.get(node.name)
        name = name or signature.inputs_to_lifted_tensor_constants.get(node.name)
        found = None if name is None else exported.state_dict.get(name, exported.constants.get(name))
        return found if isinstance(found, Tensor) else None

    @staticmethod
    def _x(site: fx.Node) -> fx.Node:
        x = site.args[0]
        assert isinstance(x, fx.Node)
        return x

    @staticmethod
    def _written(node: fx.Node) -> fx.Node:
        """What a layer or an addition writes: behind the ReLU that goes into it."""
        return next(iter(node.users)) if _goes_into_its_reader(node) else node

    # -- codes -------------------------------------------------------------------------------------------------------------

    def _codes(self, node: fx.Node) -> Codes | None:
        return self._known.get(self._root[node])

    def _codes_of_classes(self) -> dict[fx.Node, Codes]:
        """Of values that are copies of each other, by their root."""
        scales: dict[fx.Node, list[float]] = {}
        for site, scale in self._sites.items():
            scales.setdefault(self._x(site), []).append(scale)
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self._nodes:
            members.setdefault(self._root[node], []).append(node)
        found = {root: _codes_of(every, scales) for root, every in members.items()}
        return {root: codes for root, codes in found.items() if codes is not None}

    # -- the region --------------------------------------------------------------------------------------------------------

    def _integer(self) -> set[fx.Node]:
        """Values that an operator on codes writes."""
        found: set[fx.Node] = set()
        for node in self._nodes:
            follows = _carries(node) and all(
                x in found and (self._codes(x) is not None or _goes_into_its_reader(x)) for x in _operands(node)
            )
            if follows or (node in self._sites and node.target is _CONV):
                found.add(node)
        return {n for n in found if self._codes(self._written(n)) is not None and self._written(n) in found}

    def _useful(self, integer: set[fx.Node]) -> set[fx.Node]:
        """Those of them that lead to a layer or to a pool by way of operators on codes: the others are better left in float."""
        found: set[fx.Node] = set()
        for node in reversed(self._nodes):
            if node in integer and any(r in found or r in self._sites or r.target in _POOLS for r in node.users):
                found.add(node)
        return found


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that an operator computes with."""
    if node.target is aten.cat.default:
        yield from (x for x in node.args[0] if isinstance(x, fx.Node))  # type: ignore[union-attr]
        return
    yield from (x for x in node.args if isinstance(x, fx.Node))


def _carries(node: fx.Node) -> bool:
    """Its result is codes where what it reads is."""
    target: Any = node.target
    if target in _ADDS:
        shapes = [x.meta["val"].shape for x in _operands(node)]
        return len(shapes) == 2 and shapes[0] == shapes[1] and not node.kwargs
    if target is aten.mean.dim:
        axes: Any = node.args[1]
        return node.args[0].meta["val"].ndim == 4 and sorted(a % 4 for a in axes) == [2, 3]  # type: ignore[union-attr]
    return target in _RELUS or target in _POOLS or target in _COPIES or (target in _CLIPS and _lowest(node) == 0)


def _lowest(node: fx.Node) -> Any:
    """The lower end of a clip."""
    if node.target is aten.relu6.default:
        return 0
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("min_val", -1))


def _highest(node: fx.Node) -> Any:
    """The upper end of one; None for none."""
    if node.target is aten.relu6.default:
        return 6
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        return node.args[2] if len(node.args) > 2 else node.kwargs.get("max_val", 1)
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("max")


def _goes_into_its_reader(node: fx.Node) -> bool:
    """Its sole reader is a ReLU or a clip at 0, which the codes of its result imply."""
    if len(node.users) != 1 or (node.target is not _CONV and node.target not in _ADDS):
        return False
    (reader,) = node.users
    return reader.target in _RELUS or (reader.target in _CLIPS and _lowest(reader) == 0)


def _never_negative(node: fx.Node) -> bool:
    target: Any = node.target
    if target in _RELUS or (target in _CLIPS and _lowest(node) == 0):
        return True
    if target is _CONV or target is _LINEAR:
        return len(node.args) > 0 and "relu" in node.args
    follows: tuple[Callable[..., Any], ...] = (*_POOLS, *_COPIES, *_ADDS)
    read = list(_operands(node))
    return target in follows and bool(read) and all(map(_never_negative, read))


def _codes_of(members: list[fx.Node], scales: dict[fx.Node, list[float]]) -> Codes | None:
    """The codes of values that are copies of each other: by the scales of the layers that read one, else by their ranges."""
    bounds = [s * _TOP for n in members for s in scales.get(n, ())]
    noted = [found for n in members if (found := range_of(n)) is not None]
    joined = [r for n in members if n.target is aten.cat.default and n not in scales and (r := range_of(n)) is not None]
    caps = [_highest(n) for n in members if n.target in _CLIPS and _lowest(n) == 0]
    positive = all(_never_negative(n) for n in members if n.op == "call_function") and members[0].op == "call_function"
    if not bounds and not noted:
        return None
    if bounds:
        bound = max([*bounds, *(max(abs(low), abs(high)) for low, high in joined)])
        low, high = (0.0 if positive else -bound), bound
    else:
        low, high = min(0.0, *(low for low, _ in noted)), max(0.0, *(high for _, high in noted))
    if positive:
        return Codes(_unsigned(high, min((float(c) for c in caps if c is not None), default=float("inf"))), 0)
    if bounds:
        return Codes(_float32(high / _TOP), 128)
    scale = _float32((high - low) / _BYTES) or 1.0
    return Codes(scale, round(-low / scale))


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _unsigned(high: float, cap: float) -> float:
    """high / 255 in float32. Where values end at a `cap` no code stands for more, so that a runtime drops the clip."""
    scale = torch.tensor(high / _BYTES, dtype=torch.float32)
    if high <= cap * (1 + 1e-5) and float(scale * _BYTES) > cap:
        scale = torch.nextafter(scale, torch.zeros(()))
    return float(scale) or 1.0
