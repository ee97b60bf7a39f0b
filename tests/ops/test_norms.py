"""Norms, softmax and quantization of rows, against PyTorch and against arithmetic written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse import ops
from normfuse.errors import UsageError
from normfuse.nn import CRMSNorm, L1LayerNorm
from normfuse.quant import integers

op = torch.ops.normfuse
EPS = 1e-5
GAUSSIAN = math.sqrt(math.pi / 2)
NAN, INF = float("nan"), float("inf")


def _crms(x: Tensor, gain: Tensor) -> Tensor:
    layer = CRMSNorm(x.shape[-1], EPS, elementwise_affine=True, dtype=x.dtype)
    layer.weight = torch.nn.Parameter(gain)
    return layer(x).detach()


def _l1(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    layer = L1LayerNorm(x.shape[-1], EPS, dtype=x.dtype).eval()
    layer.weight, layer.bias = torch.nn.Parameter(gain), torch.nn.Parameter(shift)
    return layer(x).detach()


# By kind: norm over the last axis with gain and shift in float64.
ORACLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "layer": lambda x, g, b: F.layer_norm(x, x.shape[-1:], g, b, EPS),
    "rms": lambda x, g, b: F.rms_norm(x, x.shape[-1:], g, EPS) + b,
    "crms": lambda x, g, b: _crms(x, g) + b,
    "l1": _l1,
}
PLAIN: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[..., Tensor]]] = {
    "rms": (lambda x, g, b: op.rms_norm(x, g, EPS) + b, lambda x, g, b: ops.rms_norm(x, g, EPS) + b),
    "crms": (lambda x, g, b: op.crms_norm(x, g, EPS) + b, lambda x, g, b: ops.crms_norm(x, g, EPS) + b),
    "l1": (lambda x, g, b: op.l1_norm(x, g, b, EPS, GAUSSIAN), lambda x, g, b: ops.l1_norm(x, g, b, EPS, GAUSSIAN)),
}


@pytest.mark.parametrize("kind", [pytest.param(k, id=k) for k in PLAIN])
@given(st.integers(0, 5), st.integers(1, 70), st.integers(0, 999))
def test_norms(kind: str, rows: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(rows, 2, d, generator=generator) + 0.5
    gain, shift = torch.randn(d, generator=generator), torch.randn(d, generator=generator)
    expected = ORACLE[kind](x.double(), gain.double(), shift.double())
    for function in PLAIN[kind]:
        torch.testing.assert_close(function(x, gain, shift).double(), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(function(x.double(), gain, shift), expected, rtol=1e-11, atol=1e-11)


def test_l1_norm_worked_example() -> None:
    x = torch.tensor([1.0, 2, 3, 6])
    torch.testing.assert_close(op.l1_norm(x, None, None, 0.0, 1.0), torch.tensor([-4 / 3, -2 / 3, 0, 2]))
    expected = torch.tensor([-1.06384608, -0.53192304, 0, 1.59576912])
    torch.testing.assert_close(op.l1_norm(x, None, None, 0.0, GAUSSIAN), expected)


def test_norms_of_half_precision_and_odd_strides() -> None:
    x = torch.randn(6, 5).T
    for function in (
        lambda x: op.rms_norm(x, None, EPS),
        lambda x: op.crms_norm(x, None, EPS),
        lambda x: op.l1_norm(x, None, None, EPS, 1.0),
    ):
        y = function(x)
        assert y.is_contiguous()
        torch.testing.assert_close(function(x.contiguous()), y, rtol=1e-6, atol=1e-6)
        half = function(x.bfloat16())
        torch.testing.assert_close(half, function(x.bfloat16().float()).bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [pytest.param(k, id=k) for k in PLAIN])
def test_a_row_that_is_not_finite_does_not_touch_others(kind: str) -> None:
    x, gain, shift = torch.randn(3, 8), torch.ones(8), torch.zeros(8)
    clean = PLAIN[kind][0](x, gain, shift)
    x[1, 3] = NAN
    for function in PLAIN[kind]:
        y = function(x, gain, shift)
        assert bool(y[1].isnan().all())
        torch.testing.assert_close(y[[0, 2]], clean[[0, 2]])
        assert not function(torch.zeros(2, 8), gain, shift).any()


@pytest.mark.parametrize("with_residual", [pytest.param(False, id="alone"), pytest.param(True, id="residual")])
@pytest.mark.parametrize("kind", [pytest.param(k, id=k) for k in ORACLE])
@given(st.integers(0, 4), st.integers(2, 70), st.sampled_from((2, 4, 8)), st.booleans(), st.integers(0, 999))
def test_norm_quantize(kind: str, with_residual: bool, rows: int, d: int, bits: int, affine: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, r, gain, shift = (torch.randn(s, generator=generator) for s in ((rows, 2, d), (rows, 2, d), (d,), (d,)))
    residual = r if with_residual else None
    total = x + r if with_residual else x
    g, b = (gain, shift) if affine else (torch.ones(d), torch.zeros(d))
    expected = ORACLE[kind](total.double(), g.double(), b.double())
    w, c = (gain, shift) if affine else (None, None)
    for function in (op.norm_quantize, ops.norm_quantize):
        q, scale, summed = function(x, residual, w, c, kind, EPS, GAUSSIAN, bits)
        assert (q.dtype, q.shape, scale.shape) == (torch.int8, x.shape, (rows, 2, 1))
        assert summed.shape == (x.shape if with_residual else (0,))
        if with_residual:
            assert torch.equal(summed, total)
        if rows:
            torch.testing.assert_close(
                scale.double(), expected.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1), rtol=1e-4, atol=1e-6
            )
            assert bool(((q * scale - expected).abs() <= 0.5 * scale * (1 + 1e-3) + 1e-5).all())


def test_norm_quantize_is_the_norm_and_then_the_quantization() -> None:
    x, r, gain = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    q, scale, _ = op.norm_quantize(x, r, gain, None, "rms", EPS, 1.0, 8)
    expected, expected_scale = op.quantize_rows(op.rms_norm(x + r, gain, EPS), 8)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert int((q.int() - expected.int()).abs().max()) <= 1  # the norm differs in its last place
    wide = op.norm_quantize(x.double(), r.double(), gain.double(), None, "rms", EPS, 1.0, 8)
    assert [t.dtype for t in wide] == [torch.int8, torch.float64, torch.float64]
    half = op.norm_quantize(x.bfloat16(), r.bfloat16(), gain, None, "rms", EPS, 1.0, 8)
    assert [t.dtype for t in half] == [torch.int8, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (NAN, INF)])
def test_norm_quantize_of_values_that_are_not_finite(value: float) -> None:
    x = torch.randn(3, 8)
    x[1, 2] = value
    for function in (op.norm_quantize, ops.norm_quantize):
        q, scale, _ = function(x, None, None, None, "layer", EPS, 1.0, 8)
        assert not q[1].any()
        assert scale.isnan().flatten().tolist() == [False, True, False]


@given(st.integers(0, 6), st.integers(1, 90), st.integers(2, 8), st.integers(-40, 40), st.integers(0, 999))
def test_quantize_rows_gives_the_integers_of_the_definition(rows: int, k: int, bits: int, power: int, seed: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q, scale = op.quantize_rows(x, bits)
    expected, expected_scale = integers.quantize_rows(x, bits)
    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(op.quantize_rows(x.double(), bits)[0], expected)


def test_quantize_rows_of_everything_that_is_no_number() -> None:
    x = torch.tensor([[0.0, 0, 0], [1, NAN, 2], [1, INF, 2], [1e-40, 0, -1e-41], [1e-45, 0, 0], [3.4e38, -3.4e38, 1]])
    q, scale = op.quantize_rows(x, 8)
    expected, expected_scale = integers.quantize_rows(x, 8)
    assert torch.equal(q, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)


@given(st.integers(0, 5), st.integers(1, 90), st.floats(0.1, 60), st.integers(0, 999))
def test_softmax(rows: int, d: int, spread: float, seed: int) -> None:
    x = spread * torch.randn(rows, 2, d, generator=torch.Generator().manual_seed(seed))
    expected = torch.softmax(x.double(), -1)
    torch.testing.assert_close(op.two_pass_softmax(x).double(), expected, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(op.two_pass_softmax(x.double()), expected, rtol=1e-12, atol=1e-15)
    assert op.two_pass_softmax(x.bfloat16()).dtype == torch.bfloat16


def test_softmax_of_masked_rows() -> None:
    x = torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, -INF], [NAN, 0, 1], [-1e9, 2, 2], [500.0, -500, 500]])
    for function in (op.two_pass_softmax, ops.two_pass_softmax):
        torch.testing.assert_close(function(x), torch.softmax(x, -1), equal_nan=True, rtol=1e-5, atol=1e-9)
        assert function(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: op.rms_norm(torch.ones(2, 3), torch.ones(2), EPS), "gain", id="rms-gain"),
        pytest.param(lambda: op.rms_norm(torch.ones(()), None, EPS), "at least one feature", id="rms-scalar"),
        pytest.param(lambda: op.crms_norm(torch.ones(2, 0), None, EPS), "at least one feature", id="crms-empty"),
        pytest.param(lambda: op.crms_norm(torch.ones(2, 3).int(), None, EPS), "floats", id="crms-integers"),
        pytest.param(lambda: op.l1_norm(torch.ones(2, 3), None, torch.ones(4), EPS, 1.0), "shift", id="l1-shift"),
        pytest.param(lambda: op.norm_quantize(torch.ones(2, 3), None, None, None, "l2", EPS, 1.0, 8), "kind='l2'", id="kind"),
        pytest.param(
            lambda: op.norm_quantize(torch.ones(2, 3), torch.ones(3), None, None, "l1", EPS, 1.0, 8), "residual", id="residual"
        ),
        pytest.param(lambda: op.norm_quantize(torch.ones(2, 3), None, None, None, "l1", EPS, 1.0, 9), "9 bits", id="bits"),
        pytest.param(lambda: op.quantize_rows(torch.ones(2, 0), 8), "at least one value", id="rows-empty"),
        pytest.param(lambda: op.quantize_rows(torch.ones(2, 3), 1), "1 bits", id="rows-bits"),
        pytest.param(lambda: op.two_pass_softmax(torch.ones(())), "no axis", id="softmax-scalar"),
    ],
)
def test_arguments_that_do_not_belong_together(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
