"""`torch.ops.normfuse.rms_norm`, `crms_norm` and `l1_norm`: normalizations over the last axis, floats to floats."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from normfuse.ops._norms import NATIVE, check_norm, gpu_norm, kernel_norm, normalized
from normfuse.ops.operator import Operator

__all__ = ["CRMS_NORM", "L1_NORM", "RMS_NORM", "crms_norm", "l1_norm", "rms_norm"]


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """y = x / √(mean x² + ε) · gain over the last axis.

    Args:
        x: [..., d]; float16 and bfloat16 are computed in float32.
        gain: [d] or None.
        eps: ε, in units of x².

    Returns:
        As x.

    Raises:
        UsageError: shapes do not fit.

    Source: Zhang and Sennrich, Root mean square layer normalization, NeurIPS 2019.
    """
    dtype = check_norm("rms_norm", x, gain, None)
    return normalized(x.to(dtype), "rms", gain, None, eps, 1.0).to(x.dtype).contiguous()


def crms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """y = x / √((Σ x² + (Σ x)²) / (d + 1) + ε) · gain over the last axis, d features long.

    x is a vector of d + 1 coordinates whose sum is zero, without its last one. Arguments, result and errors as of `rms_norm`.

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, NeurIPS 2023.
    """
    dtype = check_norm("crms_norm", x, gain, None)
    return normalized(x.to(dtype), "crms", gain, None, eps, 1.0).to(x.dtype).contiguous()


def l1_norm(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float) -> Tensor:
    """y = (x − μ) / (c mean|x − μ| + ε) · gain + shift over the last axis,   c = scale_const.

    Args:
        x: [..., d]; float16 and bfloat16 are computed in float32.
        gain, shift: [d] or None.
        eps: ε, in units of x.
        scale_const: c; √(π/2) makes the denominator the standard deviation of normally distributed x.

    Returns:
        As x.

    Raises:
        UsageError: shapes do not fit.

    Source: Hoffer et al., Norm matters, NeurIPS 2018.
    """
    dtype = check_norm("l1_norm", x, gain, shift)
    return normalized(x.to(dtype), "l1", gain, shift, eps, scale_const).to(x.dtype).contiguous()


def _shapes(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _scaled(definition: Callable[..., Tensor], kind: str) -> Operator:
    """A norm with a gain alone."""

    def check(x: Tensor, gain: Tensor | None, eps: float) -> None:
        check_norm(definition.__name__, x, gain, None)

    def cpu(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        return kernel_norm(x, kind, gain, None, eps, 1.0)

    def gpu(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        return gpu_norm(x, None, kind, gain, None, eps, 1.0)[0]

    return Operator(definition, shapes=_shapes, check=check, cpu=cpu, gpu=gpu, functions=(NATIVE,))


RMS_NORM, CRMS_NORM = _scaled(rms_norm, "rms"), _scaled(crms_norm, "crms")
L1_NORM = Operator(
    l1_norm,
    shapes=_shapes,
    check=lambda x, gain, shift, *numbers: check_norm("l1_norm", x, gain, shift),
    cpu=lambda x, *of: kernel_norm(x, "l1", *of),
    gpu=lambda x, *of: gpu_norm(x, None, "l1", *of)[0],
    functions=(NATIVE,),
)
