"""Every kernel against its definition in float64: all dtypes, sizes that are no powers of two, one row, many rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.asked import Asked
from benchmarks.gpu.clock import DEVICE
from normfuse.gpu.launch import Launch
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.planes import planes
from normfuse.gpu.product import plan_product
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import run
from normfuse.gpu.softmax import plan_softmax
from normfuse.gpu.source import interpreted
from normfuse.ops._epilogue import activation
from normfuse.ops._norms import normalized
from normfuse.quant import integers

__all__ = ["FAMILIES", "Case", "cases", "check", "each", "gathered", "measure"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: What max |difference| / max |expected| may be: two roundings of the result, and of float32 sums.
BOUNDS = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}
SIZES = (1, 7, 100, 768, 4096, 5000, 33000)
ROWS = (1, 200)
#: Kernels that are checked together, those first of which least is known.
FAMILIES = ("products", "rows", "norms", "norm + linear")


@dataclass(frozen=True)
class Case:
    """One launch and what it must give.

    Attributes:
        kernel: its name in the table.
        dtype: a key of `DTYPES`.
        label: sizes and options, for what failed.
        launch: what is launched; made late, because planning may fail too.
        inputs: by name.
        expected: results in float64, or in integers that must be met exactly.
    """

    kernel: str
    dtype: str
    label: str
    launch: Callable[[], Launch]
    inputs: dict[str, Tensor]
    expected: Callable[[], tuple[Tensor, ...]]


def measure(asked: Asked) -> list[dict[str, Any]]:
    from benchmarks.gpu.tables import checks_table

    rows = check(DEVICE, quick=asked.quick)
    print(checks_table(rows))
    return rows


def check(device: str, *, quick: bool) -> list[dict[str, Any]]:
    """One row a kernel and dtype: number of cases, the largest error, its bound, and what failed."""
    return gathered(each(device, quick=quick))


def each(device: str, *, quick: bool, families: Sequence[str] = FAMILIES) -> Iterator[dict[str, Any]]:
    """One row a case: kernel, dtype, error (0 where there is none to state), bound, and why it failed, empty where it did not.

    Ends early where the device is lost, as after an illegal address: nothing that runs in the same process could be right.
    """
    for case in cases(device, quick, families):
        row: dict[str, Any] = {"kernel": case.kernel, "dtype": case.dtype, "error": 0.0, "bound": BOUNDS[case.dtype], "failed": ""}
        try:
            row["error"] = _error(case)
        except Exception as e:  # a kernel that does not compile on this GPU is a finding, not the end
            row["failed"] = f"{case.label}: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
        else:
            row["failed"] = "" if row["error"] <= row["bound"] else f"{case.label}: {row['error']:.1e}"
        if row["failed"] and device != "cpu" and (why := _lost()):
            yield {**row, "failed": f"{row['failed']}; the device is lost, what follows was not checked: {why}"}
            return
        yield row


def _lost() -> str:
    try:
        torch.cuda.synchronize()
    except RuntimeError as e:
        return " ".join(str(e).split())[:200]
    return ""


def gathered(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of cases as one row a kernel and dtype."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case in rows:
        names = {name: case[name] for name in ("kernel", "dtype", "bound")}
        row = found.setdefault((case["kernel"], case["dtype"]), {**names, "cases": 0, "error": 0.0, "failed": []})
        row["cases"] += 1
        row["error"] = max(row["error"], case["error"])
        row["failed"] += [case["failed"]] if case["failed"] else []
    return list(found.values())


def _error(case: Case) -> float:
    """The largest relative error; infinite where shapes, NaN or integers differ."""
    worst = 0.0
    for got, wanted in zip(run(case.launch(), case.inputs), case.expected(), strict=True):
        if not wanted.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(got.cpu(), wanted.cpu()) else float("inf"))
            continue
        if got.shape != wanted.shape or not torch.equal(got.isnan(), wanted.isnan()):
            return float("inf")
        size = wanted.nan_to_num().abs().max()
        worst = max(worst, float((got.double() - wanted).nan_to_num().abs().max() / size.clamp_min(1e-30)))
    return worst


def cases(device: str, quick: bool, families: Sequence[str] = FAMILIES) -> Iterator[Case]:
    """What is checked. On the CPU few and small ones: kernels are only compiled there, or interpreted, and slow."""
    small = device == "cpu"
    dtypes = [d for d in DTYPES if not (interpreted() and d == "bf16")]
    sizes = (1, 7, 100) if small and quick else (1, 100, 1000) if small or quick else SIZES
    rows = (3,) if quick else (1, 5) if small else ROWS
    torch.manual_seed(0)
    for dtype in dtypes:
        for d, n in itertools.product(sizes, rows):
            if "norms" in families:
                yield from _norms(device, dtype, n, d)
                yield _softmax(device, dtype, n, d)
            if "rows" in families:
                yield from _rows(device, dtype, n, d)
    few = ((3, 100, 72), (200, 768, 1000))
    products = ((3, 40, 24),) if small else few if quick else ((1, 4096, 512), *few)
    for dtype, (n, k, m) in itertools.product(dtypes, products):
        if "products" in families:
            yield from _products(device, dtype, n, k, m, few=quick or dtype != "fp16")
        if "norm + linear" in families:
            yield from _norm_linears(device, dtype, n, k, m)


def _norms(device: str, dtype: str, n: int, d: int) -> Iterator[Case]:
    x, r = (torch.randn(n, d, device=device).to(DTYPES[dtype]) for _ in range(2))
    gain, shift = (torch.rand(d, device=device).to(DTYPES[dtype]) for _ in range(2))
    for kind, (residual, affine) in itertools.product(("layer", "rms", "crms", "l1"), ((False, False), (True, True))):
        inputs = {"x": x} | ({"residual": r} if residual else {}) | ({"gain": gain, "shift": shift} if affine else {})
        name = dtype if affine else None

        def launch(kind: str = kind, residual: bool = residual, name: str | None = name) -> Launch:
            return plan_norm(kind, d, dtype, gain=name, shift=name, residual=residual, eps=1e-3, scale_const=1.25)

        def expected(kind: str = kind, residual: bool = residual, affine: bool = affine) -> tuple[Tensor, ...]:
            s = x + r if residual else x
            y = normalized(s.double(), kind, gain if affine else None, shift if affine else None, 1e-3, 1.25)
            return (y, s.double()) if residual else (y,)

        what = f"{n}x{d}{', residual' if residual else ''}{', gain and shift' if affine else ''}"
        yield Case(f"{kind} norm", dtype, what, launch, inputs, expected)


def _softmax(device: str, dtype: str, n: int, d: int) -> Case:
    x = (8 * torch.randn(n, d, device=device)).to(DTYPES[dtype])
    return Case("softmax", dtype, f"{n}x{d}", lambda: plan_softmax(d, dtype), {"x": x}, lambda: (x.double().softmax(-1),))


def _rows(device: str, dtype: str, n: int, d: int) -> Iterator[Case]:
    x = torch.randn(n, d, device=device).to(DTYPES[dtype])
    for bits in (8, 4):

        def launch(bits: int = bits) -> Launch:
            return plan_rows(d, dtype, bits, static=None)

        def expected(bits: int = bits) -> tuple[Tensor, ...]:
            q, scale = integers.quantize_rows(x, bits)
            return q, scale.double()

        yield Case("quantize rows", dtype, f"{n}x{d}, {bits} bits", launch, {"x": x}, expected)


def _products(device: str, dtype: str, n: int, k: int, m: int, *, few: bool) -> Iterator[Case]:
    for bits, groups, epilogue in _PRODUCTS[:3] if few else _PRODUCTS:
        top = 2 ** (bits - 1) - 1
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        codes = torch.randint(-top, top + 1, (m, k), dtype=torch.int8, device=device)
        shifts = torch.randint(0, groups, (k,), dtype=torch.uint8, device=device)
        row_scale, scale = torch.rand(n, 1, device=device) + 0.5, torch.rand(m, device=device) / (100 * k)
        bias, residual = torch.randn(m, device=device), torch.randn(n, m, device=device).to(DTYPES[dtype])

        def launch(bits: int = bits, groups: int = groups, epilogue: str = epilogue) -> Launch:
            return plan_product(k, m, dtype, bits, groups, bias=True, residual=True, epilogue=epilogue, rows_hint=n)

        def expected(given: tuple[Tensor, ...] = (q, codes, shifts, row_scale, scale, bias, residual), act: str = epilogue) -> Any:
            q, codes, shifts, row_scale, scale, bias, residual = (t.double() for t in given)
            y = (q @ (codes * 2**shifts).T) * row_scale * scale + bias
            return (activation(y, act) + residual,)

        inputs = {
            "q": q, "row_scale": row_scale, "planes": planes(codes, bits), "shifts": shifts, "scale": scale, "bias": bias,
            "residual": residual,
        }  # fmt: skip
        yield Case("product", dtype, f"{n}x{k}x{m}, {bits} bits, {groups} groups, {epilogue}", launch, inputs, expected)


# Bits, exponents and activation: every width, and as many exponents as there may be.
_PRODUCTS = (
    (8, 1, "none"), (6, 3, "relu"), (4, 4, "gelu"), (7, 2, "silu"), (5, 4, "gelu_tanh"), (3, 1, "none"), (2, 8, "relu"),
)  # fmt: skip


def _norm_linears(device: str, dtype: str, n: int, k: int, m: int) -> Iterator[Case]:
    x, w = torch.randn(n, k, device=device).to(DTYPES[dtype]), (torch.randn(m, k, device=device) / k**0.5).to(DTYPES[dtype])
    b = torch.randn(m, device=device).to(DTYPES[dtype])
    for kind, act in (("rms", "none"), ("rms", "gelu"), ("crms", "silu")):

        def launch(kind: str = kind, act: str = act) -> Launch:
            return plan_norm_linear(kind, k, m, dtype, bias=True, eps=1e-3, epilogue=act, rows_hint=n)

        def expected(kind: str = kind, act: str = act) -> tuple[Tensor, ...]:
            y = normalized(x.double(), kind, None, None, 1e-3, 1.0) @ w.double().T + b.double()
            return (activation(y, act),)

        yield Case("norm + linear", dtype, f"{n}x{k}x{m}, {kind}, {act}", launch, {"x": x, "weight": w, "bias": b}, expected)
