"""The quantized linear layer: its integers, its floats, and the kernel against the definition."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops import _prepared, shiftquant_linear
from normfuse.ops._prepared import Packed, linear_weight, operand_of
from normfuse.quant import ShiftQuant, packing
from normfuse.quant.integers import integer_matmul
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.weight import BLOCKS
from tests.ops.quantized import in_blocks, linear, needs_native, rows

op = torch.ops.normfuse.shiftquant_linear
ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def _expected(x: Tensor, layer: object, bits: int, epilogue: str = "none", static: float | None = None) -> Tensor:
    """In float64 from exact sums of int64."""
    from tests.ops.quantized import Packed

    assert isinstance(layer, Packed)
    if static is None:
        q, s = rows(x, bits)
    else:
        top = 2 ** (bits - 1) - 1
        q, s = (x.float() / static).round().clamp(-top, top).long(), torch.tensor(static, dtype=torch.float32).double()
    y = (q @ layer.operand.T).double() * s * layer.scale.double() + layer.bias.double()
    return ACTIVATIONS[epilogue](y)


@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(2, 8),
    st.integers(2, 8),
    st.integers(1, 8),
    st.integers(0, 999),
)
def test_values_are_those_of_exact_sums(m: int, k: int, n: int, bits: int, activation_bits: int, groups: int, seed: int) -> None:
    layer = linear(n, k, bits, groups, seed)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    expected = _expected(x, layer, activation_bits)
    for found in (
        shiftquant_linear(x, *layer.arguments, None, bits, activation_bits),
        op(x, *layer.arguments, None, bits, activation_bits),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=3e-7 * float(expected.abs().max()))


@needs_native
@given(st.integers(0, 9), st.integers(1, 90), st.integers(1, 50), st.integers(2, 8), st.integers(1, 8), st.integers(0, 999))
def test_kernel_gives_the_integers_of_the_definition(m: int, k: int, n: int, bits: int, groups: int, seed: int) -> None:
    layer = linear(n, k, bits, groups, seed)
    q = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    _same_integers(Packed(layer.weight, layer.exponents, layer.scale, bits), layer.operand, q)


@needs_native
@given(st.integers(0, 9), st.integers(1, 400), st.integers(1, 50), st.integers(2, 4), st.sampled_from(BLOCKS), st.integers(0, 999))
def test_kernel_gives_the_integers_of_blocks(m: int, k: int, n: int, bits: int, block: int, seed: int) -> None:
    layer = in_blocks(n, k, bits, block, seed)
    q = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = Packed(layer.weight, layer.exponents, layer.scale, bits, layer.multipliers)
    assert torch.equal(operand_of(packed).long(), layer.operand)
    _same_integers(packed, layer.operand, q)


def _same_integers(weight: Packed, operand: Tensor, q: Tensor) -> None:
    """On every instruction set of this machine."""
    struct, m = linear_weight(weight), q.shape[0]
    acc = torch.empty((m, len(operand)), dtype=torch.int32)
    for isa in native.isas():
        native.force_isa(isa)
        try:
            native.call("nf_matmul_i32", struct, q, m, acc.fill_(-1))
        finally:
            native.force_isa(None)
        assert torch.equal(acc.long(), q.long() @ operand.T)
        assert torch.equal(acc, integer_matmul(q, operand.int()))


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in (2, 3, 4)])
def test_blocks_are_values_of_exact_sums(bits: int) -> None:
    layer, x = in_blocks(20, 70, bits), torch.randn(3, 5, 70)
    expected = _expected(x, layer, 8)
    for run in (op, shiftquant_linear):
        found = run(x, *layer.arguments, None, bits, 8, multipliers=layer.multipliers)
        torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=3e-7 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda m: m[:1], "expected int8 \\[2, blocks, 16\\] for 20 outputs", id="panels"),
        pytest.param(lambda m: m.int(), "of torch.int32", id="dtype"),
        pytest.param(lambda m: m.repeat(1, 3, 1), "9 blocks of 70 input channels", id="blocks"),
        pytest.param(lambda m: torch.full_like(m, 16), "expected ±1 to ±15 for codes of 4 bits", id="large"),
        pytest.param(torch.zeros_like, "multipliers from 0", id="zero"),
    ],
)
def test_multipliers_that_do_not_fit(change: Any, message: str) -> None:
    layer, x = in_blocks(20, 70), torch.randn(2, 70)
    for run in (op, shiftquant_linear):
        with pytest.raises(UsageError, match=message):
            run(x, *layer.arguments, None, 4, 8, multipliers=change(layer.multipliers))


def test_wide_codes_have_no_multipliers() -> None:
    layer, blocks = linear(20, 70, 5, 1), in_blocks(20, 70)
    with pytest.raises(UsageError, match="codes of 5 bits; they are for up to 4"):
        op(torch.randn(2, 70), *layer.arguments, None, 5, 8, multipliers=blocks.multipliers)


@pytest.mark.parametrize("epilogue", [pytest.param(e, id=e) for e in ACTIVATIONS])
def test_epilogues(epilogue: str) -> None:
    layer, x = linear(33, 50), torch.randn(3, 5, 50)
    expected = _expected(x, layer, 8, epilogue)
    for found in (op(x, *layer.arguments, None, 4, 8, epilogue), shiftquant_linear(x, *layer.arguments, None, 4, 8, epilogue)):
        assert found.shape == (3, 5, 33)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"A{b}") for b in (4, 8)])
def test_static_scale(bits: int) -> None:
    layer, x = linear(20, 30), torch.randn(7, 30)
    found = op(x, *layer.arguments, torch.tensor(0.03), 4, bits)
    torch.testing.assert_close(found.double(), _expected(x, layer, bits, static=0.03), rtol=1e-6, atol=1e-6)
    x[0, 0], x[1, 1] = float("nan"), float("inf")  # with a scale of its own no NaN is seen: documented
    assert bool(op(x, *layer.arguments, torch.tensor(0.03), 4, bits).isfinite().all())


@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (float("nan"), float("inf"), float("-inf"))])
def test_a_row_that_is_not_finite_is_nan_and_no_other(value: float) -> None:
    layer, x = linear(20, 30), torch.randn(4, 30)
    clean = op(x, *layer.arguments, None, 4, 8)
    x[2, 7] = value
    for found in (op(x, *layer.arguments, None, 4, 8), shiftquant_linear(x, *layer.arguments, None, 4, 8)):
        assert bool(found[2].isnan().all())
        torch.testing.assert_close(found[[0, 1, 3]], clean[[0, 1, 3]])


def test_rows_of_zeros_give_the_bias_and_no_rows_give_none() -> None:
    layer = linear(20, 30)
    assert torch.equal(op(torch.zeros(2, 30), *layer.arguments, None, 4, 8), layer.bias.expand(2, 20))
    assert op(torch.zeros(0, 3, 30), *layer.arguments, None, 4, 8).shape == (0, 3, 20)
    assert shiftquant_linear(torch.zeros(0, 30), *layer.arguments, None, 4, 8).shape == (0, 20)
    assert op(torch.randn(30), *layer.arguments, None, 4, 8).shape == (20,)


def test_dtypes_and_strides() -> None:
    layer, x = linear(20, 30), torch.randn(30, 6).T
    y = op(x, *layer.arguments, None, 4, 8)
    torch.testing.assert_close(op(x.contiguous(), *layer.arguments, None, 4, 8), y, rtol=0, atol=0)
    wide = op(x.double(), *layer.arguments, None, 4, 8)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, _expected(x, layer, 8), rtol=1e-13, atol=1e-13)  # the same integers
    doubles = (layer.weight, layer.exponents, layer.scale.double(), layer.bias.double())
    torch.testing.assert_close(op(x.double(), *doubles, None, 4, 8), wide, rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        half = op(x.to(dtype), *layer.arguments, None, 4, 8)
        assert half.dtype == dtype
        torch.testing.assert_close(half, op(x.to(dtype).float(), *layer.arguments, None, 4, 8).to(dtype), rtol=0, atol=0)
        halves = (layer.weight, layer.exponents, layer.scale, layer.bias.to(dtype))
        torch.testing.assert_close(op(x, *halves, None, 4, 8), y, rtol=2e-2, atol=2e-2)


def test_without_bias() -> None:
    layer, x = linear(20, 30), torch.randn(3, 30)
    found = op(x, layer.weight, layer.exponents, layer.scale, None, None, 4, 8)
    torch.testing.assert_close(found + layer.bias, op(x, *layer.arguments, None, 4, 8), rtol=1e-5, atol=1e-5)


def test_a_real_layer() -> None:
    weight, x = torch.randn(96, 128) / 128**0.5, torch.randn(50, 128)
    error = {}
    for bits in (2, 3, 4, 6, 8):
        q = quantize_weight(weight, ShiftQuant(weight_bits=bits))
        y = op(x, packing.pack(q), q.exponents, q.scale, None, None, bits, 8)
        error[bits] = float((y - x @ weight.T).norm() / (x @ weight.T).norm())
    assert error[8] < 0.013
    assert error[8] < error[6] < error[4] < error[3] < error[2] < 0.5


def test_a_weight_that_changes_is_seen() -> None:
    layer, other, x = linear(20, 30, seed=1), linear(20, 30, seed=2), torch.randn(3, 30)
    tensors = [t.clone() for t in layer.arguments]
    op(x, *tensors, None, 4, 8)
    for tensor, new in zip(tensors, other.arguments, strict=True):
        if tensor.shape == new.shape:
            tensor.copy_(new)
        else:  # other exponents may need more padding
            tensor.set_(new.clone())
    torch.testing.assert_close(op(x, *tensors, None, 4, 8).double(), _expected(x, other, 8), rtol=1e-5, atol=1e-6)
    tensors[2].mul_(2.0)
    tensors[3].zero_()
    doubled = 2 * (_expected(x, other, 8) - other.bias.double())
    torch.testing.assert_close(op(x, *tensors, None, 4, 8).double(), doubled, rtol=1e-5, atol=1e-6)


def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = linear(20, 30), torch.randn(3, 30)
        for _ in range(2):
            torch.testing.assert_close(op(x, *layer.arguments, None, 4, 8).double(), _expected(x, layer, 8), rtol=1e-5, atol=1e-6)
        other = linear(20, 30, seed=5)
        layer.exponents.copy_(layer.exponents.flip(0))
        flipped = torch.equal(layer.exponents, other.exponents)
        assert not flipped
        shift = (layer.exponents.max() - layer.exponents).long()
        codes = packing.unpack(layer.weight, 4, layer.exponents, 20).long() << shift
        q, s = rows(x, 8)
        expected = (q @ codes.T).double() * s * layer.scale.double() + layer.bias.double()
        torch.testing.assert_close(op(x, *layer.arguments, None, 4, 8).double(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_when_the_weight_is_gone() -> None:
    gc.collect()
    before = len(_prepared._structs), len(_prepared._operands)
    layer, x = linear(20, 30), torch.randn(3, 30)
    op(x, *layer.arguments, None, 4, 8)
    shiftquant_linear(x, *layer.arguments, None, 4, 8)
    assert (len(_prepared._structs), len(_prepared._operands)) != before
    kept = copy.deepcopy(layer.weight)  # what is derived does not travel with copies
    assert not hasattr(kept, "__dict__") or not kept.__dict__
    del layer
    gc.collect()
    assert (len(_prepared._structs), len(_prepared._operands)) == before


def _bad() -> list[object]:
    layer = linear(8, 12)
    x, (w, e, s, b) = torch.randn(2, 12), layer.arguments
    cases: dict[str, tuple[tuple[object, ...], str]] = {
        "features": ((x[:, :11], w, e, s, b, None, 4, 8), "11 inputs; the weight has 12"),
        "scalar": ((x[0, 0], w, e, s, b, None, 4, 8), "0 inputs"),
        "integers": ((x.int(), w, e, s, b, None, 4, 8), "expected floats"),
        "bytes": ((x, w[:-1], e, s, b, None, 4, 8), "bytes"),
        "bytes-dtype": ((x, w.to(torch.int8), e, s, b, None, 4, 8), "bytes"),
        "bytes-shape": ((x, w[None], e, s, b, None, 4, 8), "bytes"),
        "exponents": ((x, w, e.int(), s, b, None, 4, 8), "exponents"),
        "scale": ((x, w, e, s[:, None], b, None, 4, 8), "scale"),
        "bias": ((x, w, e, s, b[:-1], None, 4, 8), "bias"),
        "bits": ((x, w, e, s, b, None, 9, 8), "9 bits"),
        "activation-bits": ((x, w, e, s, b, None, 4, 1), "1 bits|2..8"),
        "epilogue": ((x, w, e, s, b, None, 4, 8, "tanh"), "epilogue='tanh'"),
        "static-zero": ((x, w, e, s, b, torch.tensor(0.0), 4, 8), "input_scale"),
        "static-nan": ((x, w, e, s, b, torch.tensor(float("nan")), 4, 8), "input_scale"),
        "static-vector": ((x, w, e, s, b, torch.ones(2), 4, 8), "input_scale"),
    }
    return [pytest.param(arguments, message, id=name) for name, (arguments, message) in cases.items()]


@pytest.mark.parametrize(("arguments", "message"), _bad())
def test_arguments_that_do_not_belong_together(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        op(*arguments)
    with pytest.raises(UsageError, match=message):
        shiftquant_linear(*arguments)  # type: ignore[arg-type]
