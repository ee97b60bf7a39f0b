"""`torch.ops.normfuse.shiftquant_conv2d`: a convolution whose sums are integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._epilogue import finish
from normfuse.ops._prepared import conv_operands, conv_weights
from normfuse.ops._product import Product, check
from normfuse.ops._shapes import float_dtype, input_scale_value
from normfuse.ops.operator import Operator
from normfuse.quant.integers import integer_matmul, quantize_rows, quantize_static

__all__ = ["SHIFTQUANT_CONV2D", "conv_columns", "shiftquant_conv2d"]

_OP = "shiftquant_conv2d"


def shiftquant_conv2d(
    x: Tensor, weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
    bits: int, activation_bits: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """y[b, o, p] = act( s[b] · scale[o] · Σ_(t, c) A[b, c, p ∘ t] · (C[o, (t, c)] << (E − e[c])) + bias[o] ).

    t runs over the taps of the kernel, c over the input channels of the group, the fastest; p ∘ t is the position that tap t of
    output position p reads, 0 in the padding. A and s are x quantized by image, s[b] = max|x[b]| / qmax, or with one
    s = input_scale. E is the largest exponent of the group of channels. The sum is an exact integer.

    Args:
        x: [B, channels, H, W], any float dtype, which is that of the result.
        weight: the packed weights [O / groups, taps · channels / groups] of all groups of channels, one after the other.
        exponents: e, uint8 [channels].
        scale: [O], already times 2^−E of the group.
        bias: [O] or None.
        input_scale: one positive number, or None for dynamic scales.
        bits: of C.
        activation_bits: of A.
        kernel, stride, dilation: (height, width).
        padding: (height, width) on both sides, or (top, left, bottom, right).
        groups: of channels, 1 for a plain convolution.
        epilogue: "none", "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        [B, O, H', W'].

    Raises:
        UsageError: arguments do not belong together.
    """
    product = (x, weight, exponents, scale, bias, input_scale, bits, activation_bits)
    g = _given(*product, kernel, stride, padding, dilation, groups, epilogue)
    dtype, out = _check(g)
    if input_scale is None:
        q, s = quantize_rows(x.reshape(x.shape[0], -1), activation_bits) if x.numel() else (x, x.new_ones((0, 1)))
        s = s[..., None]  # (B, 1, 1)
    else:
        q, s = quantize_static(x, input_scale_value(_OP, input_scale), activation_bits), input_scale.reshape(())
    y = finish(_sums(g, q.reshape(x.shape), out[0] * out[1]), s, scale, bias, epilogue, None, dtype).to(x.dtype)
    return y.transpose(1, 2).reshape(x.shape[0], scale.numel(), *out).contiguous()


def _sums(g: _Given, q: Tensor, places: int) -> Tensor:
    """Σ A · (C << (E − e)), int32 [B, places, O]."""
    taps, outputs = g.kernel[0] * g.kernel[1], g.p.scale.numel()
    operands = conv_operands(g.p.weight, g.p.exponents, outputs, g.p.bits, g.groups, taps)
    q = q.float()  # unfold has no integer form; codes are exact in any float
    top, left, bottom, right = _sides(g.padding)
    acc = torch.empty((len(q), places, outputs), dtype=torch.int32, device=q.device)
    for i in range(len(q)):  # an image at a time: the columns are many times its size
        columns = F.unfold(
            F.pad(q[i : i + 1], (left, right, top, bottom)), tuple(g.kernel), tuple(g.dilation), (0, 0), tuple(g.stride)
        )  # (1, channels · taps, positions), the tap running fastest
        columns = columns.reshape(g.groups, -1, taps, columns.shape[-1]).permute(0, 3, 2, 1)
        rows = columns.reshape(g.groups, columns.shape[1], -1).to(torch.int8)  # (group, position, tap · channel)
        acc[i] = torch.cat([integer_matmul(r, w) for r, w in zip(rows, operands, strict=True)], -1)
    return acc


def conv_columns(weight: Tensor, groups: int = 1) -> tuple[tuple[Tensor, ...], Tensor]:
    """A convolution's weight as the matrices that are quantized: [O, I, kh, kw] to `groups` times [O / groups, kh · kw · I].

    Returns:
        The matrices, and the input channel that each column reads (`channel_groups` of `quantize_weight`).
    """
    _, channels, height, width = weight.shape
    flat = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return flat.chunk(groups), torch.arange(channels).repeat(height * width)


def _sides(padding: Sequence[int]) -> tuple[int, int, int, int]:
    top, left, bottom, right = padding if len(padding) == 4 else (*padding, *padding)
    return top, left, bottom, right


class _Given(NamedTuple):
    """The arguments of `shiftquant_conv2d`."""

    p: Product
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def _given(*args: Any) -> _Given:
    """In the order of the operator, whose epilogue is the last."""
    return _Given(Product(*args[:8], *args[13:]), *args[8:13])


def _check(g: _Given) -> tuple[torch.dtype, tuple[int, int]]:
    """The dtype to compute in, and the height and width of the result."""
    (p, kernel, stride, padding, dilation, groups), x = g, g.p.x
    if x.ndim != 4:
        raise UsageError(f"{_OP}: x {tuple(x.shape)}; expected [batch, channels, height, width]")
    check(_OP, p, x.shape[1])
    sizes = (("kernel", kernel, 1), ("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0))
    for name, value, least in sizes:
        wanted = (2, 4) if name == "padding" else (2,)
        if len(value) not in wanted or min(value) < least:
            raise UsageError(f"{_OP}: {name}={list(value)}; expected {' or '.join(map(str, wanted))} integers of at least {least}")
    if groups < 1 or x.shape[1] % groups or p.scale.shape[0] % groups:
        raise UsageError(f"{_OP}: groups={groups}; {x.shape[1]} channels in and {p.scale.shape[0]} out are no multiple of it")
    before = _sides(padding)
    out = []
    for axis in range(2):
        room = x.shape[2 + axis] + before[axis] + before[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1
        if room < 0:
            raise UsageError(
                f"{_OP}: x {tuple(x.shape)} with padding {list(padding)} is smaller than the kernel {list(kernel)} with dilation "
                f"{list(dilation)}"
            )
        out.append(room // stride[axis] + 1)
    return float_dtype(_OP, x), (out[0], out[1])


def _shapes(g: _Given) -> Tensor:
    _, out = _check(g)
    return g.p.x.new_empty((g.p.x.shape[0], g.p.scale.shape[0], *out))


def _cpu(g: _Given) -> Any:
    if not g.p.x.numel():
        return NotImplemented
    _, out = _check(g)
    prepared = conv_weights(g.p.weight, g.p.exponents, g.p.scale, g.p.bias, g.p.bits, g.groups, g.kernel[0] * g.kernel[1])
    static = input_scale_value(_OP, g.p.input_scale)
    image = g.p.x.float().contiguous()
    y = image.new_empty((g.p.x.shape[0], g.p.scale.numel(), *out))
    top, left, bottom, right = _sides(g.padding)
    record = native.Conv(
        *g.p.x.shape, *g.kernel, tuple(g.stride), (top, left), (bottom, right), tuple(g.dilation), g.groups
    )  # fmt: skip
    native.call("nf_conv2d", record, prepared, image, g.p.activation_bits, static, native.EPILOGUES[g.p.epilogue], y)
    return y.to(g.p.x.dtype)


SHIFTQUANT_CONV2D = Operator(
    shiftquant_conv2d,
    shapes=_shapes,
    cpu=_cpu,
    given=_given,
    functions=(
        native.Function("nf_conv2d", native.CONV, native.WEIGHTS, native.F32, native.INT, native.FLOAT, native.INT, native.F32),
    ),
)
