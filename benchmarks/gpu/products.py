"""Integer products with packed weights against PyTorch's fp16 and integer products and, where it is installed, torchao's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.asked import Asked
from benchmarks.gpu.clock import DEVICE, Call, cached, compare, copies, said
from normfuse.gpu.launch import Launch
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.planes import planes
from normfuse.gpu.product import plan_product
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import run

__all__ = ["SIZES", "launches", "measure"]

#: Rows, inputs, outputs: a token and a few of a large language model, an image batch of ViT-B, a long prompt.
SIZES = ((1, 4096, 4096), (16, 4096, 4096), (1576, 768, 3072), (4096, 4096, 4096))
_INT_MM_ROWS = 17  # the fewest that `torch._int_mm` takes
_MOST_COPIES = 128
_OURS = (("w8a8", 8, 1), ("w4a8", 4, 1), ("w4a8, 4 groups", 4, 4))

# torchao's names, their options, and bytes of a weight. Its other int4 format asks for one more library.
_TORCHAO: tuple[tuple[str, str, dict[str, str], float], ...] = (
    ("torchao, int4 weights", "Int4WeightOnlyConfig", {"int4_packing_format": "tile_packed_to_4d"}, 0.5),
    ("torchao, int8 weights", "Int8WeightOnlyConfig", {}, 1),
    ("torchao, int8 weights and rows", "Int8DynamicActivationInt8WeightConfig", {}, 1),
)

_Copies = tuple[Call, float]  # a contender, and bytes of weights of one copy


def measure(asked: Asked, sizes: Sequence[tuple[int, int, int]] | None = None, *, beside: str = "") -> list[dict[str, Any]]:
    """One row a size.

    Args:
        beside: "torchao": ours and torchao's, which takes long to compile; else what PyTorch has.
    """
    from benchmarks.gpu.tables import product_line

    rows = []
    for size in sizes or (SIZES[:3:2] if asked.quick else SIZES):
        if asked.late("product " + "x".join(map(str, size))):
            continue
        rows.append(_row(*size, asked.seconds, beside))
        asked.keep(rows[-1])
        print(product_line(rows[-1]), flush=True)
    return rows


def launches(n: int, k: int, m: int) -> list[Launch]:
    """Kernels of ours that are timed."""
    return [*(_product(n, k, m, bits, groups) for _, bits, groups in _OURS), plan_rows(k, "fp16", 8, static=None), _fused(n, k, m)]


def _product(n: int, k: int, m: int, bits: int, groups: int) -> Launch:
    return plan_product(k, m, "fp16", bits, groups, bias=False, residual=False, epilogue="none", rows_hint=n)


def _fused(n: int, k: int, m: int) -> Launch:
    return plan_norm_linear("rms", k, m, "fp16", bias=False, eps=1e-5, epilogue="none", rows_hint=n)


def _row(n: int, k: int, m: int, seconds: float, beside: str) -> dict[str, Any]:
    """`cached`: contenders whose weights may be read from the cache: its copies are less than twice as large."""
    count = min(_MOST_COPIES, copies(k * m // 2))  # the narrowest weights are read from memory too
    ready: dict[str, _Copies] = {}
    missing: dict[str, str] = {}
    with torch.inference_mode():
        for name, make in _contenders(n, k, m, count, beside).items():
            try:
                ready[name] = make()
            except Exception as e:  # a library of another version, or one that does not know this GPU
                missing[name] = said(e)
        timings, failed = compare({name: call for name, (call, _) in ready.items()}, count, seconds)
    return {
        "size": [n, k, m],
        "beside": beside,
        "operations": 2 * n * k * m,
        "timings": {t.name: t.to_dict() for t in timings},
        "failed": missing | failed,
        "cached": [name for name, (_, size) in ready.items() if cached(int(size), count)],
    }


def _contenders(n: int, k: int, m: int, count: int, beside: str) -> dict[str, Callable[[], _Copies]]:
    """By name, what makes a contender; the first one is what the others are compared with."""
    x = torch.randn(n, k, device=DEVICE, dtype=torch.float16)
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
    weights = [(torch.randn(m, k, device=DEVICE) / k**0.5).half() for _ in range(count)]
    codes = [torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE) for _ in range(count)]
    row_scale, scale = torch.rand(n, 1, device=DEVICE), torch.rand(m, device=DEVICE)
    torch._dynamo.reset()  # sizes are compiled apart, and only so many of one function

    def ours(bits: int, groups: int, *, rows: bool = False) -> _Copies:
        top = 2 ** (bits - 1) - 1
        packed = [planes(c.clamp(-top, top), bits) for c in codes]
        shifts = torch.arange(k, device=DEVICE).mul(groups).div(k, rounding_mode="floor").to(torch.uint8)
        launch, quantize = _product(n, k, m, bits, groups), plan_rows(k, "fp16", 8, static=None)

        def call(i: int) -> Any:
            given: tuple[Tensor, ...] = run(quantize, {"x": x}) if rows else (q, row_scale)
            inputs = {"q": given[0], "row_scale": given[1], "planes": packed[i], "shifts": shifts, "scale": scale}
            return run(launch, inputs)

        return call, packed[0].numel()

    def torchs(call: Call, size: float = 2) -> Callable[[], _Copies]:
        return lambda: (call, size * k * m)

    def compiled(function: Callable[..., Tensor], size: float, *tensors: list[Tensor]) -> Callable[[], _Copies]:
        def make() -> _Copies:
            fast = torch.compile(function, dynamic=False)
            return lambda i: fast(x, *(t[i] for t in tensors)), size * k * m

        return make

    def normed(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, (k,), None, 1e-5), w)

    fused = _fused(n, k, m)
    found: dict[str, Callable[[], _Copies]] = {
        "fp16 linear": torchs(lambda i: F.linear(x, weights[i])),
        **{name: lambda b=bits, g=groups: ours(b, g) for name, bits, groups in _OURS},  # type: ignore[misc]
    }
    if beside:
        theirs = {name: lambda a=given: _torchao(x, weights, *a) for name, *given in _TORCHAO}
        return found | theirs
    found |= {
        "fp16 linear, compiled": compiled(F.linear, 2, weights),
        "quantize + w4a8, 4 groups": lambda: ours(4, 4, rows=True),
        "int8 weights, fp16 products, compiled": compiled(lambda x, c: F.linear(x, c.half()) * scale.half(), 1, codes),
        "RMSNorm, fp16 linear": torchs(lambda i: normed(x, weights[i])),
        "RMSNorm, fp16 linear, compiled": compiled(normed, 2, weights),
        "RMSNorm + linear": torchs(lambda i: run(fused, {"x": x, "weight": weights[i]})),
    }
    if n >= _INT_MM_ROWS:
        found["torch._int_mm"] = torchs(lambda i: torch._int_mm(q, codes[i].t()), 1)
    return found


def _torchao(x: Tensor, weights: list[Tensor], config: str, options: Mapping[str, str], size: float) -> _Copies:
    """Weights as torchao keeps them, in bfloat16 as its int4 wants it; compiled, as its documentation wants it.

    Raises:
        ImportError: torchao is not installed. Others: it has no such form, or not on this GPU.
    """
    quantization = importlib.import_module("torchao.quantization")
    kept = []
    for w in weights:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=torch.bfloat16).requires_grad_(False)
        layer.weight.copy_(w)
        quantization.quantize_(layer, getattr(quantization, config)(**options))
        kept.append(layer.weight)
    rows, fast = x.bfloat16(), torch.compile(F.linear, dynamic=False)
    return lambda i: fast(rows, kept[i]), size * weights[0].numel()
