"""`torch.ops.normfuse.codes_conv2d`: a convolution from codes to codes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._prepared import state
from normfuse.ops._shapes import check_bits, check_vector
from normfuse.ops.codes._codes import behind, check_codes, check_range, check_window, coded, single, window
from normfuse.ops.operator import Operator
from normfuse.quant.packing import row_bytes, unpack_rows
from normfuse.words import FUNCTIONS

__all__ = ["CODES_CONV2D", "codes_conv2d"]

_OP = "codes_conv2d"


def codes_conv2d(
    x: Tensor, weight: Tensor, shifts: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, table: Tensor | None,
    bits: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    zero: int, low: int, high: int, residual_scale: float = 0.0, function: str = "none", gain: float = 1.0, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """v[b, p, o] = float(Σ_(t, c) (x[b, p ∘ t, c] − zero) · W[o, t, c]) · scale[o] + bias[o]
                 + float(residual[b, p, o]) · residual_scale
    y = T( clamp(rne(v), low, high) ),   or with f(v) · gain + offset in the place of v;   W = C << shift[c].

    t runs over the taps of the kernel, c over the input channels of the group of o, the fastest; p ∘ t is the position that tap t
    of output position p reads, whose code is `zero` in the padding. The sum is an exact integer. Floats are in units of the codes
    that are written; their zero points are within the bias.

    Args:
        x: uint8 [B, H, W, channels].
        weight: C, one bit string an output (`normfuse.quant.packing.pack_rows`): uint8 [O, ⌈taps · channels / groups · bits / 8⌉].
        shifts: uint8 [channels]; no W is beyond −128 … 127.
        scale, bias: float32 [O].
        residual: uint8 [B, H', W', O], or None.
        table: T, uint8 [256], or None for the code itself.
        bits: of C.
        kernel, stride, dilation: (height, width).
        padding: (top, left, bottom, right).
        groups: of channels.
        zero: the code of 0 in x.
        low, high: bounds of the codes: low is their zero point behind a ReLU.
        residual_scale: of a code of the residual.
        function: f, "hardswish" or "silu"; "none" for v itself.
        gain, offset: behind the function; what stands in front of it is then in units of the model.

    Returns:
        uint8 [B, H', W', O].

    Raises:
        UsageError: arguments do not belong together.
    """
    g = _Given(
        x, weight, shifts, scale, bias, residual, table, bits, kernel, stride, padding, dilation, groups, zero, low, high,
        residual_scale, function, gain, offset,
    )  # fmt: skip
    _check(g)
    y = _sums(g).float() * scale.float() + bias.float()
    if residual is not None:
        y = y + residual.float() * single(residual_scale).to(x.device)
    if function != "none":
        y = behind(function, y, gain, offset)
    codes = coded(y, low, high)
    return (codes if table is None else table[codes.long()]).contiguous()


class _Given(NamedTuple):
    """The arguments of `codes_conv2d`."""

    x: Tensor
    weight: Tensor
    shifts: Tensor
    scale: Tensor
    bias: Tensor
    residual: Tensor | None
    table: Tensor | None
    bits: int
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    zero: int
    low: int
    high: int
    residual_scale: float = 0.0
    function: str = "none"
    gain: float = 1.0
    offset: float = 0.0

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def _operand(g: _Given) -> Tensor:
    """W: int32 [O, taps, channels of a group].

    Raises:
        UsageError: one is beyond 8 bits.
    """
    outputs, channels = g.scale.shape[0], g.shifts.shape[0] // g.groups
    codes = unpack_rows(g.weight.detach(), g.taps * channels, g.bits).to(torch.int32)
    shifts = g.shifts.detach().to(torch.int32).reshape(g.groups, 1, 1, channels)
    w = codes.reshape(g.groups, outputs // g.groups, g.taps, channels) << shifts
    if w.numel() and (int(w.min()) < -128 or int(w.max()) > 127):
        raise UsageError(f"{_OP}: shifted weights up to {int(w.abs().max())}; expected at most 127, which fit into 8 bits")
    return w.reshape(outputs, g.taps, channels)


def _sums(g: _Given) -> Tensor:
    """Σ (x − zero) · W, int32 [B, H', W', O], in floats that hold every partial sum exactly."""
    w = _operand(g)
    exact = 255 * int(w.abs().sum((1, 2)).max()) < 2**24 and g.x.device.type == "cpu"
    dtype = torch.float32 if exact else torch.float64
    weight = w.to(dtype).reshape(len(w), *g.kernel, -1).permute(0, 3, 1, 2)
    top, left, bottom, right = g.padding
    image = F.pad((g.x.to(torch.int32) - g.zero).to(dtype).permute(0, 3, 1, 2), (left, right, top, bottom))
    acc = F.conv2d(image, weight, None, tuple(g.stride), 0, tuple(g.dilation), g.groups)
    return acc.to(torch.int32).permute(0, 2, 3, 1)


def _check(g: _Given) -> tuple[int, int]:
    """Height and width of the result."""
    check_codes(_OP, g.x)
    check_bits(_OP, g.bits)
    check_range(_OP, g.low, g.high, g.zero)
    check_window(_OP, g.kernel, g.stride, g.padding, g.dilation)
    if g.function not in FUNCTIONS:
        raise UsageError(f"{_OP}: function={g.function!r}; expected one of {', '.join(FUNCTIONS)}")
    if g.scale.ndim != 1 or not g.scale.shape[0] or not g.scale.is_floating_point():
        raise UsageError(f"{_OP}: scale {tuple(g.scale.shape)} of {g.scale.dtype}; expected floats, one an output")
    check_vector(_OP, "bias", g.bias, g.scale.shape[0])
    channels, outputs = g.x.shape[3], g.scale.shape[0]
    if tuple(g.shifts.shape) != (channels,) or g.shifts.dtype is not torch.uint8:
        raise UsageError(f"{_OP}: shifts {tuple(g.shifts.shape)} of {g.shifts.dtype}; expected {channels} of uint8, one a channel")
    if g.groups < 1 or channels % g.groups or outputs % g.groups:
        raise UsageError(f"{_OP}: groups={g.groups}; {channels} channels in and {outputs} out are no multiple of it")
    length = row_bytes(g.taps * channels // g.groups, g.bits)
    if g.weight.dtype is not torch.uint8 or tuple(g.weight.shape) != (outputs, length):
        raise UsageError(f"{_OP}: weight {tuple(g.weight.shape)} of {g.weight.dtype}; expected uint8 [{outputs}, {length}]")
    if g.table is not None and (tuple(g.table.shape) != (256,) or g.table.dtype is not torch.uint8):
        raise UsageError(f"{_OP}: table {tuple(g.table.shape)} of {g.table.dtype}; expected 256 of uint8")
    out = window(_OP, g.x, g.kernel, g.stride, g.padding, g.dilation)
    if g.residual is not None:
        check_codes(_OP, g.residual, "residual")
        if tuple(g.residual.shape) != (g.x.shape[0], *out, outputs):
            raise UsageError(f"{_OP}: residual {tuple(g.residual.shape)}; expected {(g.x.shape[0], *out, outputs)}")
        if g.groups == channels == outputs > 1:
            raise UsageError(f"{_OP}: a depthwise convolution takes no residual; add it with codes_add")
    return out


def _shapes(g: _Given) -> Tensor:
    return g.x.new_empty((g.x.shape[0], *_check(g), g.scale.shape[0]))


# -- the kernel ------------------------------------------------------------------------------------------------------------


class _Packed(NamedTuple):
    key: tuple[Any, ...]
    owner: weakref.ref[Tensor]
    value: Tensor


_packed: dict[int, _Packed] = {}


def _cpu(g: _Given) -> Tensor:
    b, h, w, c = g.x.shape
    y = torch.empty((b, *_check(g), g.scale.shape[0]), dtype=torch.uint8)
    shape = native.CodesConv(
        b, c, h, w, g.scale.shape[0], *g.kernel, tuple(g.stride), tuple(g.padding[:2]), tuple(g.padding[2:]), tuple(g.dilation),
        g.groups, g.zero, g.low, g.high, float(g.residual_scale), native.FUNCTIONS[g.function], float(g.gain), float(g.offset),
    )  # fmt: skip
    packed = _prepared(g, shape)
    residual = None if g.residual is None else g.residual.contiguous()
    if y.numel():
        native.call("nf_codes_conv2d", shape, packed, g.x.contiguous(), residual, g.table, y)
    return y


def _prepared(g: _Given, shape: native.CodesConv) -> Tensor:
    """The weights as the kernels read them, once for each weight."""
    places = (g.zero, g.bits, g.groups, *g.kernel, *g.padding, g.dilation[1], g.residual_scale, g.function, g.gain)
    key = (*(state(t) for t in (g.weight, g.shifts, g.scale, g.bias)), places)
    number = id(g.weight)
    known = _packed.get(number)
    if known is not None and known.owner() is g.weight and known.key == key:
        return known.value
    value = torch.empty(native.codes_bytes(shape), dtype=torch.uint8)
    weights = _operand(g).to(torch.int8).contiguous()
    native.call("nf_codes_pack", shape, weights, g.scale.detach().float().contiguous(), g.bias.detach().float().contiguous(), value)
    _packed[number] = _Packed(key, weakref.ref(g.weight, lambda _: _packed.pop(number, None)), value)
    return value


CODES_CONV2D = Operator(
    codes_conv2d,
    shapes=_shapes,
    cpu=_cpu,
    given=_Given,
    functions=(
        native.Function("nf_codes_pack", native.CODES_CONV, native.I8, native.F32, native.F32, native.U8),
        native.Function(
            "nf_codes_conv2d", native.CODES_CONV, native.U8, native.U8, native.U8_OR_NONE, native.U8_OR_NONE, native.U8
        ),
    ),
)
