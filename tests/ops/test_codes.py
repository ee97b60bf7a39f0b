"""Operators on codes: the kernels of every instruction set against the definitions, code by code, and those against PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops import (
    codes_add,
    codes_conv2d,
    codes_gate,
    codes_max_pool2d,
    codes_mean,
    codes_take,
    codes_upsample,
    dequantize_codes,
    quantize_codes,
)
from normfuse.ops.codes._codes import behind
from normfuse.quant.packing import pack_rows

ops = torch.ops.normfuse
ISAS = native.isas() if native.available() else ()


def _codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _convolution(
    channels: int = 6, outputs: int = 5, kernel: tuple[int, int] = (3, 3), *, groups: int = 1, bits: int = 5, residual: bool = True,
    table: bool = True, **given: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of a call on two images; sums spread over all codes."""
    g = torch.Generator().manual_seed(given.get("seed", 0))
    stride, padding, dilation = given.get("stride", [2, 1]), given.get("padding", [1, 0, 1, 2]), given.get("dilation", [1, 1])
    h, w = given.get("size", (7, 6))
    x = torch.randint(0, 256, (2, h, w, channels), dtype=torch.uint8, generator=g)
    k, top = kernel[0] * kernel[1] * channels // groups, 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (outputs, k), dtype=torch.int8, generator=g)
    shifts = torch.randint(0, 9 - bits, (channels,), dtype=torch.uint8, generator=g)
    scale = (torch.rand(outputs, generator=g) + 0.5) * 0.5 / (k**0.5 * top)
    bias = 100 + 50 * torch.randn(outputs, generator=g)
    out = [(n + padding[i] + padding[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i, n in enumerate((h, w))]
    more = torch.randint(0, 256, (2, *out, outputs), dtype=torch.uint8, generator=g) if residual else None
    looked_up = torch.randperm(256, generator=g).to(torch.uint8) if table else None
    return (
        x, pack_rows(codes, bits), shifts, scale, bias, more, looked_up, bits, list(kernel), stride, padding, dilation, groups,
        given.get("zero", 77), given.get("low", 3), given.get("high", 250), 0.4 if residual else 0.0, given.get("function", "none"),
        1.1, 20.0,
    )  # fmt: skip


SAMPLES = {
    "quantize_codes": (torch.randn(2, 5, 3, 4), 0.03, 100, 250),
    "dequantize_codes": (_codes(2, 3, 4, 5), 0.03, 100),
    "codes_conv2d": _convolution(),
    "codes_add": (_codes(2, 3, 4, 5), _codes(2, 3, 4, 5, seed=1), 0.7, 0.4, -3.25, 2, 240),
    "codes_gate": (_codes(2, 3, 4, 5), torch.rand(2, 5, 1, 1), 1.3, 7, 20.0, 20, 255),
    "codes_max_pool2d": (_codes(2, 6, 7, 5), [3, 2], [2, 1], [1, 0, 1, 1]),
    "codes_mean": (_codes(2, 6, 7, 5), 0.02, 3),
    "codes_take": (_codes(2, 3, 4, 60), 7, 48, 3),
    "codes_upsample": (_codes(2, 3, 4, 21), [3, 2]),
}


@pytest.fixture(params=[pytest.param(isa, id=isa) for isa in ISAS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.force_isa(request.param)
    yield request.param
    native.force_isa(None)


# -- convolutions --------------------------------------------------------------------------------------------------------


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Any, ...]:
    kind = draw(st.sampled_from(("plain", "plain", "one", "few", "groups", "depthwise")))
    groups, square = 1, draw(st.booleans())
    channels = draw(st.sampled_from((4, 5, 8, 20, 64)))
    outputs = draw(st.sampled_from((1, 7, 16, 33, 64, 70)))
    kernel = (1, 1) if kind == "one" else (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    if kind == "few":
        channels = draw(st.integers(1, 8))
    if kind == "groups":
        groups = draw(st.integers(2, 3))
        channels, outputs = groups * draw(st.sampled_from((1, 3, 4, 8))), groups * draw(st.sampled_from((1, 5, 20)))
    if kind == "depthwise":
        channels = outputs = groups = draw(st.sampled_from((3, 8, 16, 24, 32, 40, 64, 100)))
        kernel = draw(st.sampled_from(((3, 3), (5, 5)))) if square else kernel
    stride = [draw(st.integers(1, 3))] * 2 if square else [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    dilation = [1, 1] if square else [draw(st.integers(1, 2)), draw(st.integers(1, 2))]
    return _convolution(
        channels, outputs, kernel, groups=groups, bits=draw(st.integers(2, 8)), seed=draw(st.integers(0, 999)), stride=stride,
        residual=kind != "depthwise" and draw(st.booleans()), table=draw(st.booleans()), dilation=dilation,
        padding=[draw(st.integers(0, 2)) for _ in range(4)] if draw(st.booleans()) else [0] * 4,
        size=[(kernel[i] - 1) * dilation[i] + draw(st.integers(1, 9)) for i in range(2)], zero=draw(st.integers(0, 255)),
        function=draw(st.sampled_from(("none", "hardswish", "silu"))),
        low=draw(st.integers(0, 100)), high=draw(st.integers(101, 255)),
    )  # fmt: skip


@pytest.mark.skipif(not ISAS, reason="no native kernels")
@given(_cases())
def test_kernels_write_the_codes_of_the_definition(case: tuple[Any, ...]) -> None:
    expected = codes_conv2d(*case)
    try:
        for name in ISAS:
            native.force_isa(name)
            assert torch.equal(ops.codes_conv2d(*case), expected), name
    finally:
        native.force_isa(None)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_that_of_pytorch_in_float64(groups: int) -> None:
    case = list(_convolution(6, 4, groups=groups, bits=8, residual=True, table=False, low=0, high=255))
    case[2].zero_()
    x, weight, _, scale, bias, residual = case[:6]
    w = (weight ^ 128).view(torch.int8).double().reshape(4, 3, 3, -1).permute(0, 3, 1, 2)
    image = F.pad((x.double() - 77).permute(0, 3, 1, 2), (0, 2, 1, 1))
    y = F.conv2d(image, w, None, (2, 1), 0, 1, groups) * scale.double()[:, None, None] + bias.double()[:, None, None]
    y = y.permute(0, 2, 3, 1) + residual.double() * 0.4
    found = codes_conv2d(*case).double()
    assert float((found - y.clamp(0, 255)).abs().max()) < 0.5001
    assert float(found.std()) > 20


@pytest.mark.parametrize(("name", "function", "error"), [("hardswish", F.hardswish, 1e-5), ("silu", F.silu, 4.1e-4)])
def test_functions_are_those_of_pytorch(name: str, function: Any, error: float) -> None:
    v = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-8, 8, 4001)])
    torch.testing.assert_close(behind(name, v, 1.0, 0.0), function(v), rtol=1e-6, atol=error)
    torch.testing.assert_close(behind(name, v, 20.0, 7.0), 20 * function(v) + 7, rtol=1e-6, atol=20 * error)


def test_weights_that_change_are_read_again() -> None:
    case = list(_convolution())
    before = ops.codes_conv2d(*case)
    case[4].add_(40)
    assert not torch.equal(ops.codes_conv2d(*case), before)
    assert torch.equal(ops.codes_conv2d(*case), codes_conv2d(*case))


def test_largest_weights_and_codes_are_exact(isa: str) -> None:
    """Pairs of products beyond 16 bits."""
    for sign in (1, -1):
        for groups, channels in ((1, 8), (32, 32)):
            codes = torch.full((32, 9 * channels // groups), 127 * sign, dtype=torch.int8)
            x, none = torch.full((1, 6, 6, channels), 255, dtype=torch.uint8), torch.zeros(channels, dtype=torch.uint8)
            floats = torch.full((32,), 2e-4), torch.full((32,), 128.0)
            where = ([3, 3], [1, 1], [1] * 4, [1, 1], groups)
            case = (x, pack_rows(codes, 8), none, *floats, None, None, 8, *where, 10, 0, 255)
            assert torch.equal(ops.codes_conv2d(*case), codes_conv2d(*case))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(1, 2, 3, 6), "expected uint8"),
        (1, torch.zeros(5, 3, dtype=torch.uint8), "weight"),
        (2, torch.zeros(5, dtype=torch.uint8), "shifts"),
        (2, torch.full((6,), 7, dtype=torch.uint8), "fit into 8 bits"),
        (4, torch.zeros(3), "bias"),
        (5, torch.zeros(1, 1, 1, 5, dtype=torch.uint8), "residual"),
        (6, torch.zeros(255, dtype=torch.uint8), "table"),
        (8, [30, 3], "weight"),
        (10, [1, 1], "padding"),
        (12, 4, "groups"),
        (13, 256, "zero point"),
        (15, 2, "low=3, high=2"),
    ],
)
def test_what_does_not_belong_together_is_refused(place: int, value: Any, message: str) -> None:
    case = list(_convolution())
    case[place] = value
    for function in (codes_conv2d, ops.codes_conv2d):
        with pytest.raises(UsageError, match=message):
            function(*case)


def test_a_depthwise_convolution_takes_no_residual() -> None:
    case = _convolution(8, 8, groups=8)
    for function in (codes_conv2d, ops.codes_conv2d):
        with pytest.raises(UsageError, match="takes no residual"):
            function(*case)


# -- the others ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in SAMPLES])
def test_kernels_are_the_definitions(name: str, isa: str) -> None:
    definition: Any = {
        f.__name__: f for f in (
            codes_add, codes_conv2d, codes_gate, codes_max_pool2d, codes_mean, codes_take, codes_upsample, dequantize_codes,
            quantize_codes,
        )
    }[name]  # fmt: skip
    assert torch.equal(getattr(ops, name)(*SAMPLES[name]), definition(*SAMPLES[name]))


@pytest.mark.skipif(not ISAS, reason="no native kernels")
@given(st.integers(1, 70), st.integers(0, 20), st.integers(0, 20), st.sampled_from((1, 1, 2, 3)), st.integers(1, 3))
def test_codes_that_move_are_those_of_the_definition(each: int, before: int, behind: int, groups: int, times: int) -> None:
    x = _codes(2, 3, 2, before + each * groups + behind)
    taken = ops.codes_take(x, before, each * groups, groups)
    assert torch.equal(taken, codes_take(x, before, each * groups, groups))
    assert torch.equal(ops.codes_upsample(taken, [times, 2]), codes_upsample(taken, [times, 2]))


def test_what_is_no_number_is_a_code(isa: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, 0.0]).reshape(1, 5, 1, 1)
    functions: tuple[Any, ...] = (quantize_codes, ops.quantize_codes)
    for function in functions:
        assert function(x, 0.1, 10, 200).flatten().tolist() == [10, 200, 0, 200, 10]
    for function in (codes_gate, ops.codes_gate):
        found = function(_codes(1, 1, 1, 5), x, 1.0, 0, 5.0, 0, 255)
        assert found.flatten().tolist()[:2] == [255, 255]


