"""A layer as integers: its codes, packed, as a call on tensors and as nodes of the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.passes.quantize.clipping import static_scale
from normfuse.passes.quantize.sites import Layer
from normfuse.passes.quantize.statistics import Statistics
from normfuse.quant.accumulator import check_accumulator
from normfuse.quant.packing import pack_groups, pack_rows
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.weight import QuantizedWeight

__all__ = ["Coded", "encode"]

ops = torch.ops.normfuse
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Coded:
    """A layer and its integers.

    Attributes:
        layer: the layer in float.
        bits: of its weight.
        weights: codes, exponents and scales, one a group of a convolution.
        codes: their packed bytes; of an embedding, one bit string a row.
        exponents: of the input channels.
        scale: of the outputs, or the rows of an embedding.
        bias: float32 [out], corrected or not; None for none.
        input_scale: static scale of what the layer reads; None for one scale a row.
    """

    layer: Layer
    bits: int
    weights: tuple[QuantizedWeight, ...]
    codes: Tensor
    exponents: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    @property
    def activation_bits(self) -> int:
        return self.layer.spec.activation_bits

    @property
    def bytes(self) -> int:
        kept = (self.codes, self.scale, self.bias, self.input_scale, None if self.layer.kind == "embedding" else self.exponents)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    @property
    def channels_by_exponent(self) -> tuple[int, ...]:
        """Input channels with exponent 0, 1, …"""
        if self.layer.kind == "embedding":
            return ()
        return tuple(torch.bincount(self.exponents.int()).tolist())

    def with_bias(self, bias: Tensor | None) -> Coded:
        return dataclasses.replace(self, bias=bias)

    def __call__(self, x: Tensor, *, bare: bool = False) -> Tensor:
        """What the layer gives for x; `bare` without bias and epilogue."""
        x = self.layer.laid_out(x)
        target, args = self._call(x, self.codes, self.exponents, self.scale, None if bare else self.bias, self.input_scale, bare)
        y: Tensor = target(*args)
        return y.squeeze(2) if self.layer.unit_axis else y

    def _call(
        self, x: Any, codes: Any, exponents: Any, scale: Any, bias: Any, input_scale: Any, bare: bool
    ) -> tuple[Any, tuple[Any, ...]]:
        layer, epilogue = self.layer, "none" if bare else self.layer.epilogue
        if layer.kind == "embedding":
            return ops.shiftquant_embedding.default, (x, codes, scale, layer.weight.shape[1], self.bits)
        common = (x, codes, exponents, scale, bias, input_scale, self.bits, self.activation_bits)
        if layer.kind == "linear":
            return ops.shiftquant_linear.default, (*common, epilogue)
        where = (list(layer.kernel), list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        return ops.shiftquant_conv2d.default, (*common, *where, epilogue)

    def emit(self, graph: Graph, shared: dict[int, dict[str, Constant]], emitted: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Put the layer's integers into the graph, in the place of the layer and its epilogue; returns the node.

        Args:
            graph: the graph.
            shared: constants emitted before, by the identity of their codes: a shared weight is stored once.
            emitted: what stands in the place of nodes that this layer may read.
        """
        layer, before = self.layer, self.layer.tail
        folder = layer.weight.name.rpartition(".")[0] or "quantized"
        constants = shared.setdefault(id(self.codes), self._constants(folder))

        def node(name: str) -> fx.Node:
            return graph.emit_constant(constants[name], before)

        x = emitted.get(layer.x, layer.x)
        if layer.unit_axis:
            x = graph.call(aten.unsqueeze.default, (x, 2), before, layer.node)
        if any(layer.more):
            x = graph.call(aten.constant_pad_nd.default, (x, [0, layer.more[1], 0, layer.more[0]], 0.0), before, layer.node)
        bias = None if self.bias is None else graph.emit_constant(self._bias(folder), before)
        exponents = None if layer.kind == "embedding" else node("exponents")
        static = None
        if self.input_scale is not None:
            static = graph.emit_constant(Constant.of(self.input_scale, f"{folder}.input_scale"), before)
        target, args = self._call(x, node("codes"), exponents, node("scale"), bias, static, False)
        new = graph.call(target, args, before, layer.node)
        if layer.unit_axis:
            new = graph.call(aten.squeeze.dim, (new, 2), before, layer.node)
        if layer.kind == "embedding" and layer.weight.dtype is not torch.float32:  # rows come in the dtype of their scales
            new = graph.call(aten.to.dtype, (new, layer.weight.dtype), before, layer.node)
        layer.tail.replace_all_uses_with(new)
        return new

    def _bias(self, folder: str) -> Constant:
        """The model's own bias where it has not changed, so that one that is shared stays shared."""
        own = self.layer.bias
        assert self.bias is not None
        if own is not None and own.dtype is torch.float32 and torch.equal(own.native.cpu(), self.bias):
            return own
        return Constant.of(self.bias, f"{folder}.bias")

    def _constants(self, folder: str) -> dict[str, Constant]:
        return {name: Constant.of(getattr(self, name), f"{folder}.{name}") for name in ("codes", "exponents", "scale")}


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
    spec = layer.spec if bits is None or layer.kind == "embedding" else dataclasses.replace(layer.spec, weight_bits=bits)
    if layer.kind == "embedding":
        made = like or _embedding(layer, spec.embedding_bits if bits is None else bits)
        return dataclasses.replace(made, layer=layer)
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
    codes, exponents, scale = pack_groups(weights, layer.taps) if like is None else (like.codes, like.exponents, like.scale)
    bias = None if layer.bias is None else layer.bias.value.float()
    static = None
    if spec.activations == "static":
        assert found is not None
        static = torch.tensor(static_scale(found, spec), dtype=torch.float32)
    return Coded(layer, spec.weight_bits, weights, codes, exponents, scale, bias, static)


def _weight(layer: Layer, spec: Any, matrix: Tensor, found: Statistics | None, second: Tensor | None, g: int) -> QuantizedWeight:
    moments = None
    if found is not None and found.count:
        moments = found.power[g * layer.channels : (g + 1) * layer.channels].repeat(layer.taps)
    channels = None if layer.taps == 1 else torch.arange(layer.channels).repeat(layer.taps)
    return quantize_weight(matrix, spec, moments=moments, hessian=second, channel_groups=channels)


def _check(layer: Layer, found: Statistics | None, second: Tensor | None) -> None:
    if layer.spec.activations == "static" and found is None:
        raise Refuse("static activations need calibration data", remedy='pass calibration=, or activations="dynamic"')
    if layer.spec.rounding == "gptq" and second is None:
        raise Refuse('rounding="gptq" needs calibration data', remedy="pass calibration=")
    if found is not None and found.bad:
        raise Refuse("what it reads holds NaN or Inf in the calibration data", remedy="look for an overflow in front of it")


def _embedding(layer: Layer, bits: int | None) -> Coded:
    """One scale a row, no groups: a row is read alone."""
    assert bits is not None
    spec = dataclasses.replace(
        layer.spec, weight_bits=bits, groups=1, granularity="per_channel", rounding="nearest", exponents="range", overrides=()
    )
    weight = quantize_weight(layer.weight.value, spec)
    return Coded(layer, bits, (weight,), pack_rows(weight.codes, bits), weight.exponents, weight.scale, None, None)
