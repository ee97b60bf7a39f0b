"""A graph that computes with the integers of its quantized layers, in a form that can be trained.

    Ŵ[n, k] = S[n] 2^(-e[k]) clamp(rne(W[n, k] 2^e[k] / S[n])),   X̂ = s A with the codes of `quantize_rows` or `quantize_static`

Rounding passes gradients straight through. Custom operators are not needed: these are the integers that they have, times
their scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.views import Conv, GroupNorm, LayerNorm, Op, RmsNorm, Value
from normfuse.ir.weights import Weight
from normfuse.quant.integers import quantize_rows, quantize_static, top_code
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.weight import QuantizedWeight

__all__ = ["Student", "as_matrices", "from_matrices", "simulate"]

_NORMS = (LayerNorm, RmsNorm, GroupNorm)  # their gains and shifts are trained beside the weights of quantized layers
_WITHIN = 0.49  # of a step: how far from the middle of its code a weight may start


def simulate(
    graph: Graph,
    values: Sequence[Any],
    spec: ShiftQuant,
    weights: Mapping[fx.Node, Sequence[QuantizedWeight]],
    input_scales: Mapping[fx.Node, Tensor] | None = None,
) -> list[Tensor]:
    """The outputs of the graph with these integers: what fine-tuning sees before its first step.

    Args:
        graph: of ATen calls; it is not changed.
        values: one for each placeholder.
        spec: widths of activations.
        weights: integers of the quantized layers.
        input_scales: static scales of their inputs.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return Student(graph, spec, weights, input_scales or {})(values)


