"""Activations behind a product."""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["activated"]


@triton.jit
def activated(y, EPILOGUE: tl.constexpr):
    """The activation of that name; "none" is y itself. NaN stays NaN."""
    if EPILOGUE == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif EPILOGUE == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif EPILOGUE == "gelu_tanh":  # (1 + tanh u) / 2 = σ(2u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif EPILOGUE == "silu":
        y = y * tl.sigmoid(y)
    return y
