"""A layer as integers: its codes, packed, as a call on tensors and as nodes of the graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.passes.quantize.coded import Coded, CodedProduct, Shared
from normfuse.passes.quantize.layers.conv2d import Conv2d
from normfuse.passes.quantize.layers.embedding import Embedding
from normfuse.passes.quantize.layers.layer import Layer, Product
from normfuse.passes.quantize.layers.linear import Linear
from normfuse.passes.quantize.shiftquant.clipping import static_scale
from normfuse.passes.quantize.statistics import Statistics
from normfuse.passes.quantize.summary import PACKED
from normfuse.quant.accumulator import check_accumulator
from normfuse.quant.packing import pack_groups, pack_multipliers, pack_rows
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.weight import QuantizedWeight

__all__ = ["RULE", "Integers", "Table", "encode", "encode_product", "packed", "width"]

RULE = "shiftquant"
_MULTIPLIERS = 10  # where the arguments of shiftquant_linear have them

ops = torch.ops.normfuse
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Integers(CodedProduct):
    """A product and its integers.

    Attributes:
        weights: codes, exponents and scales, one a group of a convolution.
        codes: their packed bytes.
        exponents: of the input channels.
        scale: of the outputs.
        multipliers: of blocks, packed; None without them.
    """

    weights: tuple[QuantizedWeight, ...]
    codes: Tensor
    exponents: Tensor
    scale: Tensor
    multipliers: Tensor | None = None

    @property
    def activation_bits(self) -> int:  # type: ignore[override]
        bits: int = self.layer.spec.activation_bits
        return bits

    @property
    def activations(self) -> str:  # type: ignore[override]
        return str(self.layer.spec.activations)

    @property
    def bytes(self) -> int:
        return _bytes(self.codes, self.scale, self.bias, self.input_scale, self.exponents, self.multipliers)

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.weights[0].block

    @property
    def channels_by_exponent(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(torch.bincount(self.exponents.int()).tolist())

    def __call__(self, x: Tensor, *, bare: bool = False) -> Tensor:
        layer, (target, where) = self.layer, _operator(self.layer)
        tensors = (self.codes, self.exponents, self.scale, None if bare else self.bias, self.input_scale)
        widths = (self.bits, self.activation_bits)
        epilogue = "none" if bare else layer.epilogue
        blocks = () if self.multipliers is None else (None, self.multipliers)
        y: Tensor = target(layer.laid_out(x), *tensors, *widths, *where, epilogue, *blocks)
        return layer.undone(y)

    def emit(self, graph: Graph, shared: Shared, emitted: Mapping[fx.Node, fx.Node]) -> fx.Node:
        layer, before, folder = self.layer, self.layer.tail, _folder(self.layer)
        names = ("codes", "exponents", "scale", *(() if self.multipliers is None else ("multipliers",)))
        constants = shared.setdefault(id(self.codes), _constants(self, folder, *names))
        x = layer.emit_laid_out(graph, emitted.get(layer.x, layer.x))
        bias = None if self.bias is None else graph.emit_constant(self._bias(folder), before)
        exponents = graph.emit_constant(constants["exponents"], before)
        static = None
        if self.input_scale is not None:
            static = graph.emit_constant(Constant.of(self.input_scale, f"{folder}.input_scale"), before)
        codes, scale = (graph.emit_constant(constants[name], before) for name in ("codes", "scale"))
        target, where = _operator(layer)
        arguments = (x, codes, exponents, scale, bias, static, self.bits, self.activation_bits, *where, layer.epilogue)
        if self.multipliers is not None:
            arguments = (*arguments, None, graph.emit_constant(constants["multipliers"], before))
        new = layer.emit_undone(graph, graph.call(target, arguments, before, layer.node))
        before.replace_all_uses_with(new)
        return new

    def _bias(self, folder: str) -> Constant:
        """The model's own bias where it has not changed, so that one that is shared stays shared."""
        own = self.layer.bias
        assert self.bias is not None
        if own is not None and own.dtype is torch.float32 and torch.equal(own.native.cpu(), self.bias):
            return own
        return Constant.of(self.bias, f"{folder}.bias")


def _operator(layer: Product) -> tuple[Any, tuple[Any, ...]]:
    """The operator of a product, and what it takes between the widths and the epilogue."""
    if isinstance(layer, Conv2d):
        at = layer.at
        return ops.shiftquant_conv2d.default, (
            list(at.kernel), list(at.stride), list(at.padding), list(at.dilation), at.groups,
        )  # fmt: skip
    return ops.shiftquant_linear.default, ()


@dataclass(frozen=True, eq=False)
class Table(Coded):
    """An embedding and its integers.

    Attributes:
        codes: one bit string a row.
        scale: of the rows.
    """

    layer: Embedding
    codes: Tensor
    scale: Tensor

    @property
    def bytes(self) -> int:
        return _bytes(self.codes, self.scale)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = ops.shiftquant_embedding.default(x, self.codes, self.scale, self.layer.weight.shape[1], self.bits)
        return y

    def emit(self, graph: Graph, shared: Shared, emitted: Mapping[fx.Node, fx.Node]) -> fx.Node:
        layer, before = self.layer, self.layer.tail
        constants = shared.setdefault(id(self.codes), _constants(self, _folder(layer), "codes", "scale"))
        codes, scale = (graph.emit_constant(constants[name], before) for name in ("codes", "scale"))
        arguments = (emitted.get(layer.x, layer.x), codes, scale, layer.weight.shape[1], self.bits)
        new = graph.call(ops.shiftquant_embedding.default, arguments, before, layer.node)
        if layer.weight.dtype is not torch.float32:  # rows come in the dtype of their scales
            new = graph.call(aten.to.dtype, (new, layer.weight.dtype), before, layer.node)
        before.replace_all_uses_with(new)
        return new


