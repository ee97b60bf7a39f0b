"""Tiny quantized models for the export tests: single operators with extreme codes, and whole models through the pass."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
import normfuse.ops
from normfuse.export import Exported, to_onnx
from normfuse.export.lowering.attention.forms import AttentionForms, forms_in
from normfuse.export.lowering.lowering import lowered
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.program import program
from normfuse.export.onnx.quantized.forms import passes_of
from normfuse.export.onnx.runtime import run, session
from normfuse.export.onnx.writer.save import save_model
from normfuse.export.targets import TARGETS
from normfuse.passes.attention.eager import EagerAttention
from normfuse.passes.attention.static_masks import StaticMasks
from normfuse.quant.packing import pack, pack_groups, pack_multipliers, pack_rows
from normfuse.quant.weight import QuantizedWeight, largest_multiplier

ops = torch.ops.normfuse


def weight(n: int, k: int, bits: int, groups: int, *, block: int = 0, extreme: bool = False) -> QuantizedWeight:
    """Random codes; `extreme`: all of them, and all multipliers, the largest, so that pairs of products saturate 16 bits where a
    kernel lets them."""
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (n, k), dtype=torch.int8)
    if extreme:
        codes = torch.full_like(codes, top)
        codes[n // 2 :] = -top
    exponents = torch.randint(0, groups, (k,), dtype=torch.uint8)
    exponents[0] = groups - 1
    plain = QuantizedWeight(codes, exponents, torch.rand(n) * 0.02 + 0.001, bits)
    if not block:
        return plain
    most = largest_multiplier(bits)
    m = torch.randint(most if extreme else 1, most + 1, (n, -(-k // block)))
    m[:, ::2] *= -1
    codes = torch.where(codes < 0, -top - 1, codes) if extreme else codes
    return dataclasses.replace(
        plain, codes=codes.to(torch.int8), scale=plain.scale / most, multipliers=m.to(torch.int8), block=block
    )


class Call(nn.Module):
    """One operator; tensors are buffers."""

    def __init__(self, f: Callable[..., Any], **tensors: Tensor | None) -> None:
        super().__init__()
        self.f = f
        self.names = tuple(tensors)
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def forward(self, *inputs: Tensor) -> Any:
        return self.f(*inputs, **{n: getattr(self, n) for n in self.names})


def linear(
    n: int = 20,
    k: int = 37,
    bits: int = 4,
    groups: int = 4,
    activation_bits: int = 8,
    *,
    bias: bool = True,
    epilogue: str = "none",
    static: float | None = None,
    block: int = 0,
    extreme: bool = False,
) -> nn.Module:
    w = weight(n, k, bits, groups, block=block, extreme=extreme)

    def call(x: Tensor, w: Tensor, e: Tensor, s: Tensor, b: Tensor | None, i: Tensor | None, m: Tensor | None) -> Tensor:
        out: Tensor = ops.shiftquant_linear(x, w, e, s, b, i, bits, activation_bits, epilogue, multipliers=m)
        return out

    given = None if static is None else torch.tensor(static)
    m = None if w.multipliers is None else pack_multipliers(w.multipliers)
    return Call(call, w=pack(w), e=w.exponents, s=w.scale, b=torch.randn(n) if bias else None, i=given, m=m)


def conv(
    n: int = 24,
    c: int = 12,
    group: int = 1,
    bits: int = 4,
    groups: int = 4,
    *,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, ...] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    static: float | None = None,
    epilogue: str = "none",
) -> nn.Module:
    taps = kernel[0] * kernel[1]
    weights, exponents = [], []
    for _ in range(group):
        e = torch.randint(0, groups, (c // group,), dtype=torch.uint8)
        exponents.append(e)
        plain = weight(n // group, c // group * taps, bits, 1)
        weights.append(QuantizedWeight(plain.codes, e.repeat(taps), plain.scale, bits))
    packed, _, scale = pack_groups(weights)

    def call(x: Tensor, w: Tensor, e: Tensor, s: Tensor, b: Tensor, i: Tensor | None) -> Tensor:
        where = (list(kernel), list(stride), list(padding), list(dilation), group)
        out: Tensor = ops.shiftquant_conv2d(x, w, e, s, b, i, bits, 8, *where, epilogue)
        return out

    given = None if static is None else torch.tensor(static)
    return Call(call, w=packed, e=torch.cat(exponents), s=scale, b=torch.randn(n), i=given)


def embedding(rows: int, dim: int, bits: int) -> nn.Module:
    top = 2 ** (bits - 1) - 1
    codes = pack_rows(torch.randint(-top, top + 1, (rows, dim), dtype=torch.int8), bits)

    def call(i: Tensor, c: Tensor, s: Tensor) -> Tensor:
        out: Tensor = ops.shiftquant_embedding(i, c, s, dim, bits)
        return out

    return Call(call, c=codes, s=torch.rand(rows))


def attention(*, causal: bool = False, mask: Tensor | None = None, kv_heads: int = 4, bits: int = 8) -> nn.Module:
    """Queries, keys and values are cut from one input (B, H, T, D)."""

    def call(x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = ops.shiftquant_attention(x, x[:, -kv_heads:].roll(1, 2), x[:, :kv_heads], mask, 0.3, causal, bits)
        return out

    return Call(call, mask=mask)


def norm_codes(kind: str, width: int, *, residual: bool) -> nn.Module:
    def call(x: Tensor, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        other = x.roll(1, 0) if residual else None
        q, scale, _ = ops.norm_quantize(x, other, gain, shift, kind, 1e-5, 1.25, 8)
        return q, scale

    return Call(call, gain=torch.randn(width), shift=torch.randn(width) if kind in ("layer", "l1") else None)


def product_codes(n: int, k: int, bits: int, groups: int, block: int = 0) -> nn.Module:
    """Codes of codes: quantize_rows, then a product that is quantized again, and one that is not."""
    w = weight(n, k, bits, groups, block=block)

    def call(x: Tensor, w: Tensor, e: Tensor, s: Tensor, b: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, scale = ops.quantize_rows(x, 8)
        codes, rows = ops.shiftquant_matmul_quantize(q, scale, w, e, s, b, None, bits, "relu", 8, m)
        return codes, rows, ops.shiftquant_matmul(q, scale, w, e, s, b, None, bits, "none", m)

    m = None if w.multipliers is None else pack_multipliers(w.multipliers)
    return Call(call, w=pack(w), e=w.exponents, s=w.scale, b=torch.randn(n), m=m)


class Block(nn.Module):
    def __init__(self, d: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vision(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.patch, self.block, self.norm, self.head = (
            nn.Conv2d(3, d, 4, 4), Block(d, 4, causal=False), nn.LayerNorm(d), nn.Linear(d, 10)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


class Text(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.embed, self.block, self.norm = nn.Embedding(50, d), Block(d, 4, causal=True), nn.LayerNorm(d)
        self.head = nn.Linear(d, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(ids))))


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm, self.c, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.norm(self.b(F.relu(self.a(x))))))).mean((2, 3)))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "vision": lambda: torch.randn(2, 3, 16, 16),
    "text": lambda: torch.randint(0, 50, (2, 9)),
    "convs": lambda: torch.randn(2, 3, 9, 11),
}
MODELS: dict[str, Callable[[], nn.Module]] = {"vision": Vision, "text": Text, "convs": Convs}


def quantized(name: str, **spec: Any) -> tuple[nn.Module, Tensor]:
    """The model `name` through `normfuse.optimize(quantize=...)`, and its input."""
    torch.manual_seed(3)
    model, x = MODELS[name]().eval(), INPUTS[name]()
    options = {"prefer": "size", "exponents": "range", **spec}
    fast = normfuse.optimize(model, (x,), quantize=normfuse.ShiftQuant(**options), calibration=[x], verify="off")
    return fast, x


class Translated:
    """A model that is translated once, and written in several forms of its quantized layers or of its attention."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], opset: int = 23, dynamic_shapes: Any = None) -> None:
        self.model, self.opset = model.eval(), opset
        self.program = program(model, inputs, dynamic_shapes)
        self.lowered = lowered(self.program.exported, (StaticMasks(), EagerAttention()))
        self.onnx = self._translated(self.lowered.exported)

    def _translated(self, exported: torch.export.ExportedProgram) -> Any:
        return translated(dataclasses.replace(self.program, exported=exported), self.opset, contrib=True)

    @functools.cached_property
    def fused(self) -> Any:
        """With what stands side by side as one operator, as files with our kernels have it."""
        return self._translated(self.lowered.then(passes_of(("native",))).exported)

    def written(self, file: Path, form: str, *, target: str = "onnxruntime", int4: bool = False) -> Path:
        model = self.fused if form == "native" else self.onnx
        save_model(finished(model, self.program, TARGETS[target], self.opset, form, int4=int4), file)
        return file

    def attending(self, file: Path, form: str) -> dict[str, int]:
        """Write it for ONNX Runtime with its attention in `form`; how many sites got which form."""
        formed = self.lowered.then([AttentionForms(form, self.opset)]).exported
        save_model(finished(self._translated(formed), self.program, TARGETS["onnxruntime"], self.opset), file)
        return dict(Counter(name for _, name in forms_in(formed.graph.nodes)))

    def run(self, opened: Any, *inputs: Tensor) -> list[Tensor]:
        return list(run(opened, dict(zip(self.program.inputs, inputs, strict=True))).values())


def exported(model: nn.Module, inputs: Any, folder: Path, **options: Any) -> Exported:
    options = {"threads": 1, "measure_seconds": 0.1, "progress": False, "attention": "decomposed"} | options
    given = {} if hasattr(model, "meta") and inputs is None else {"example_inputs": inputs}
    return to_onnx(model, folder / "model.onnx", force=True, **given, **options)


def outputs(file: Exported, *inputs: Tensor, **options: Any) -> list[Tensor]:
    opened = session(file.path, threads=1, **options)
    return list(run(opened, dict(zip(file.inputs, inputs, strict=True))).values())
