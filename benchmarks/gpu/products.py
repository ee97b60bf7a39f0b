"""Integer products with packed weights against what PyTorch has: fp16 products, and int8 ones by `torch._int_mm`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.asked import Asked
from benchmarks.gpu.clock import DEVICE, Call, compare, copies
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.planes import planes
from normfuse.gpu.product import plan_product
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import run

__all__ = ["measure"]

#: Rows, inputs, outputs: a token and a few of a large language model, an image batch of ViT-B, a long prompt.
SIZES = ((1, 4096, 4096), (16, 4096, 4096), (1576, 768, 3072), (4096, 4096, 4096))
_INT_MM_ROWS = 17  # the fewest that `torch._int_mm` takes


def measure(asked: Asked) -> list[dict[str, Any]]:
    """One row a size."""
    from benchmarks.gpu.tables import product_line

    rows = []
    for size in SIZES[:3:2] if asked.quick else SIZES:
        if asked.late("product " + "x".join(map(str, size))):
            continue
        rows.append(_row(*size, asked.seconds))
        print(product_line(rows[-1]), flush=True)
    return rows


def _row(n: int, k: int, m: int, seconds: float) -> dict[str, Any]:
    count = min(128, copies(k * m // 2))  # the narrowest weights are read from memory too, not from the cache
    with torch.inference_mode():
        timings, failed = compare(_contenders(n, k, m, count), count, seconds)
    return {"size": [n, k, m], "operations": 2 * n * k * m, "timings": {t.name: t.to_dict() for t in timings}, "failed": failed}


def _contenders(n: int, k: int, m: int, count: int) -> dict[str, Call]:
    x = torch.randn(n, k, device=DEVICE, dtype=torch.float16)
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
    weights = [(torch.randn(m, k, device=DEVICE) / k**0.5).half() for _ in range(count)]
    codes = [torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE) for _ in range(count)]
    row_scale, scale = torch.rand(n, 1, device=DEVICE), torch.rand(m, device=DEVICE)

    def ours(bits: int, groups: int, *, rows: bool = False) -> Call:
        top = 2 ** (bits - 1) - 1
        packed = [planes(c.clamp(-top, top), bits) for c in codes]
        shifts = torch.arange(k, device=DEVICE).mul(groups).div(k, rounding_mode="floor").to(torch.uint8)
        launch = plan_product(k, m, "fp16", bits, groups, bias=False, residual=False, epilogue="none", rows_hint=n)

        def call(i: int) -> Any:
            given: tuple[Tensor, ...] = run(plan_rows(k, "fp16", 8, static=None), {"x": x}) if rows else (q, row_scale)
            inputs = {"q": given[0], "row_scale": given[1], "planes": packed[i], "shifts": shifts, "scale": scale}
            return run(launch, inputs)

        return call

    def fused(i: int) -> Any:
        launch = plan_norm_linear("rms", k, m, "fp16", bias=False, eps=1e-5, epilogue="none", rows_hint=n)
        return run(launch, {"x": x, "weight": weights[i]})

    found: dict[str, Call] = {
        "fp16 linear": lambda i: F.linear(x, weights[i]),
        "w8a8": ours(8, 1),
        "w4a8": ours(4, 1),
        "w4a8, 4 groups": ours(4, 4),
        "quantize + w4a8, 4 groups": ours(4, 4, rows=True),
        "RMSNorm, fp16 linear": lambda i: F.linear(F.rms_norm(x, (k,), None, 1e-5), weights[i]),
        "RMSNorm + linear": fused,
    }
    if n >= _INT_MM_ROWS:
        found["torch._int_mm"] = lambda i: torch._int_mm(q, codes[i].t())
    return found
