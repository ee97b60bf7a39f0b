"""Integers in: products between quantized tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.ops import shiftquant_matmul, shiftquant_matmul_quantize
from normfuse.quant.integers import quantize_rows
from tests.ops.quantized import Packed, linear

op = torch.ops.normfuse


def _inputs(m: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8), torch.rand(m, 1, generator=generator) + 0.01


def _expected(q: Tensor, s: Tensor, layer: Packed) -> Tensor:
    return (q.long() @ layer.operand.T).double() * s.double() * layer.scale.double() + layer.bias.double()


@given(
    st.integers(1, 9),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(2, 8),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 999),
)
def test_values_are_those_of_exact_sums(m: int, k: int, n: int, bits: int, groups: int, whole: bool, seed: int) -> None:
    layer = linear(n, k, bits, groups, seed)
    q, s = _inputs(m, k, seed)
    s = s[0, 0] if whole else s
    residual = torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 3))
    expected = F.relu(_expected(q, s, layer)) + residual.double()
    for function in (op.shiftquant_matmul, shiftquant_matmul):
        found = function(q, s, *layer.arguments, residual, bits, "relu")
        torch.testing.assert_close(found.double(), expected, rtol=5e-7, atol=5e-7 * float(expected.abs().max()))


def test_one_scale_in_every_spelling() -> None:
    layer, (q, _) = linear(20, 30), _inputs(5, 30)
    expected = op.shiftquant_matmul(q, torch.full((5, 1), 0.5), *layer.arguments, None, 4, "none")
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        assert torch.equal(op.shiftquant_matmul(q, scale, *layer.arguments, None, 4, "none"), expected)
        assert torch.equal(op.shiftquant_matmul(q[0], scale, *layer.arguments, None, 4, "none"), expected[0])
        deep = op.shiftquant_matmul(q.view(5, 1, 30), scale, *layer.arguments, None, 4, "none")
        assert torch.equal(deep, expected.view(5, 1, 20))


def test_the_chain_of_two_products_is_the_chain_of_two_layers() -> None:
    first, second, x = linear(40, 30, seed=1), linear(20, 40, seed=2), torch.randn(2, 7, 30)
    q, s = op.quantize_rows(x, 8)
    middle, middle_scale = op.shiftquant_matmul_quantize(q, s, *first.arguments, None, 4, "relu", 8)
    y = op.shiftquant_matmul(middle, middle_scale, *second.arguments, None, 4, "none")
    between = op.shiftquant_linear(x, *first.arguments, None, 4, 8, "relu")
    expected = op.shiftquant_linear(between, *second.arguments, None, 4, 8)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_residual", [pytest.param(False, id="plain"), pytest.param(True, id="residual")])
@pytest.mark.parametrize("bits", [pytest.param(b, id=f"to{b}") for b in (2, 4, 8)])
def test_integers_out_are_those_of_the_floats(bits: int, with_residual: bool) -> None:
    layer, (q, s) = linear(50, 30, 6, 3), _inputs(6, 30)
    residual = torch.randn(6, 50) if with_residual else None
    expected, expected_scale = quantize_rows(op.shiftquant_matmul(q, s, *layer.arguments, residual, 6, "silu"), bits)
    found, scale = op.shiftquant_matmul_quantize(q, s, *layer.arguments, residual, 6, "silu", bits)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert int((found.int() - expected.int()).abs().max()) <= 1  # SiLU differs in its last place
    assert float((found == expected).float().mean()) > 0.99


def test_float64_scales_give_float64() -> None:
    layer, (q, s) = linear(20, 30), _inputs(5, 30)
    wide = op.shiftquant_matmul(q, s.double(), *layer.arguments, None, 4, "none")
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, _expected(q, s, layer), rtol=1e-13, atol=1e-13)
    out, scale = op.shiftquant_matmul_quantize(q, s.double(), *layer.arguments, None, 4, "none", 8)
    assert scale.dtype == torch.float64
    assert torch.equal(out, quantize_rows(wide, 8)[0])


def test_a_scale_of_nan_makes_its_row_nan() -> None:
    layer, (q, s) = linear(20, 30), _inputs(3, 30)
    s[1] = float("nan")
    for function in (op.shiftquant_matmul, shiftquant_matmul):
        y = function(q, s, *layer.arguments, None, 4, "gelu")
        assert y.isnan().all(1).tolist() == [False, True, False]
    out, scale = op.shiftquant_matmul_quantize(q, s, *layer.arguments, None, 4, "gelu", 8)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert not out[1].any()


def test_no_rows() -> None:
    layer, (q, s) = linear(20, 30), _inputs(3, 30)
    assert op.shiftquant_matmul(q[:0], s[:0], *layer.arguments, None, 4, "none").shape == (0, 20)
    out, scale = op.shiftquant_matmul_quantize(q[:0], s[:0], *layer.arguments, None, 4, "none", 8)
    assert (out.shape, scale.shape) == ((0, 20), (0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"q": torch.zeros(3, 30)}, "int8", id="q"),
        pytest.param({"row_scale": torch.ones(3)}, "row_scale", id="row-scale-shape"),
        pytest.param({"row_scale": torch.ones(3, 1).half()}, "float16", id="row-scale-dtype"),
        pytest.param({"residual": torch.ones(20)}, "residual", id="residual"),
        pytest.param({"epilogue": "exp"}, "epilogue", id="epilogue"),
        pytest.param({"bits": 1}, "1 bits", id="bits"),
    ],
)
def test_arguments_that_do_not_belong_together(changes: dict[str, object], message: str) -> None:
    layer, (q, s) = linear(20, 30), _inputs(3, 30)
    names = ("q", "row_scale", "weight", "exponents", "scale", "bias", "residual", "bits", "epilogue")
    arguments = dict(zip(names, (q, s, *layer.arguments, None, 4, "none"), strict=True)) | changes
    for function in (op.shiftquant_matmul, shiftquant_matmul):
        with pytest.raises(UsageError, match=message):
            function(*arguments.values())
    with pytest.raises(UsageError, match=message):
        shiftquant_matmul_quantize(*(*arguments.values(), 8))
    with pytest.raises(UsageError, match="9 bits"):
        op.shiftquant_matmul_quantize(q, s, *layer.arguments, None, 4, "none", 9)
