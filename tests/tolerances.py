"""How far two computations of the same function may differ, by dtype."""

from dataclasses import dataclass

import torch

__all__ = ["IDENTITY", "TOLERANCES", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """Relative bound on an error, with the number that justifies it.

    Attributes:
        mantissa: explicit bits of the significand; one rounding is 2 ** -(mantissa + 1), relative.
        rtol: bound on max |difference| / max |reference| for a network of some dozen layers.
    """

    mantissa: int
    rtol: float


# Measured drift over the zoo is below 50 roundings in float32; the table allows about 256 of them (8 bits), and in the
# half dtypes, whose sums PyTorch accumulates in float32 and rounds once per layer, about 16 (4 bits).
TOLERANCES = {
    torch.float64: Tolerance(mantissa=52, rtol=2.0**-44),
    torch.float32: Tolerance(mantissa=23, rtol=2.0**-15),
    torch.float16: Tolerance(mantissa=10, rtol=2.0**-6),
    torch.bfloat16: Tolerance(mantissa=7, rtol=2.0**-3),
}

# What `normfuse` itself demands of an algebraic identity, relative, in float64.
IDENTITY = 1e-9
