"""A number format of one's own: a scheme, its pass, and what it makes of a layer; all else is shared with ShiftQuant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normfuse
from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Pass, Rewriting
from normfuse.passes.quantize.coded import CodedProduct, Shared
from normfuse.passes.quantize.layers.find import find_layers, products
from normfuse.passes.quantize.measure import measure
from normfuse.passes.quantize.summary import kept, quantized
from normfuse.quant.scheme import Scheme


@dataclass(frozen=True)
class Powers(Scheme):
    """Each weight as a power of two and a sign."""

    rewritten_by = (__name__, "IntoPowers")
    keep: tuple[str, ...] = ()
    overrides: Any = ()
    fitted: bool = False

    @property
    def needs_data(self) -> str:
        return "fitted=True" if self.fitted else ""

    def at(self, path: str) -> Powers:
        return self


@dataclass(frozen=True, eq=False)
class Powered(CodedProduct):
    exponents: Tensor

    @property
    def activation_bits(self) -> int:  # type: ignore[override]
        return 32

    @property
    def bytes(self) -> int:
        return self.exponents.numel()

    @property
    def weight(self) -> Tensor:
        return torch.exp2(self.exponents.double()) * self.layer.matrix().sign()

    def __call__(self, x: Tensor, *, bare: bool = False) -> Tensor:
        y = self.layer.reference(x, self.weight)
        return y if bare or self.bias is None else y + self.bias

    def emit(self, graph: Graph, shared: Shared, emitted: Mapping[fx.Node, fx.Node]) -> fx.Node:
        layer = self.layer
        found = (Constant.of(self.weight[0].float(), layer.weight.name), layer.bias)
        weight, bias = (None if c is None else graph.emit_constant(c, layer.tail) for c in found)
        new = graph.call(torch.ops.aten.linear.default, (emitted.get(layer.x, layer.x), weight, bias), layer.tail, layer.node)
        layer.tail.replace_all_uses_with(new)
        return new


@dataclass(frozen=True)
class IntoPowers(Pass):
    name = "powers"
    changes = "makes weights powers of two"
    leaves_affines = False

    scheme: Powers

    def rewrite(self, work: Rewriting) -> None:
        layers, refused = find_layers(work.graph, self.scheme)
        coded = []
        for layer in products(layers):
            exponents = layer.matrix().abs().clamp_min(2.0**-20).log2().round().to(torch.int8)
            coded.append(Powered(layer, 5, None if layer.bias is None else layer.bias.value.float(), None, exponents))
        measured = measure(work.graph, work.run.samples, coded)
        for c in coded:
            work.quantization.append(quantized(c, measured.get(c.layer), None, (), [c.layer.weight]))
            work.done("powers", c.layer.node, "5 bits")
            c.emit(work.graph, {}, {})
        for node, kind, refusal in refused:
            work.quantization.append(kept(work.graph, node, kind, refusal, None, ()))
        work.graph.clean()


def test_a_number_format_of_ones_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 2)).eval(), torch.randn(5, 8)
    fast = normfuse.optimize(model, (x,), quantize=Powers(keep=("3",)))
    entries = {e.path: e for e in normfuse.report(fast).quantization}
    assert (entries["0"].weight_bits, entries["0"].kind, entries["0"].bytes_after) == (5, "linear", 128)
    assert entries["0"].sqnr is not None
    assert entries["3"].kept == "kept in float by keep='3'"
    mantissa, _ = torch.frexp(fast.get_parameter("0.weight"))
    assert set(mantissa.abs().unique().tolist()) == {0.5}
    assert torch.equal(fast.get_parameter("3.weight"), model[3].weight)
    with torch.no_grad():
        assert float((fast(x) - model(x)).abs().max()) < 0.5


def test_what_a_scheme_needs_is_asked_for() -> None:
    model, x = nn.Linear(8, 4).eval(), torch.randn(2, 8)
    with pytest.raises(UsageError, match="fitted=True takes its scales from data"):
        normfuse.optimize(model, (x,), quantize=Powers(fitted=True))
    with pytest.raises(UsageError, match=r"expected a normfuse\.ShiftQuant"):
        normfuse.optimize(model, (x,), quantize=Powers)
