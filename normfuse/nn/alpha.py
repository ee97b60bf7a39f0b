"""α-BN: batch normalization whose statistics are a mixture of the training data's and the batch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._batch_norm import SyncedBatchNorm2d
from normfuse.nn._dtypes import narrowed, sizes_known, widened

__all__ = ["AlphaBatchNorm"]


class AlphaBatchNorm(SyncedBatchNorm2d):
    """y = γ (x − μ) / √(v + ε) + β,   μ = a μ_source + (1 − a) μ_batch,   v = a v_source + (1 − a) v_batch.

    Args:
        num_features: C.
        source_weight: a, from 0 (the batch alone) to 1 (plain batch normalization). The widely used code calls
            1 − a `alpha`.
        eps: ε.
        momentum: as in `nn.BatchNorm2d`; only used in training.
        affine: False for no γ and β.

    Shape:
        (N, C, H, W).

    In training this is `nn.BatchNorm2d`. In evaluation it is *live*: v_batch is the unbiased variance of the batch, and the
    result of a sample depends on its batch, so that nothing can be folded. After `freeze()` it is plain batch normalization with
    the running statistics, which folds; `normfuse.nn.calibrate` first writes the mixture over a whole loader there and
    then freezes. Keys and shapes of the state dictionary are those of `nn.BatchNorm2d`; it does not hold `frozen`.

    Source:
        "Test-time Batch Statistics Calibration for Covariate Shift" (2021); the unbiased variance is that of the widely used code.
    """

    running_mean: Tensor
    running_var: Tensor

    _name = "AlphaBatchNorm"

    def __init__(
        self, num_features: int, source_weight: float = 0.9, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        if not 0 <= source_weight <= 1:
            raise UsageError(f"source_weight={source_weight}: expected a number from 0 (the batch alone) to 1 (the source alone)")
        self.source_weight = source_weight
        self.frozen = False

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, source_weight: float = 0.9) -> AlphaBatchNorm:
        """A live α-BN with the parameters and statistics of a batch normalization, which it shares.

        Raises:
            UsageError: the batch normalization keeps no running statistics.
        """
        if norm.running_mean is None:
            raise UsageError("AlphaBatchNorm.of: the batch normalization has track_running_stats=False, so that there is no source")
        new = cls(norm.num_features, source_weight, norm.eps, norm.momentum, norm.affine)
        new._parameters = dict(norm._parameters)
        new._buffers = dict(norm._buffers)
        return new.train(norm.training)

    def freeze(self) -> AlphaBatchNorm:
        """From now on use the running statistics alone in evaluation."""
        self.frozen = True
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`.

        Raises:
            UsageError: in training without a row; live with one row, which has no variance.
        """
        self._check_input_dim(input)
        if self.training:
            if sizes_known(input) and input.numel() == 0:
                raise UsageError("AlphaBatchNorm: the batch is empty; skip it in training, or call .eval() first")
            return super().forward(input)
        if self.frozen or self.source_weight == 1 or self._empty(input):
            y = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return narrowed(y, input)
        x = widened(input).transpose(1, -1)  # (N, W, H, C)
        batch_var, batch_mean = torch.var_mean(x.flatten(0, -2), dim=0)
        mean = self.source_weight * self.running_mean + (1 - self.source_weight) * batch_mean
        var = self.source_weight * self.running_var + (1 - self.source_weight) * batch_var
        y = (x - mean) / torch.sqrt(var + self.eps)
        if self.affine:
            y = y * self.weight + self.bias
        return narrowed(y.transpose(1, -1), input)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, source_weight={self.source_weight}, frozen={self.frozen}, eps={self.eps}, affine={self.affine}"
        )

    def _empty(self, x: Tensor) -> bool:
        """Has the batch no row? While a tracer runs, the answer is no."""
        if torch.compiler.is_compiling() or not sizes_known(x):
            return False
        rows = x.numel() // self.num_features
        if rows == 1:
            raise UsageError(
                "AlphaBatchNorm: one row has no variance; give a larger batch, or call normfuse.nn.calibrate or .freeze() first"
            )
        return rows == 0
