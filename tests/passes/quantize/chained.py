"""Small networks in codes, for the tests of chains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normfuse
from normfuse import native
from normfuse.export import to_onnx

__all__ = ["files_agree", "images", "operators", "quantized", "spec", "sqnr", "value_of"]

_SIZE = (2, 3, 20, 18)


def spec(**given: Any) -> normfuse.ShiftQuant:
    chosen: dict[str, Any] = {"weight_bits": 8, "activations": "static", "chains": True, "prefer": "size", "rounding": "nearest"}
    return normfuse.ShiftQuant(**(chosen | given))


def images(count: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(_SIZE, generator=g) for _ in range(count)]


def quantized(model: nn.Module, **given: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, 0, 0.1)
    batches = images()
    return normfuse.optimize(model.eval(), (batches[0],), quantize=spec(**given), calibration=batches)


def operators(module: fx.GraphModule) -> Counter[str]:
    return Counter(getattr(n.target, "_opname", "") for n in module.graph.nodes if n.op == "call_function")


def sqnr(model: nn.Module, fast: nn.Module) -> float:
    x = images(5)[4]
    with torch.no_grad():
        y, found = model(x), fast(x)
    return float(10 * torch.log10(y.square().sum() / (y - found).square().sum()))


def files_agree(fast: fx.GraphModule, folder: Path, tolerance: float = 1e-4) -> None:
    """The native and the integer file of a module give its outputs, up to `tolerance` of the largest."""
    ort = pytest.importorskip("onnxruntime")
    x = images(5)[4]
    with torch.no_grad():
        y = fast(x)
    for form in ("native", "integer"):
        to_onnx(fast, folder / f"{form}.onnx", form=form)
        options = ort.SessionOptions()
        if form == "native":
            options.register_custom_ops_library(str(native.path()))
        session = ort.InferenceSession(folder / f"{form}.onnx", options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=tolerance * float(y.abs().max()))


def value_of(module: fx.GraphModule, node: fx.Node, x: Tensor) -> Tensor:
    class _Until(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n is node:
                self.kept = value
            return value

    with torch.no_grad():
        until = _Until(module)
        until.run(x)
    return until.kept
