"""Norms, softmax and quantization of rows: the Triton kernels in Triton's interpreter against float64 and exact integers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import NAMES, run
from normfuse.gpu.softmax import plan_softmax
from normfuse.gpu.tile import LONGEST, tile
from normfuse.ops._norms import normalized
from normfuse.quant import integers
from normfuse.words import KINDS
from tests.gpu.interpreter import Case, interpret

pytest.importorskip("triton", reason="the kernels are written in Triton")

NAN, INF = float("nan"), float("inf")
EPS, GAUSSIAN = 1e-5, math.sqrt(math.pi / 2)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Rows that fill no program, one program and a bit more; d that are no multiple of anything, and one that takes several turns.
SHAPES = ((0, 7), (5, 1), (129, 3), (1, 127), (9, 192), (7, 768), (3, 1000), (2, LONGEST + 1))
#: gain, shift, residual
PARTS = ((False, False, False), (True, False, True), (True, True, True), (False, True, False))


def _id(*parts: object) -> str:
    return "-".join(map(str, parts))


def _norm_case(kind: str, dtype: str, x: Tensor, parts: tuple[bool, bool, bool], gain_dtype: str, eps: float = EPS) -> Case:
    gain, shift, residual = parts
    d = x.shape[-1]
    generator = torch.Generator().manual_seed(d)
    inputs = {"x": x}
    if residual:
        inputs["residual"] = (2 * torch.randn(x.shape, generator=generator)).to(x.dtype)
    for name, wanted in (("gain", gain), ("shift", shift)):
        if wanted:
            inputs[name] = torch.randn(d, generator=generator).to(DTYPES[gain_dtype])
    names = {n: gain_dtype if n in inputs else None for n in ("gain", "shift")}
    kwargs = {**names, "residual": residual, "eps": eps, "scale_const": GAUSSIAN}
    return Case("normfuse.gpu.norm:plan_norm", (kind, d, dtype), kwargs, inputs)


def _norms() -> Iterator[tuple[str, Case]]:
    generator = torch.Generator().manual_seed(0)
    for i, (rows, d) in enumerate(SHAPES):
        for j, kind in enumerate(KINDS):
            for k, (dtype, torch_dtype) in enumerate(DTYPES.items()):
                x = (3 * torch.randn(rows, d, generator=generator) + 0.5).to(torch_dtype)
                gain_dtype = dtype if (i + k) % 2 else "fp32"
                yield _id("norm", kind, dtype, rows, d), _norm_case(kind, dtype, x, PARTS[(i + j) % 4], gain_dtype)
    for kind in KINDS:
        for d in (192, LONGEST + 1):
            large = 1e4 * torch.randn(4, d, generator=generator).clamp(-4, 4)  # its squares are no float16
            yield _id("norm", kind, "fp16", "large", d), _norm_case(kind, "fp16", large.half(), PARTS[0], "fp32")
            far = 1000 + torch.randn(3, d, generator=generator)
            yield _id("norm", kind, "fp32", "far", d), _norm_case(kind, "fp32", far, PARTS[0], "fp32")
        yield _id("norm", kind, "fp32", "zeros", 96), _norm_case(kind, "fp32", torch.zeros(2, 96), PARTS[0], "fp32")
        yield _id("norm", kind, "fp32", "rank", 4), _norm_case(kind, "fp32", torch.randn(2, 3, 1, 4), PARTS[2], "fp32")


def _odd_rows(rows: int, d: int) -> Tensor:
    """Rows of everything that floats can hold, as many as there is room for."""
    x = 10 * torch.randn(rows, d, generator=torch.Generator().manual_seed(d))
    odd = [
        torch.full((d,), -INF), torch.zeros(d), torch.arange(d) % 5 / 2, x[0].clone().index_fill_(0, torch.tensor([0]), INF),
        x[0].clone().index_fill_(0, torch.tensor([d - 1]), NAN), x[0].clone().index_fill_(0, torch.tensor([0]), -INF),
        torch.full((d,), NAN), x[0] * 1e-41, x[0] * 6e-38, x[0] * 1e36,
    ]  # fmt: skip
    for i, row in enumerate(odd[:rows]):
        x[i] = row
    return x


def _others() -> Iterator[tuple[str, Case]]:
    for rows, d in (*SHAPES, (13, 17), (13, LONGEST + 1)):
        for dtype, torch_dtype in DTYPES.items():
            if rows == 13 and d > LONGEST and dtype != "fp32":
                continue  # seconds
            x = _odd_rows(rows, d).to(torch_dtype) if rows in (13, 129) else 8 * torch.randn(rows, d).to(torch_dtype)
            if dtype == "bf16":  # of which the interpreter reads subnormal ones wrong
                x = torch.where(x.abs() < torch.finfo(torch.bfloat16).smallest_normal, 0, x)
            yield _id("softmax", dtype, rows, d), Case("normfuse.gpu.softmax:plan_softmax", (d, dtype), {}, {"x": x})
            for bits in (8,) if d > 192 else (2, 5, 8):
                for static in (None, 0.1):
                    case = Case("normfuse.gpu.rows:plan_rows", (d, dtype, bits), {"static": static}, {"x": x})
                    yield _id("rows", dtype, rows, d, bits, "dynamic" if static is None else "static"), case


def _operators() -> Iterator[tuple[str, Case]]:
    """What torch calls on a GPU; strides that no kernel takes, and a gain of float64."""
    torch.manual_seed(1)
    x, r, g, b = torch.randn(6, 5).T, torch.randn(5, 6), torch.randn(6, dtype=torch.float64), torch.randn(12)[::2]
    yield "operator-rms_norm", Case("normfuse.ops.norms:RMS_NORM.on_gpu", (x, g, EPS))
    yield "operator-crms_norm", Case("normfuse.ops.norms:CRMS_NORM.on_gpu", (x, None, EPS))
    yield "operator-l1_norm", Case("normfuse.ops.norms:L1_NORM.on_gpu", (x, g, b, EPS, GAUSSIAN))
    yield "operator-two_pass_softmax", Case("normfuse.ops.two_pass_softmax:TWO_PASS_SOFTMAX.on_gpu", (x,))
    yield "operator-quantize_rows", Case("normfuse.ops.quantize_rows:QUANTIZE_ROWS.on_gpu", (x, 8))
    for kind in ("rms", "crms"):
        yield f"operator-add_{kind}_norm", Case("normfuse.ops._norms:gpu_norm", (x, r, kind, b, None, EPS, 1.0))


CASES = dict((*_norms(), *_others(), *_operators()))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    return interpret(CASES, tmp_path_factory.mktemp("interpreter"))


def _those(start: str) -> list[object]:
    return [pytest.param(key, id=key) for key in CASES if key.startswith(start)]


def _close(found: Tensor, expected: Tensor, slack: float, more: Tensor | float = 0.0) -> None:
    """To one rounding of the dtype (one unit where the interpreter cuts), `slack` of the largest of the row, and `more`."""
    info = torch.finfo(found.dtype)
    units = {torch.bfloat16: 1.01, torch.float16: 0.51, torch.float32: 1.0}[found.dtype]
    largest = expected.abs().amax(-1, keepdim=True) if expected.numel() else 0.0
    allowed = units * info.eps * expected.abs() + slack * largest + info.smallest_normal * info.eps + more
    assert found.shape == expected.shape
    worst = ((found.double() - expected).abs() - allowed).max().item() if expected.numel() else 0.0
    assert worst <= 0, f"{worst} above what rounding explains"


@pytest.mark.parametrize("key", _those("norm-"))
def test_norm(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    case, (y, *sums) = CASES[key], results[key]
    assert case.inputs is not None
    kind, x, residual = case.args[0], case.inputs["x"], case.inputs.get("residual")
    if residual is not None:
        x, given = sums[0], x
        wanted = given + residual
        assert x.dtype is wanted.dtype
        if x.dtype is torch.bfloat16:
            _close(x, given.double() + residual.double(), 0.0)
        else:
            assert torch.equal(x, wanted)
    assert len(sums) == (residual is not None)
    gain, shift = case.inputs.get("gain"), case.inputs.get("shift")
    expected = normalized(x.double(), kind, gain, shift, EPS, GAUSSIAN)
    assert y.dtype is x.dtype
    if not x.numel():
        return
    # The mean has an error of 2^-24 of the values, which the norm then divides by their spread. A variance from the mean of squares
    # would have their square over its square, which for values around 1000 is more than a tenth.
    more = 0.0
    if kind in ("layer", "l1"):
        spread = (x.double().var(-1, keepdim=True, correction=0) + EPS).sqrt()
        more = 3e-7 * x.double().abs().amax(-1, keepdim=True) / spread * (1 if gain is None else gain.abs().max())
    _close(y, expected, 2e-6, more)


@pytest.mark.parametrize("key", _those("softmax-"))
def test_softmax(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    case, (y,) = CASES[key], results[key]
    assert case.inputs is not None
    x = case.inputs["x"]
    expected = torch.softmax(x.double(), -1)
    assert y.dtype is x.dtype
    assert torch.equal(y.isnan(), torch.softmax(x.float(), -1).isnan())
    _close(y.nan_to_num(0), expected.nan_to_num(0), 4e-6)


@pytest.mark.parametrize("key", _those("rows-"))
def test_rows_have_the_bits_of_the_definition(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    case, (q, scale) = CASES[key], results[key]
    assert case.inputs is not None
    x, bits, static = case.inputs["x"], case.args[2], case.kwargs["static"]
    if static is None:
        expected, scales = integers.quantize_rows(x, bits)
    else:
        expected, scales = integers.quantize_static(x, static, bits), torch.full((*x.shape[:-1], 1), static)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(q, expected)
    assert scale.shape == scales.shape
    assert torch.equal(scale.view(torch.int32)[~scale.isnan()], scales.view(torch.int32)[~scales.isnan()])
    assert torch.equal(scale.isnan(), scales.isnan())


@pytest.mark.parametrize("key", _those("operator-"))
def test_operators_on_the_kernel(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    name, args = key.removeprefix("operator-"), CASES[key].args
    if name.startswith("add_"):
        args = (args[0], args[1], args[3], args[5])
    expected = getattr(torch.ops.normfuse, name)(*args)
    for found, wanted in zip(results[key], (expected,) if isinstance(expected, Tensor) else expected, strict=True):
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("rows", "d"), [pytest.param(*s, id=_id(*s)) for s in SHAPES])
def test_the_grid_has_all_rows(rows: int, d: int) -> None:
    launch = plan_norm("rms", d, "fp16", gain=None, shift=None, residual=False, eps=EPS)
    assert launch.programs(rows) * launch.rows_each >= rows > (launch.programs(rows) - 1) * launch.rows_each
    shape = tile(d)
    assert shape.block >= d or shape.long
    assert 1 << (shape.block.bit_length() - 1) == shape.block


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        pytest.param({"x": torch.ones(2, 4)}, "x is torch.float32; expected torch.float16", id="dtype"),
        pytest.param({"x": torch.ones(4, 2).half().T}, "x is not contiguous", id="strides"),
        pytest.param({"y": torch.ones(2, 4).half()}, "inputs y; expected x", id="name"),
        pytest.param({"x": torch.ones(2, 0).half()}, "at least one feature", id="empty"),
        pytest.param({"x": torch.ones(2, 4).half()}, "x is on cpu; expected a CUDA device", id="device"),
    ],
)
def test_run_refuses(inputs: dict[str, Tensor], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=said):
        run(plan_softmax(4, "fp16"), inputs)


def test_plans_refuse() -> None:
    nothing = {"gain": None, "shift": None, "residual": False, "eps": EPS}
    with pytest.raises(UsageError, match="kind='batch'"):
        plan_norm("batch", 4, "fp16", **nothing)
    with pytest.raises(UsageError, match="rows of 0 features"):
        plan_norm("rms", 0, "fp16", **nothing)
    with pytest.raises(UsageError, match="'i8'; expected one of fp16"):
        plan_softmax(4, "i8")
    with pytest.raises(UsageError, match="gain of 'fp64'"):
        plan_norm("rms", 4, "fp16", **(nothing | {"gain": "fp64"}))
    with pytest.raises(UsageError, match="9 bits"):
        plan_rows(4, "fp16", 9, static=None)
    for scale in (0.0, -1.0, 1e-60, 1e60, NAN):
        with pytest.raises(UsageError, match="static scale"):
            plan_rows(4, "fp16", 8, static=scale)


def test_names_are_those_of_torch() -> None:
    assert {k: NAMES[v] for k, v in DTYPES.items()} == {k: k for k in DTYPES}