def _bytes(*held: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in held if t is not None)


def _folder(layer: Layer) -> str:
    return layer.weight.name.rpartition(".")[0] or "quantized"


def _constants(coded: Coded, folder: str, *names: str) -> dict[str, Constant]:
    return {name: Constant.of(getattr(coded, name), f"{folder}.{name}") for name in names}


# -- from floats -----------------------------------------------------------------------------------------------------------


def width(layer: Layer) -> int:
    """Bits of its weight, as its specification has it."""
    bits: int = layer.spec.embedding_bits if isinstance(layer, Embedding) else layer.spec.weight_bits
    return bits


def encode(
    layer: Layer, found: Statistics | None, second: Tensor | None = None, *, bits: int | None = None, like: Coded | None = None
) -> Coded:
    """The layer's integers.

    Args:
        layer: the layer.
        found: statistics of what it reads; None if there are none.
        second: its second moments, for rounding="gptq".
        bits: of the weight, if not those of its specification.
        like: a layer that reads the same weight: its codes are taken.

    Raises:
        Refuse: it must stay in float.
    """
    bits = width(layer) if bits is None else bits
    if isinstance(layer, Embedding):
        return dataclasses.replace(like, layer=layer) if isinstance(like, Table) else _table(layer, bits)
    assert isinstance(layer, Product)
    assert like is None or isinstance(like, Integers)
    return encode_product(layer, found, second, bits=bits, like=like)


def encode_product(
    layer: Product,
    found: Statistics | None,
    second: Tensor | None = None,
    *,
    bits: int,
    like: Integers | None = None,
) -> Integers:
    """The integers of a product; arguments and errors as of `encode`."""
    spec = dataclasses.replace(layer.spec, weight_bits=bits, block=layer.spec.block if isinstance(layer, Linear) else 0)
    _check(layer, found, second)
    if like is not None:
        weights = like.weights
    else:
        weights = tuple(
            _weight(layer, spec, m, found, None if second is None else second[g], g) for g, m in enumerate(layer.matrix())
        )
    for w in weights:
        try:
            check_accumulator(w, spec.activation_bits, layer.path)
        except UsageError as e:
            raise Refuse(f"its sums do not fit into 32 bits: {e}", remedy="fewer groups or bits for it: overrides={...}") from e
    held = packed(weights, layer) if like is None else (like.codes, like.exponents, like.scale, like.multipliers)
    bias = None if layer.bias is None else layer.bias.value.float()
    static = None
    if spec.activations == "static":
        assert found is not None
        static = torch.tensor(static_scale(found, spec), dtype=torch.float32)
    return Integers(layer, bits, bias, static, weights, *held)


def packed(weights: tuple[QuantizedWeight, ...], layer: Product) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Codes, exponents, scales and multipliers as the operator takes them."""
    m = weights[0].multipliers
    return *pack_groups(weights, layer.taps), None if m is None else pack_multipliers(m)


def _weight(
    layer: Product, spec: ShiftQuant, matrix: Tensor, found: Statistics | None, second: Tensor | None, g: int
) -> QuantizedWeight:
    moments = None
    if found is not None and found.count:
        moments = found.power[g * layer.channels : (g + 1) * layer.channels].repeat(layer.taps)
    channels = None if layer.taps == 1 else torch.arange(layer.channels).repeat(layer.taps)
    return quantize_weight(matrix, spec, moments=moments, hessian=second, channel_groups=channels)


def _check(layer: Product, found: Statistics | None, second: Tensor | None) -> None:
    if layer.spec.activations == "static" and found is None:
        raise Refuse("static activations need calibration data", remedy='pass calibration=, or activations="dynamic"')
    if layer.spec.rounding == "gptq" and second is None:
        raise Refuse('rounding="gptq" needs calibration data', remedy="pass calibration=")
    if found is not None and found.bad:
        raise Refuse("what it reads holds NaN or Inf in the calibration data", remedy="look for an overflow in front of it")


def _table(layer: Embedding, bits: int) -> Table:
    """One scale a row, no groups: a row is read alone."""
    spec = dataclasses.replace(
        layer.spec,
        weight_bits=bits,
        groups=1,
        block=0,
        granularity="per_channel",
        rounding="nearest",
        exponents="range",
        overrides=(),
    )
    weight = quantize_weight(layer.weight.value, spec)
    return Table(layer, bits, pack_rows(weight.codes, bits), weight.scale)


# -- what is packed --------------------------------------------------------------------------------------------------------


def _table_surplus(node: fx.Node, held: list[Constant | None]) -> dict[int, int]:
    codes, dim = held[1], node.args[3]
    return {id(codes): codes.numel - codes.shape[0] * dim} if codes is not None and isinstance(dim, int) else {}


def _product_surplus(node: fx.Node, held: list[Constant | None]) -> dict[int, int]:
    codes, exponents, scale = held[1:4]
    if codes is None or exponents is None or scale is None:
        return {}
    values = scale.numel * exponents.numel
    if node.target is ops.shiftquant_conv2d.default:
        kernel: Any = node.args[8]
        groups: Any = node.args[12]
        values = values * math.prod(kernel) // groups
    surplus = {id(codes): codes.numel - values, id(exponents): exponents.numel}
    surplus |= {id(c): c.numel for c in held[_MULTIPLIERS:] if c is not None}
    return surplus


PACKED[ops.shiftquant_embedding.default] = _table_surplus
PACKED[ops.shiftquant_linear.default] = PACKED[ops.shiftquant_conv2d.default] = _product_surplus
