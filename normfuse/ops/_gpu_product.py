"""Integer products with packed weights on a GPU."""

from __future__ import annotations

from torch import Tensor

from normfuse.gpu.product import plan_product
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import run
from normfuse.ops._prepared import GpuWeight

__all__ = ["gpu_product", "gpu_rows"]


def gpu_product(
    q: Tensor, row_scale: Tensor, weight: GpuWeight, bits: int, epilogue: str, residual: Tensor | None, dtype: str
) -> Tensor:
    """act(row_scale · scale · Σ_k q (C << shifts) + bias) + residual in one launch.

    Args:
        q: int8 [..., K].
        row_scale: float32, one a row.
        weight: as `normfuse.ops._prepared.gpu_weight` gives it.
        bits: of C.
        epilogue: a name of `EPILOGUES`.
        residual: [..., N] or None.
        dtype: of the result, a name of `normfuse.gpu.launch.DTYPES`.
    """
    k, n = q.shape[-1], weight.scale.numel()
    inputs = {
        "q": q.contiguous(),
        "row_scale": row_scale,
        "planes": weight.planes,
        "shifts": weight.shifts,
        "scale": weight.scale,
        "bias": weight.bias,
        "residual": residual,
    }
    launch = plan_product(
        k,
        n,
        dtype,
        bits,
        weight.groups,
        bias=weight.bias is not None,
        residual=residual is not None,
        epilogue=epilogue,
        rows_hint=q.numel() // k,
    )
    (y,) = run(launch, {name: value for name, value in inputs.items() if value is not None})
    return y


def gpu_rows(x: Tensor, dtype: str, bits: int, static: float | None) -> tuple[Tensor, Tensor]:
    """`normfuse.quant.integers.quantize_rows`, or `quantize_static` and the scale once a row."""
    q, scale = run(plan_rows(x.shape[-1], dtype, bits, static=static), {"x": x.contiguous()})
    return q, scale
