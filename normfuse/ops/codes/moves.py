"""`torch.ops.normfuse.codes_take` and `codes_upsample`: codes that only change their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops.codes._codes import check_codes
from normfuse.ops.operator import Operator

__all__ = ["CODES_TAKE", "CODES_UPSAMPLE", "codes_take", "codes_upsample"]


def codes_take(x: Tensor, first: int, count: int, groups: int = 1) -> Tensor:
    """y[…, j · groups + i] = x[…, first + i · (count / groups) + j]: channels of an image, shuffled between groups.

    Args:
        x: uint8 [B, H, W, C].
        first, count: the channels that are taken.
        groups: they are dealt out, one of each group after the other; 1 keeps their order.

    Returns:
        uint8 [B, H, W, count].

    Raises:
        UsageError: x holds no codes, or has no such channels.
    """
    _check_take(x, first, count, groups)
    taken = x[..., first : first + count]
    return taken.reshape(*x.shape[:3], groups, count // groups).transpose(3, 4).reshape(taken.shape).clone()


def _check_take(x: Tensor, first: int, count: int, groups: int = 1) -> None:
    check_codes("codes_take", x)
    if first < 0 or count < 1 or first + count > x.shape[3]:
        raise UsageError(f"codes_take: channels {first} to {first + count} of {x.shape[3]}; expected some that are there")
    if groups < 1 or count % groups:
        raise UsageError(f"codes_take: groups={groups}; {count} channels are no multiple of it")


def _taken(x: Tensor, first: int, count: int, groups: int = 1) -> Tensor:
    return x.new_empty((*x.shape[:3], count))


def _cpu_take(x: Tensor, first: int, count: int, groups: int = 1) -> Any:
    b, h, w, c = x.shape
    y = torch.empty((b, h, w, count), dtype=torch.uint8)
    if y.numel():
        native.call("nf_codes_take", x.contiguous(), b * h * w, c, first, count, groups, y)
    return y


def codes_upsample(x: Tensor, times: Sequence[int]) -> Tensor:
    """y[b, i, j] = x[b, i // times[0], j // times[1]]: every pixel several times.

    Args:
        x: uint8 [B, H, W, C].
        times: (height, width), each at least 1.

    Returns:
        uint8 [B, H · times[0], W · times[1], C].

    Raises:
        UsageError: x holds no codes, or a factor is out of range.
    """
    _check_upsample(x, times)
    return x.repeat_interleave(times[0], 1).repeat_interleave(times[1], 2)


def _check_upsample(x: Tensor, times: Sequence[int]) -> None:
    check_codes("codes_upsample", x)
    if len(times) != 2 or min(times) < 1:
        raise UsageError(f"codes_upsample: times={list(times)}; expected two integers of at least 1")


def _upsampled(x: Tensor, times: Sequence[int]) -> Tensor:
    b, h, w, c = x.shape
    return x.new_empty((b, h * times[0], w * times[1], c))


def _cpu_upsample(x: Tensor, times: Sequence[int]) -> Any:
    y = _upsampled(x, times)
    b, h, w, c = x.shape
    if y.numel():
        native.call("nf_codes_upsample", x.contiguous(), b * h, w, c, *times, y)
    return y


CODES_TAKE = Operator(
    codes_take,
    shapes=_taken,
    check=_check_take,
    cpu=_cpu_take,
    functions=(
        native.Function(
            "nf_codes_take", native.U8, native.LONG, native.LONG, native.LONG, native.LONG, native.LONG, native.U8
        ),
    ),
)  # fmt: skip
CODES_UPSAMPLE = Operator(
    codes_upsample,
    shapes=_upsampled,
    check=_check_upsample,
    cpu=_cpu_upsample,
    functions=(
        native.Function(
            "nf_codes_upsample", native.U8, native.LONG, native.LONG, native.LONG, native.LONG, native.LONG, native.U8
        ),
    ),
)  # fmt: skip
