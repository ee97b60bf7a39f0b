"""Tiny models for the export tests, and the comparison every one of them makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.export import Exported, to_onnx
from normfuse.export.onnx.runtime import run, session
from tests.zoo_entry import randomise_norms

AUTO = torch.export.Dim.AUTO


class Attention(nn.Module):
    """One attention of torch with everything that it can be asked for.

    `style`: `packed` (timm), `separate` (BERT), `split` (GPT-2: Gemm and Split), `interleaved` (GPT-NeoX), `eager`.
    """

    def __init__(self, style: str = "packed", heads: int = 4, width: int = 8, **options: Any) -> None:
        super().__init__()
        self.style, self.heads, self.width, self.options = style, heads, width, options
        size = heads * width
        self.norm = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        h, d = self.heads, self.width
        y = self.norm(x)
        if self.style in ("packed", "eager"):
            q, k, v = self.qkv(y).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.style == "interleaved":
            q, k, v = self.qkv(y).reshape(b, n, h, 3, d).transpose(1, 2).unbind(3)
        elif self.style == "split":
            flat = torch.addmm(self.qkv.bias, y.reshape(-1, c), self.qkv.weight.t())
            q, k, v = (t.view(b, n, h, d).transpose(1, 2) for t in flat.view(b, n, 3 * c).split(c, dim=2))
        else:
            q, k, v = (f(y).view(b, n, h, d).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.style == "eager":
            scores = q @ k.transpose(-2, -1) * d**-0.5
            z = (scores if mask is None else scores + mask).softmax(-1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return x + self.out(z.transpose(1, 2).reshape(b, n, c))


def attention(style: str = "packed", **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return randomise_norms(Attention(style, **options)).eval()


def exported(model: nn.Module, inputs: Any, folder: Path, **options: Any) -> Exported:
    options = {"threads": 1, "measure_seconds": 0.3, "progress": False} | options
    return to_onnx(model, folder / "model.onnx", example_inputs=inputs, **options)


def outputs(file: Path | Exported, **feeds: Tensor) -> dict[str, Tensor]:
    path = file.path if isinstance(file, Exported) else file
    return run(session(path, threads=1), feeds)


def relative(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |b|"""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())
