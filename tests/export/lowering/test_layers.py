"""Which calls of a program are layers of ours, and what is refused of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from normfuse.errors import ExportError
from normfuse.export.lowering.layers import facts_of_call, quantized_layers
from normfuse.export.ops import OP_OF
from tests.export.quantized_models import linear

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """A quantized layer whose scale is computed."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.layer, self.scale = linear(16, 16, static=0.03), scale

    def forward(self, x: Tensor) -> Tensor:
        held = {name: getattr(self.layer, name) for name in ("w", "e", "s", "b", "m")}
        out: Tensor = self.layer.f(x, **held, i=self.scale(x))  # type: ignore[operator]
        return out


def _exported(model: nn.Module) -> Any:
    return torch.export.export(model.eval(), (X,))


def test_operators_of_torch_with_the_name_of_one_of_ours_are_none() -> None:
    assert "rms_norm" in OP_OF
    assert not quantized_layers(_exported(nn.RMSNorm(16)))


def test_operators_of_ours_that_no_file_has_are_no_layers() -> None:
    known = [layer.operator for layer in quantized_layers(_exported(linear(16, 16)))]
    assert known == ["shiftquant_linear"]


def test_a_scale_that_is_computed_is_refused() -> None:
    with pytest.raises(ExportError, match=r"input_scale of .* is no constant"):
        quantized_layers(_exported(Scaled(lambda x: x.abs().amax())))


class _Call:
    """A call whose `input_scale` has two numbers."""

    attributes: dict[str, Any] = dict.fromkeys(("bits", "activation_bits"), 8) | {"epilogue": "none"}

    def array(self, name: str) -> np.ndarray[Any, Any]:
        return np.ones(2, np.float32)

    def size(self, name: str, axis: int) -> int:
        return 16


def test_one_scale_a_call() -> None:
    op = OP_OF["shiftquant_linear"]
    with pytest.raises(ExportError, match="input_scale of ShiftQuantLinear is not one number"):
        facts_of_call(op, _Call(), {"input_scale": fx.Graph().placeholder("s")})  # type: ignore[arg-type]
