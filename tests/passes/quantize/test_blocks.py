"""Weights in blocks through the pass: which layers have them, what they gain, and that they are trained and saved as others are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normfuse
from tests.passes.quantize.quantized import sqnr

ops = torch.ops.normfuse


class Uneven(nn.Module):
    """Linear layers whose blocks of 32 weights differ in size, for each output another way, and a convolution of 1 × 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(96, 96, 1)
        self.a, self.b = nn.Linear(96, 128), nn.Linear(128, 40)
        for layer in (self.a, self.b):
            n, k = layer.weight.shape
            layer.weight.data *= torch.exp2(3 * torch.rand(n, k // 32)).repeat_interleave(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.conv(x.transpose(1, 2)).transpose(1, 2)).relu())


def _quantized(model: nn.Module, x: Tensor, how: Any) -> fx.GraphModule:
    return normfuse.optimize(model, (x,), quantize=how, calibration=[x], verify="off")


def _multipliers(gm: fx.GraphModule) -> list[tuple[int, ...] | None]:
    calls = [n for n in gm.graph.nodes if n.target is ops.shiftquant_linear.default]
    given = [n.args[10] if len(n.args) > 10 else None for n in calls]
    return [None if m is None else tuple(gm.get_buffer(str(m.target)).shape) for m in given]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Uneven().eval()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_linear_layers_gain(bits: int, model: nn.Module) -> None:
    x = torch.randn(2, 50, 96)
    y = model(x).detach()
    found = {words: _quantized(model, x, f"w{bits}a8,size,{words}") for words in ("groups=4", "block=32")}
    gain = sqnr(y, found["block=32"](x)) - sqnr(y, found["groups=4"](x))
    assert gain > 1
    assert _multipliers(found["groups=4"]) == [None, None]
    assert _multipliers(found["block=32"]) == [(8, 3, 16), (3, 4, 16)]


def test_widths_and_layers_without_blocks(model: nn.Module) -> None:
    x = torch.randn(2, 50, 96)
    spec = normfuse.ShiftQuant(prefer="size", block=64, overrides={"a": {"weight_bits": 8}, "b": {"block": 32}})
    assert _multipliers(_quantized(model, x, spec)) == [None, (3, 4, 16)]


def test_a_saved_module_has_its_blocks(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 50, 96)
    gm = _quantized(model, x, "w4a8,size,block=32")
    normfuse.save(gm, tmp_path / "m.pt2")
    again = normfuse.load(tmp_path / "m.pt2")
    assert torch.equal(gm(x), again(x))


def test_fine_tuning_keeps_the_multipliers(model: nn.Module) -> None:
    x = torch.randn(2, 50, 96)
    spec = normfuse.ShiftQuant(weight_bits=2, prefer="size", block=32, finetune_steps=20)
    gm, before = _quantized(model, x, spec), _quantized(model, x, dataclasses.replace(spec, finetune_steps=0))
    assert _multipliers(gm) == _multipliers(before) == [(8, 3, 16), (3, 4, 16)]
    y = model(x).detach()
    assert sqnr(y, gm(x)) > sqnr(y, before(x))
