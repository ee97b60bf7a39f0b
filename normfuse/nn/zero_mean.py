"""Writers of a residual stream whose output has zero mean over the features, at every step of training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.nn._dtypes import narrowed, widened

__all__ = ["LinearZeroMeanOutput", "ZeroMean"]


class LinearZeroMeanOutput(nn.Linear):
    """y = (W − mean₀ W) x + (b − mean b): a linear layer whose outputs sum to zero.

    Has the parameters of `nn.Linear`, so that checkpoints go both ways; the mean over the output axis is taken away in
    each call, and once and for all by `normfuse.optimize`. Where all writers of a residual stream are of this kind, every
    LayerNorm that reads it equals an RMSNorm.

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, NeurIPS 2023.

    Shape: (…, in_features) to (…, out_features). `weight` (out_features, in_features), `bias` (out_features).
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else _centered(self.bias, 0)
        return F.linear(input, _centered(self.weight, 0), bias)


class ZeroMean(nn.Module):
    """w − mean(w) over `dim`: a parametrization for what writes into a residual stream.

        parametrize.register_parametrization(linear, "weight", ZeroMean(0))  # and "bias"
        parametrize.register_parametrization(embedding, "weight", ZeroMean(-1))  # and learned tokens, position tables

    The value from before the registration is kept as `original`, without its mean only when it is read.

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, NeurIPS 2023.

    Args:
        dim: the axis of the features: 0 for the weight of a linear or a convolution and for a bias, -1 for embeddings,
            tokens and position tables, 1 for the transposed weight of Hugging Face's Conv1D.
    """

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, original: Tensor) -> Tensor:
        return _centered(original, self.dim)

    def right_inverse(self, value: Tensor) -> Tensor:
        """What becomes `original` when `value` is assigned: `value` itself."""
        return value

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _centered(w: Tensor, dim: int) -> Tensor:
    """w − mean(w), in the dtype of w; of half-precision weights computed in float32 and rounded once."""
    wide = widened(w)
    return narrowed(wide - wide.mean(dim, keepdim=True), w)