def as_matrices(weight: Tensor, view: Op) -> Tensor:
    """A weight as (groups, N / groups, K): K = taps × input channels of a group of a convolution, the channel fastest."""
    w = _weight(view)
    if w.linear:
        return (weight if w.out == 0 else weight.T).unsqueeze(0)
    return weight.movedim(1, -1).reshape(w.groups, weight.shape[0] // w.groups, -1)


def from_matrices(matrices: Tensor, view: Op) -> Tensor:
    """The inverse of `as_matrices`."""
    w = _weight(view)
    if w.linear:
        return matrices[0] if w.out == 0 else matrices[0].T
    n, c, *taps = w.value.shape
    return matrices.reshape(n, *taps, c).movedim(-1, 1)


def _weight(view: Op) -> Weight:
    assert view.weight is not None
    return view.weight


# -- the graph with fake quantization ------------------------------------------------------------------------------------


class _Layer:
    """One quantized layer: W (shared by all that read the same constant), growth of S, exponents, growth of a static scale."""

    def __init__(
        self, view: Op, master: Tensor, start: Sequence[QuantizedWeight], bits: int, input_scale: Tensor | float | None
    ) -> None:
        self.view, self.master, self.start, self.activation_bits = view, master, start, bits
        self.range = start[0].code_range
        self.units, self.scale_start = _units(start), torch.stack([w.scale for w in start])
        self.growth = torch.zeros_like(self.scale_start).requires_grad_()
        self.input_start = None if input_scale is None else torch.as_tensor(input_scale, dtype=torch.float32).reshape(())
        self.input_growth = None if input_scale is None else torch.zeros(()).requires_grad_()

    @property
    def scale(self) -> Tensor:
        return self.scale_start * self.growth.exp()

    @property
    def input_scale(self) -> Tensor | None:
        return None if self.input_start is None or self.input_growth is None else self.input_start * self.input_growth.exp()

    def weight(self) -> Tensor:
        step = self.scale.unsqueeze(-1) * self.units
        y = (as_matrices(self.master, self.view) / step).clamp(*self.range)
        return from_matrices(_straight(y.round(), y) * step, self.view)

    def input(self, x: Tensor) -> Tensor:
        scale = self.input_scale
        if scale is not None:
            top = top_code(self.activation_bits)
            codes = quantize_static(x.detach(), scale.detach(), self.activation_bits).to(x.dtype)
            return _straight(codes, (x / scale).clamp(-top, top)) * scale
        rows = x
        if isinstance(self.view, Conv):
            rows = x.flatten(1) if x.ndim == self.view.W.ndim else x.flatten()
        codes, row_scale = quantize_rows(rows.detach(), self.activation_bits)
        return _straight((codes * row_scale).reshape(x.shape).to(x.dtype), x)

    @torch.no_grad()
    def integers(self) -> tuple[QuantizedWeight, ...]:
        scale = self.scale.detach()
        y = as_matrices(self.master.detach(), self.view) / (scale.unsqueeze(-1) * self.units)
        codes = y.clamp(*self.range).round().to(torch.int8)
        return tuple(dataclasses.replace(w, codes=c, scale=s.clone()) for c, w, s in zip(codes, self.start, scale, strict=True))


class Student:
    """The graph, run with the integers of its quantized layers; its parameters are copies of the constants."""

    def __init__(
        self,
        graph: Graph,
        spec: ShiftQuant,
        weights: Mapping[fx.Node, Sequence[QuantizedWeight]],
        input_scales: Mapping[fx.Node, Tensor],
    ) -> None:
        self.graph = graph
        self.values: dict[str, Tensor] = {}  # what `get_attr` nodes give, by constant
        self.trained: dict[str, Tensor] = {}
        self.layers: dict[fx.Node, _Layer] = {}
        masters: dict[str, Tensor] = {}
        for node, start in weights.items():
            view = graph.view(node)
            if not _trainable(view) or graph.constant(read := _weight_of(node, view)) is None:
                raise UsageError(f"{node.name} at {graph.path(node)} is no linear layer or convolution with a constant weight")
            key = str(read.target)
            weight = graph.constants[key].native
            if weight.dtype != torch.float32:
                raise UsageError(f"the weight at {graph.path(node)} is {weight.dtype}; fine-tuning needs float32: model.float()")
            if key not in masters:
                masters[key] = _near(view, weight, start).requires_grad_()
            bits = spec.at(graph.path(node)).activation_bits
            self.layers[node] = _Layer(view, masters[key], start, bits, input_scales.get(node))
        self.masters = masters
        for node in graph:
            view = graph.view(node)
            for field in _further(view):
                constant = getattr(view, field)
                if isinstance(constant, Constant) and constant.dtype == torch.float32:
                    key = next(str(n.target) for n in node.all_input_nodes if graph.constant(n) is constant)
                    self.trained.setdefault(key, constant.native.detach().clone().requires_grad_())
        self.last = {n: node for node in graph.fx.nodes for n in node.all_input_nodes}

    def parameters(self) -> list[Tensor]:
        return [p for group in self.groups(0.0) for p in group["params"]]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """One group a tensor: its rate is relative to its root mean square."""

        def group(p: Tensor, size: float) -> dict[str, Any]:
            return {"params": [p], "lr": rate * size}

        found = [group(p, _size(p)) for p in self.masters.values()]
        found += [group(p, max(_size(p), 0.1)) for p in self.trained.values()]
        found += [group(layer.growth, 1.0) for layer in self.layers.values()]
        return found + [group(layer.input_growth, 1.0) for layer in self.layers.values() if layer.input_growth is not None]

    def __call__(self, inputs: Sequence[Any]) -> list[Tensor]:
        env: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        for node in self.graph.fx.nodes:
            if node.op == "output":
                leaves = pytree.tree_leaves(fx.node.map_arg(node.args[0], env.__getitem__))
                return [v for v in leaves if isinstance(v, Tensor)]
            env[node] = next(feed) if node.op == "placeholder" else self._value(node, env)
            for n in node.all_input_nodes:
                if self.last[n] is node:
                    del env[n]
        return []

    def _value(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            key = str(node.target)
            constant = self.graph.constants.get(key)
            if constant is None:
                return self.graph.owned(key)
            return self.trained.get(key, constant.native)
        inside = dict(env)
        layer = self.layers.get(node)
        if layer is not None:
            x = _argument(node, layer.view, "x")
            inside[_weight_of(node, layer.view)] = layer.weight()
            inside[x] = layer.input(env[x])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), inside.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.graph.owned(str(node.target))(*args, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def written_to(self, graph: Graph) -> tuple[dict[fx.Node, tuple[QuantizedWeight, ...]], dict[fx.Node, Tensor]]:
        """Put what was trained into the graph."""
        found: dict[fx.Node, tuple[QuantizedWeight, ...]] = {}
        scales: dict[fx.Node, Tensor] = {}
        for node, layer in self.layers.items():
            found[node] = layer.integers()
            if layer.input_scale is not None:
                scales[node] = layer.input_scale.detach().clone()
            value = torch.stack([w.dequantized() for w in found[node]]).float()
            read = _weight_of(node, layer.view)
            new = Constant.of(from_matrices(value, layer.view).contiguous(), graph.constants[str(read.target)].name)
            node.replace_input_with(read, graph.emit_constant(new, node))
        for key, value in self.trained.items():
            for old in graph.fx.find_nodes(op="get_attr", target=key):
                name = graph.constants[key].name
                first = min(old.users)
                old.replace_all_uses_with(graph.emit_constant(Constant.of(value.detach().clone(), name), first))
        graph.clean()
        return found, scales


def _trainable(view: Value) -> TypeGuard[Op]:
    """Is it a product with a constant weight, or a convolution? A transposed one has no integer form."""
    return view.weight is not None and (view.weight.linear or isinstance(view, Conv))


def _further(view: Value) -> Iterator[str]:
    """Fields that are trained beside the weights of quantized layers."""
    if isinstance(view, _NORMS):
        yield from (name for name in ("gamma", "beta") if hasattr(view, name))
    elif view.weight is not None and view.weight.bias_field:
        yield view.weight.bias_field


def _argument(node: fx.Node, view: Op, field: str) -> fx.Node:
    """The node that a field of the view is read from."""
    fields = [f.name for f in dataclasses.fields(view) if f.name not in ("node", "target")]
    found = node.args[fields.index(field)]
    assert isinstance(found, fx.Node)
    return found


def _weight_of(node: fx.Node, view: Op) -> fx.Node:
    return _argument(node, view, _weight(view).field)


def _units(start: Sequence[QuantizedWeight]) -> Tensor:
    """From codes to what the integer product multiplies with: (groups, 1 or N, K)."""
    return torch.stack([w.units().float() for w in start])


def _near(view: Op, weight: Tensor, start: Sequence[QuantizedWeight]) -> Tensor:
    """The weights, as near to the given codes as these ask for: GPTQ rounds to others than the nearest."""
    step = torch.stack([w.scale for w in start]).unsqueeze(-1) * _units(start)
    y, codes = as_matrices(weight.detach(), view) / step, torch.stack([w.codes for w in start]).float()
    low, top = start[0].code_range
    inside = torch.maximum(torch.minimum(y, codes + _WITHIN), codes - _WITHIN)
    beyond = ((codes == top) & (y > top)) | ((codes == low) & (y < low))  # clipped weights stay where they are
    return from_matrices(torch.where(beyond, y, inside) * step, view).contiguous()


class _Straight(torch.autograd.Function):
    """The first argument, exactly, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient_of: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _straight(value: Tensor, gradient_of: Tensor) -> Tensor:
    found: Tensor = _Straight.apply(value, gradient_of)
    return found


def _size(p: Tensor) -> float:
    return float(p.detach().square().mean().sqrt()) if p.numel() else 1.0
