"""The quantized convolution against PyTorch's on the same integers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.ops import conv_columns, shiftquant_conv2d
from normfuse.quant import ShiftQuant
from normfuse.quant.packing import pack_groups
from normfuse.quant.quantizer import quantize_weight
from tests.ops.quantized import Packed, convolution, rows

op = torch.ops.normfuse.shiftquant_conv2d
PLAIN = ([1, 1], [0, 0], [1, 1], 1)  # stride, padding, dilation, groups


def _expected(
    x: Tensor,
    layer: Packed,
    bits: int,
    kernel: tuple[int, int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv2d in float64, in which these integers are exact."""
    q, s = rows(x.reshape(len(x), -1), bits)
    top, left, bottom, right = padding if len(padding) == 4 else (*padding, *padding)
    image = F.pad(q.view(x.shape).double(), (left, right, top, bottom))
    weight = layer.operand.double().reshape(layer.scale.numel(), *kernel, -1).permute(0, 3, 1, 2)
    acc = F.conv2d(image, weight, None, stride, 0, dilation, groups)
    return acc * s.view(-1, 1, 1, 1) * layer.scale.double()[:, None, None] + layer.bias.double()[:, None, None]


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, object]:
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = [draw(st.integers(1, 2)), draw(st.integers(1, 2))]
    return {
        "batch": draw(st.integers(1, 2)), "channels": groups * draw(st.integers(1, 5)), "out": groups * draw(st.integers(1, 6)),
        "kernel": kernel, "dilation": dilation, "stride": [draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        "padding": [draw(st.integers(0, 2)) for _ in range(draw(st.sampled_from((2, 4))))], "groups": groups,
        "size": [(kernel[i] - 1) * dilation[i] + draw(st.integers(1, 5)) for i in range(2)],
        "bits": draw(st.integers(2, 8)), "exponents": draw(st.integers(1, 5)), "seed": draw(st.integers(0, 999)),
    }  # fmt: skip


@given(_cases())
def test_values_are_those_of_exact_sums(case: dict[str, object]) -> None:
    c = case
    layer = convolution(c["out"], c["channels"], c["kernel"], c["bits"], c["exponents"], c["groups"], c["seed"])  # type: ignore[arg-type]
    x = torch.randn(c["batch"], c["channels"], *c["size"], generator=torch.Generator().manual_seed(c["seed"]))  # type: ignore[misc, call-overload, arg-type]
    where = (c["stride"], c["padding"], c["dilation"], c["groups"])
    expected = _expected(x, layer, 8, c["kernel"], *where)  # type: ignore[arg-type]
    for function in (op, shiftquant_conv2d):
        found = function(x, *layer.arguments, None, c["bits"], 8, list(c["kernel"]), *where)  # type: ignore[call-overload]
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=5e-7, atol=5e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("groups", [pytest.param(g, id=f"{g}groups") for g in (1, 4, 8)])
def test_a_real_layer(groups: int) -> None:
    weight, x = torch.randn(16, 8 // groups, 3, 3) / 8, torch.randn(2, 8, 9, 11)
    matrices, channels = conv_columns(weight, groups)
    quantized = [quantize_weight(m, ShiftQuant(weight_bits=8), channel_groups=channels) for m in matrices]
    packed = pack_groups(quantized, 9)
    y = op(x, *packed, None, None, 8, 8, [3, 3], [2, 1], [1, 1], [1, 1], groups)
    expected = F.conv2d(x, weight, None, (2, 1), 1, 1, groups)
    assert float((y - expected).norm() / expected.norm()) < 0.013


def test_static_scale_and_epilogue() -> None:
    layer, x = convolution(6, 4, (3, 3)), torch.randn(2, 4, 5, 5)
    q = (x / 0.02).round().clamp(-127, 127)
    weight = layer.operand.double().reshape(6, 3, 3, 4).permute(0, 3, 1, 2)
    acc = F.conv2d(q.double(), weight, None, 1, 1) * float(torch.tensor(0.02)) * layer.scale.double()[:, None, None]
    expected = F.relu(acc + layer.bias.double()[:, None, None])
    for function in (op, shiftquant_conv2d):
        found = function(x, *layer.arguments, torch.tensor(0.02), 4, 8, [3, 3], [1, 1], [1, 1], [1, 1], 1, "relu")
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_images_have_scales_of_their_own() -> None:
    layer, x = convolution(6, 4, (3, 3)), torch.randn(3, 4, 5, 5)
    y = op(x, *layer.arguments, None, 4, 8, [3, 3], *PLAIN)
    x[1] *= 100
    x[2, 0, 0, 0] = float("nan")
    for function in (op, shiftquant_conv2d):
        found = function(x, *layer.arguments, None, 4, 8, [3, 3], *PLAIN)
        torch.testing.assert_close(found[0], y[0])
        bias = layer.bias[:, None, None]
        torch.testing.assert_close(found[1] - bias, 100 * (y[1] - bias), rtol=1e-3, atol=1e-2)
        assert bool(found[2].isnan().all())
    zero = op(torch.zeros(1, 4, 3, 3), *layer.arguments, None, 4, 8, [3, 3], *PLAIN)
    assert torch.equal(zero.flatten(), layer.bias)
    assert op(x[:0], *layer.arguments, None, 4, 8, [3, 3], *PLAIN).shape == (0, 6, 3, 3)


def test_dtypes_and_strides() -> None:
    layer, x = convolution(6, 4, (3, 3)), torch.randn(2, 5, 5, 4).permute(0, 3, 1, 2)
    y = op(x, *layer.arguments, None, 4, 8, [3, 3], *PLAIN)
    assert y.is_contiguous()
    torch.testing.assert_close(op(x.contiguous(), *layer.arguments, None, 4, 8, [3, 3], *PLAIN), y, rtol=0, atol=0)
    wide = op(x.double(), *layer.arguments, None, 4, 8, [3, 3], *PLAIN)
    torch.testing.assert_close(wide, _expected(x, layer, 8, (3, 3), *PLAIN), rtol=1e-13, atol=1e-13)
    half = op(x.bfloat16(), *layer.arguments, None, 4, 8, [3, 3], *PLAIN)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"x": torch.randn(4, 5, 5)}, "expected \\[batch", id="rank"),
        pytest.param({"x": torch.randn(1, 3, 5, 5)}, "3 inputs; the weight has 4", id="channels"),
        pytest.param({"x": torch.randn(1, 4, 2, 5)}, "smaller than the kernel", id="size"),
        pytest.param({"kernel": [3]}, "kernel", id="kernel"),
        pytest.param({"kernel": [3, 2]}, "bytes", id="other-kernel"),
        pytest.param({"stride": [0, 1]}, "stride", id="stride"),
        pytest.param({"padding": [1, 1, 1]}, "padding", id="padding-length"),
        pytest.param({"padding": [-1, 0]}, "padding", id="padding-negative"),
        pytest.param({"dilation": [1, 0]}, "dilation", id="dilation"),
        pytest.param({"groups": 3}, "groups=3", id="groups"),
        pytest.param({"groups": 0}, "groups=0", id="no-groups"),
    ],
)
def test_arguments_that_do_not_belong_together(changes: dict[str, object], message: str) -> None:
    layer = convolution(6, 4, (3, 3))
    names = (
        "x", "weight", "exponents", "scale", "bias", "input_scale", "bits", "activation_bits", "kernel", "stride", "padding",
        "dilation", "groups",
    )  # fmt: skip
    values = (torch.randn(1, 4, 5, 5), *layer.arguments, None, 4, 8, [3, 3], *PLAIN)
    arguments = dict(zip(names, values, strict=True)) | changes
    for function in (op, shiftquant_conv2d):
        with pytest.raises(UsageError, match=message):
            function(*arguments.values())