def test_codes_come_back_within_half_a_step() -> None:
    x = torch.rand(2, 3, 5, 7) * 4 - 1
    found = ops.dequantize_codes(ops.quantize_codes(x, 4 / 255, 64, 255), 4 / 255, 64)
    assert float((found - x).abs().max()) < 0.51 * 4 / 255


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in SAMPLES])
def test_empty_batches(name: str) -> None:
    arguments = [a[:0] if isinstance(a, Tensor) and a.ndim == 4 else a for a in SAMPLES[name]]
    assert getattr(ops, name)(*arguments).shape[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_codes(torch.zeros(1, 2, 3), 0.1, 0, 255), "expected floats"),
        (lambda: quantize_codes(torch.zeros(1, 2, 3, 4), 0.0, 0, 255), "positive"),
        (lambda: quantize_codes(torch.zeros(1, 2, 3, 4), 0.1, 200, 100), "above top"),
        (lambda: dequantize_codes(torch.zeros(1, 2, 3, 4), 0.1, 0), "expected uint8"),
        (lambda: codes_add(_codes(1, 2, 3, 4), _codes(1, 2, 3, 5), 1.0, 1.0, 0.0, 0, 255), "expected one shape"),
        (lambda: codes_add(_codes(1, 2, 3, 4), _codes(1, 2, 3, 4), 1e7, 1.0, 0.0, 0, 255), "within"),
        (lambda: codes_gate(_codes(1, 2, 3, 4), torch.zeros(1, 5, 1, 1), 1.0, 0, 0.0, 0, 255), "gate"),
        (lambda: codes_max_pool2d(_codes(1, 2, 3, 4), [1, 1], [1, 1], [1, 0, 0, 0]), "less than the kernel"),
        (lambda: codes_max_pool2d(_codes(1, 2, 3, 4), [3, 3], [1, 1], [0, 0, 0, 0]), "does not fit"),
        (lambda: codes_take(_codes(1, 2, 3, 4), 2, 3), "channels 2 to 5 of 4"),
        (lambda: codes_take(_codes(1, 2, 3, 4), 0, 4, 3), "no multiple"),
        (lambda: codes_upsample(_codes(1, 2, 3, 4), [2, 0]), "times"),
        (lambda: codes_mean(torch.zeros(1, 0, 3, 4, dtype=torch.uint8), 1.0, 0), "0 pixels"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
