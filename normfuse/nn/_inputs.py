"""What a layer takes, said once: checked where the input is known, noted for the passes where it is traced without a shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from normfuse.errors import UsageError
from normfuse.ir.dtypes import FLOATS

__all__ = ["takes"]


def takes(layer: nn.Module, x: Tensor, shape: Sequence[int], behind: int = 0) -> None:
    """`x` is floating and has the axes `shape`, with `behind` more of any size behind them.

    Args:
        layer: whose input it is.
        x: (…, *shape), or (…, *shape, ·, ·) for behind=2.
        shape: the sizes of the axes.
        behind: how many axes follow.

    Raises:
        UsageError: the input is another one.
    """
    if isinstance(x, fx.Proxy):
        sizes = {i - len(shape) - behind: n for i, n in enumerate(shape)}
        x.node.meta["takes"] = x.node.meta.get("takes", {}) | sizes
        x.node.meta["dtypes"] = FLOATS
        return
    found = tuple(x.shape)
    if found[max(x.ndim - len(shape) - behind, 0) : max(x.ndim - behind, 0)] == tuple(shape) and x.is_floating_point():
        return
    wanted = ", ".join(["…", *map(str, shape), *["·"] * behind])
    dtype = str(x.dtype).removeprefix("torch.")
    raise UsageError(
        f"{type(layer).__name__}: the input is {dtype} of shape {found}; expected floating-point values of shape ({wanted})"
    )
