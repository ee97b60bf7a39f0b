"""Rounding that lets later columns make up for the error of earlier ones (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import NormfuseError

__all__ = ["gptq_codes"]

_BLOCK = 128
_ROWS = 4096
_DAMPING = 0.01


def gptq_codes(weight: Tensor, step: Tensor, hessian: Tensor, low: int, top: int) -> Tensor:
    """Codes C that lower tr((W − Ŵ) H (W − Ŵ)ᵀ), Ŵ = C · step, one column after the other.

    A column is rounded, and the columns that are still to come move by −error · U[i, j] / U[i, i], with UᵀU = H⁻¹ the Cholesky
    factor of the damped inverse; columns go in order of falling H[k, k]. A row for which rounding to the nearest turns out
    better keeps it.

    Source: Frantar et al., GPTQ, ICLR 2023.

    Args:
        weight: W, [N, K].
        step: not 0, float64 [N, K] or what broadcasts to it.
        hessian: H = E[x xᵀ], [K, K]; a column whose H[k, k] is 0 is rounded to the nearest.
        low, top: the smallest and the largest code.

    Returns:
        int8 [N, K].

    Raises:
        NormfuseError: H is not positive semidefinite.
    """
    n, k = weight.shape
    hessian = (hessian.double() + hessian.double().T) / 2
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order])
    back = order.argsort()
    codes = torch.empty((n, k), dtype=torch.int8)
    for i in range(0, n, _ROWS):
        rows = slice(i, min(n, i + _ROWS))
        w = weight[rows].double()
        d = step[rows].expand_as(w)
        nearest = (w / d).round_().clamp_(low, top)
        found = _sweep(w[:, order], d[:, order], upper, low, top)[:, back]
        better = _cost(w - found * d, hessian) < _cost(w - nearest * d, hessian)
        codes[rows] = torch.where(better[:, None], found, nearest).to(torch.int8)
    return codes


def _sweep(w: Tensor, d: Tensor, upper: Tensor, low: int, top: int) -> Tensor:
    k = w.shape[1]
    columns = w.T.contiguous()  # a column at a time is read and written
    d = d.T.contiguous()
    codes = torch.empty_like(columns)
    for start in range(0, k, _BLOCK):
        end = min(k, start + _BLOCK)
        errors = torch.empty((end - start, columns.shape[1]), dtype=torch.float64)
        for i in range(start, end):
            codes[i] = (columns[i] / d[i]).round().clamp(low, top)
            error = (columns[i] - codes[i] * d[i]) / upper[i, i]
            columns[i + 1 : end] -= upper[i, i + 1 : end, None] * error
            errors[i - start] = error
        columns[end:] -= upper[start:end, end:].T @ errors
    return codes.T


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = (H + λI)⁻¹; λ grows until the factorization succeeds."""
    diagonal = hessian.diagonal()
    seen = diagonal > 0
    mean = float(diagonal[seen].mean()) if bool(seen.any()) else 1.0
    hessian = hessian / mean
    unseen = (~seen).double()
    eye = torch.eye(len(hessian), dtype=torch.float64)
    damping = _DAMPING
    while damping <= 1.0:
        factor, info = torch.linalg.cholesky_ex(hessian + torch.diag(damping + unseen))
        if not int(info):
            inverse = torch.cholesky_solve(eye, factor)
            upper: Tensor
            upper, info = torch.linalg.cholesky_ex((inverse + inverse.T) / 2, upper=True)
            if not int(info):
                return upper
        damping *= 10
    raise NormfuseError(
        "gptq: the second moments of the inputs are no positive semidefinite matrix; expected E[x xᵀ] of calibration data"
    )


def _cost(error: Tensor, hessian: Tensor) -> Tensor:
    return ((error @ hessian) * error).sum(1)
