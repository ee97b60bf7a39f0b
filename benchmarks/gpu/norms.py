"""Memory-bound kernels: ours, PyTorch's own and torch.compile's, and the share of the bandwidth that ours reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.asked import Asked
from benchmarks.gpu.clock import DEVICE, bandwidth, cached, compare, copies
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import run
from normfuse.gpu.softmax import plan_softmax
from normfuse.ops._norms import normalized

__all__ = ["measure"]

SHAPES = ((1, 4096), (1576, 768), (4096, 4096), (16384, 1024))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EPS = 1e-5


@dataclass(frozen=True)
class Subject:
    """One function of x and perhaps r, in two spellings.

    Attributes:
        name: in the table.
        ours: (x, r, dtype) by our kernel.
        torch: (x, r) by PyTorch.
        moved: how many tensors of the size of x are read or written.
    """

    name: str
    ours: Callable[[Tensor, Tensor, str], Any]
    torch: Callable[[Tensor, Tensor], Any]
    moved: float


def _ours(kind: str, *, residual: bool = False) -> Callable[[Tensor, Tensor, str], Any]:
    def call(x: Tensor, r: Tensor, dtype: str) -> Any:
        launch = plan_norm(kind, x.shape[-1], dtype, gain=None, shift=None, residual=residual, eps=EPS)
        return run(launch, {"x": x, "residual": r} if residual else {"x": x})

    return call


def _arithmetic(kind: str) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, r: normalized(x.float(), kind, None, None, EPS, 1.0).to(x.dtype)


def _added(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    s = x + r
    return F.rms_norm(s, s.shape[-1:], None, EPS), s


def _quantized(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


SUBJECTS = (
    Subject("RMSNorm", _ours("rms"), lambda x, r: F.rms_norm(x, x.shape[-1:], None, EPS), 2),
    Subject("add + RMSNorm", _ours("rms", residual=True), _added, 4),
    Subject("LayerNorm", _ours("layer"), lambda x, r: F.layer_norm(x, x.shape[-1:], None, None, EPS), 2),
    Subject("CRMSNorm", _ours("crms"), _arithmetic("crms"), 2),
    Subject("L1 norm", _ours("l1"), _arithmetic("l1"), 2),
    Subject("softmax", lambda x, r, d: run(plan_softmax(x.shape[-1], d), {"x": x}), lambda x, r: F.softmax(x, -1), 2),
    Subject("quantize rows", lambda x, r, d: run(plan_rows(x.shape[-1], d, 8, static=None), {"x": x}), _quantized, 1.5),
)


def measure(asked: Asked) -> dict[str, Any]:
    """`copy`: bytes a second; `floor`: µs of a kernel that does next to nothing; `rows`: one a function, dtype and shape."""
    from benchmarks.gpu.tables import norm_line

    limit, floor = bandwidth(asked.seconds), _floor(asked.seconds)
    asked.keep({"copy": limit, "floor": floor})
    print(f"copy: {limit / 1e9:.0f} GB/s; one number: {floor:.2f} µs")
    rows = []
    for subject, dtype, shape in _subjects(asked.quick):
        if asked.late(f"{subject.name} {dtype} {shape[0]}x{shape[1]}"):
            continue
        rows.append(_row(subject, dtype, shape, asked.seconds, limit))
        asked.keep(rows[-1])
        print(norm_line(rows[-1]), flush=True)
    return {"copy": limit, "floor": floor, "rows": rows}


def _floor(seconds: float) -> float:
    one = torch.zeros(1, device=DEVICE)
    (found,), failed = compare({"one number": lambda i: one.add_(1)}, 100, seconds)
    assert not failed
    return found.median


def _subjects(quick: bool) -> Iterator[tuple[Subject, str, tuple[int, int]]]:
    for shape in SHAPES[1:3] if quick else SHAPES:
        yield from ((subject, "fp16", shape) for subject in SUBJECTS)
    if not quick:
        yield from ((subject, "bf16", shape) for subject in SUBJECTS[:3] for shape in SHAPES[1:3])


def _row(subject: Subject, dtype: str, shape: tuple[int, int], seconds: float, limit: float) -> dict[str, Any]:
    size = shape[0] * shape[1] * DTYPES[dtype].itemsize
    moved = subject.moved * size
    count = copies(int(moved))
    xs, rs = (torch.randn(count, *shape, device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
    torch._dynamo.reset()  # shapes are compiled apart, and only so many of one function
    compiled = torch.compile(subject.torch, dynamic=False)
    with torch.inference_mode():
        timings, failed = compare(
            {
                "normfuse": lambda i: subject.ours(xs[i], rs[i], dtype),
                "torch": lambda i: subject.torch(xs[i], rs[i]),
                "compile": lambda i: compiled(xs[i], rs[i]),
            },
            count,
            seconds,
        )
    found = {t.name: t.to_dict() for t in timings}
    ours = found.get("normfuse")
    others = [t["speedup"] for name, t in found.items() if name != "normfuse" and t["speedup"] is not None]
    return {
        "name": subject.name,
        "dtype": dtype,
        "shape": list(shape),
        "bytes": moved,
        "cached": cached(int(moved), count),
        "timings": found,
        "failed": failed,
        # a ratio of the others to ours below 1 means that they are slower
        "best": None if ours is None or not others else [1 / r for r in max(others, key=lambda r: r[1])][::-1],
        "bandwidth": None if ours is None else moved / limit / (ours["median"] / 1e6),
    }
