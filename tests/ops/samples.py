"""Arguments for one call of each operator. A test file of this folder may bring its own: `SAMPLES`, by operator."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

from normfuse.quant.packing import pack_rows
from tests import ops
from tests.ops.quantized import convolution, linear, random_weight

__all__ = ["CONSTANTS", "samples"]

#: Arguments of these names are weights in a model, and constants in a file.
CONSTANTS = frozenset(["weight", "exponents", "scale", "bias", "input_scale", "codes", "gain", "shift"])


def _ours() -> dict[str, tuple[Any, ...]]:
    layer, conv, table = linear(20, 30), convolution(6, 4, (3, 3)), random_weight(9, 7, 4, 1)
    x = torch.randn(3, 5, 30)
    q, s = torch.randint(-127, 128, (3, 5, 30), dtype=torch.int8), torch.rand(3, 5, 1)
    heads = [torch.randn(2, 7, 4, 6).transpose(1, 2), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 6)]
    return {
        "shiftquant_linear": (x, *layer.arguments, None, 4, 8, "gelu"),
        "shiftquant_conv2d": (torch.randn(2, 4, 6, 7), *conv.arguments, None, 4, 8, [3, 3], [2, 1], [1, 0], [1, 1], 1),
        "shiftquant_embedding": (torch.tensor([[1, 3, 8]]), pack_rows(table.codes, 4), table.scale, 7, 4),
        "quantize_rows": (x, 8),
        "norm_quantize": (x, x.flip(0), torch.ones(30), None, "rms", 1e-5, 1.0, 8),
        "shiftquant_matmul": (q, s, *layer.arguments, torch.randn(3, 5, 20), 4, "relu"),
        "shiftquant_matmul_quantize": (q, s, *layer.arguments, None, 4, "none", 8),
        "rms_norm": (x, torch.ones(30), 1e-5),
        "crms_norm": (x, None, 1e-5),
        "add_rms_norm": (x, x.flip(0), torch.ones(30), 1e-5),
        "add_crms_norm": (x, x.flip(0), None, 1e-5),
        "rms_norm_linear": (x, torch.randn(20, 30), torch.ones(20), 1e-5, "gelu"),
        "l1_norm": (x, torch.ones(30), torch.zeros(30), 1e-5, 1.25),
        "two_pass_softmax": (x,),
        "attention": (*heads, None, 0.3, True),
        "shiftquant_attention": (*heads, torch.randn(7, 7), 0.3, False, 8),
    }


def samples() -> dict[str, tuple[Any, ...]]:
    """By operator."""
    found = _ours()
    for module in pkgutil.iter_modules(ops.__path__):
        if module.name.startswith("test_"):
            found |= getattr(importlib.import_module(f"tests.ops.{module.name}"), "SAMPLES", {})
    return found
