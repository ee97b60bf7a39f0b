"""`torch.ops.normfuse.shiftquant_embedding`: rows of a table of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.ops.operator import Operator
from normfuse.quant.packing import row_bytes, unpack_rows

__all__ = ["SHIFTQUANT_EMBEDDING", "shiftquant_embedding"]

_OP = "shiftquant_embedding"


def shiftquant_embedding(indices: Tensor, codes: Tensor, scale: Tensor, dim: int, bits: int) -> Tensor:
    """y[..., d] = scale[i] · C[i, d],   i = indices[...].

    Only the rows that are asked for are unpacked.

    Args:
        indices: int32 or int64, of any shape.
        codes: C, uint8 [rows, ⌈dim · bits / 8⌉] (see `normfuse.quant.packing.pack_rows`).
        scale: [rows], one a row; its dtype is that of the result.
        dim: features of a row.
        bits: of C, 2 to 8.

    Returns:
        [..., dim].

    Raises:
        UsageError: shapes do not fit.
        IndexError: an index is no row of the table.
    """
    _check(indices, codes, scale, dim, bits)
    flat = indices.reshape(-1)
    c = unpack_rows(codes.index_select(0, flat), dim, bits)
    y = c.to(scale.dtype) * scale.index_select(0, flat)[:, None]
    return y.reshape(*indices.shape, dim)


def _check(indices: Tensor, codes: Tensor, scale: Tensor, dim: int, bits: int) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise UsageError(f"{_OP}: indices are {indices.dtype}; expected int32 or int64")
    if not 2 <= bits <= 8 or dim < 1:
        raise UsageError(f"{_OP}: {bits} bits and dim={dim}; expected 2 to 8, and at least 1")
    if codes.dtype is not torch.uint8 or codes.ndim != 2 or codes.shape[1] != row_bytes(dim, bits):
        raise UsageError(
            f"{_OP}: codes {tuple(codes.shape)} of {codes.dtype}; expected uint8 [rows, {row_bytes(dim, bits)}] for {dim} "
            f"codes of {bits} bits"
        )
    if scale.ndim != 1 or scale.shape[0] != codes.shape[0] or not scale.is_floating_point():
        raise UsageError(
            f"{_OP}: scale {tuple(scale.shape)} of {scale.dtype}; expected floats, one for each of {codes.shape[0]} rows"
        )


def _shapes(indices: Tensor, codes: Tensor, scale: Tensor, dim: int, bits: int) -> Tensor:
    return scale.new_empty((*indices.shape, dim))


SHIFTQUANT_EMBEDDING = Operator(shiftquant_embedding, shapes=_shapes, check=_check)
