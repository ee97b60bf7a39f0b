"""Constants of a graph: exact, lazy, never overwritten.

A rewrite computes new weights from old ones. Holding those in float64 for a whole model would cost twice the model;
holding them in the model's own dtype would round at every step. So a constant is an *expression* over the tensors of
the original model: small ones (gains, biases) are evaluated at once, large ones (weights) when somebody asks, in
float64, and the result is cast a single time, when the final module is built.

Where a rounding decides (a floor, a comparison, a cast to integers), float64 would decide otherwise than the model. So a
constant that the model computes also knows how: `eager` repeats its steps in its own dtypes, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["Constant", "sharing", "weights_shared"]

_EAGER = 1 << 16  # values; a 512 KiB vector in float64 is not worth being lazy about
_SHARED: ContextVar[bool] = ContextVar("normfuse_weights_shared", default=False)


class Constant:
    """A tensor known at compile time: float64 or complex128 inside (integers and booleans as they are), `dtype` outside.

    Arithmetic, indexing and the methods below give new constants; nothing is written in place.

    Attributes:
        shape: its shape.
        dtype: the dtype it takes in the final module; an expression inherits it from its first operand.
        name: dotted name in the original model, or that of the first operand of the expression.
        tensor: the original tensor if this is one, None for an expression.
        trained: does a parameter with `requires_grad` stand in it? What a rewrite makes of weights is trained if one of them was.
    """

    __slots__ = ("_compute", "_eager", "dtype", "name", "shape", "tensor", "trained")

    def __init__(
        self,
        compute: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        name: str,
        tensor: Tensor | None = None,
        eager: Callable[[], Tensor] | None = None,
        *,
        trained: bool = False,
    ) -> None:
        self._compute = compute
        self._eager = eager
        self.shape = shape
        self.dtype = dtype
        self.name = name
        self.tensor = tensor
        self.trained = trained and (dtype.is_floating_point or dtype.is_complex)

    @classmethod
    def of(cls, tensor: Tensor, name: str = "") -> Constant:
        """An original tensor; it is referred to, not copied."""
        trained, tensor = tensor.requires_grad, tensor.detach()
        return cls(lambda: _exact(tensor), tensor.shape, tensor.dtype, name, tensor, trained=trained)

    @classmethod
    def decided(
        cls, eager: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, name: str, *, trained: bool = False
    ) -> Constant:
        """What the model computes in its own dtypes, where another precision would decide otherwise."""
        eager = _kept(eager, shape)
        return cls(lambda: _exact(eager()), shape, dtype, name, eager=eager, trained=trained)

    @classmethod
    def apply(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Constant:
        """The constant `function(*args, **kwargs)`; constants may stand anywhere among the arguments."""
        operands = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Constant)]

        def compute() -> Tensor:
            a, k = torch.utils._pytree.tree_map(lambda v: v.value if isinstance(v, Constant) else v, (args, kwargs))
            return _exact(function(*a, **k))

        first = next((c for c in operands if c.name), operands[0] if operands else None)
        name, trained = first.name if first else "", any(c.trained for c in operands)
        size = max((c.numel for c in operands), default=0)
        if size <= _EAGER:
            value = compute()
            return cls(lambda: value, value.shape, _stored(value, first), name, trained=trained)
        meta, kmeta = torch.utils._pytree.tree_map(lambda v: v.meta if isinstance(v, Constant) else _meta(v), (args, kwargs))
        result: Tensor = function(*meta, **kmeta)
        dtype = _stored(result, first)
        if result.numel() <= _EAGER:  # a bias computed from a weight: worth keeping, the weight is not
            value = compute()
            return cls(lambda: value, result.shape, dtype, name, trained=trained)
        return cls(compute, result.shape, dtype, name, trained=trained)

    @property
    def value(self) -> Tensor:
        """The exact value: float64, complex128, or the integer or boolean tensor itself."""
        return self._compute()

    @property
    def native(self) -> Tensor:
        """The value cast once to `dtype`; an original tensor itself, bit for bit."""
        return self.tensor if self.tensor is not None else self.value.to(self.dtype)

    @property
    def eager(self) -> Tensor:
        """What the model computes, step by step in its own dtypes; `native` for an original and for what a rewrite has made."""
        return self.native if self._eager is None else self._eager()

    @property
    def meta(self) -> Tensor:
        """Shape and dtype of `value`, without data."""
        return torch.empty(self.shape, dtype=_wide(self.dtype), device="meta")

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def cast(self, dtype: torch.dtype) -> Constant:
        """The same values, to be stored in `dtype`."""
        return self if dtype == self.dtype else Constant(self._compute, self.shape, dtype, self.name, trained=self.trained)

    def holding(self, value: Tensor) -> Constant:
        """Another value for the same purpose: with this one's name and dtype, and trained if this one is."""
        new = Constant.of(value, self.name)
        return Constant(new._compute, new.shape, self.dtype, self.name, None, trained=self.trained)

    def asking(self, trained: bool) -> Constant:
        """The same values, trained or not."""
        return Constant(self._compute, self.shape, self.dtype, self.name, self.tensor, self._eager, trained=trained)

    def named(self, name: str) -> Constant:
        """The same values under another name."""
        return Constant(self._compute, self.shape, self.dtype, name, self.tensor, self._eager, trained=self.trained)

    def computed(self, eager: Callable[[], Tensor]) -> Constant:
        """The same values, beside what the model computes for them in its own dtypes."""
        return Constant(
            self._compute, self.shape, self.dtype, self.name, self.tensor, _kept(eager, self.shape), trained=self.trained
        )

    def rounded(self) -> Constant:
        """What the model has after its own roundings: an operator of a wider dtype sees them."""
        if self._eager is None:
            return self
        return Constant.decided(self._eager, self.shape, self.dtype, self.name, trained=self.trained)

    def __mul__(self, other: Constant | Tensor | float) -> Constant:
        return Constant.apply(torch.mul, self, other)

    def __rmul__(self, other: Tensor | float) -> Constant:
        return Constant.apply(torch.mul, self, other)

    def __add__(self, other: Constant | Tensor | float) -> Constant:
        return Constant.apply(torch.add, self, other)

    def __sub__(self, other: Constant | Tensor | float) -> Constant:
        return Constant.apply(torch.sub, self, other)

    def __truediv__(self, other: Constant | Tensor | float) -> Constant:
        return Constant.apply(torch.div, self, other)

    def __matmul__(self, other: Constant | Tensor) -> Constant:
        return Constant.apply(torch.matmul, self, other)

    def __neg__(self) -> Constant:
        return Constant.apply(torch.neg, self)

    def __getitem__(self, index: Any) -> Constant:
        return Constant.apply(lambda v: v[index], self)

    def reshape(self, *shape: int) -> Constant:
        return Constant.apply(lambda v: v.reshape(*shape), self)

    def expand(self, *shape: int) -> Constant:
        return Constant.apply(lambda v: v.expand(*shape), self)

    def sum(self, dim: Sequence[int] | int) -> Constant:
        return Constant.apply(lambda v: v.sum(dim), self)

    def mean(self, dim: int, *, keepdim: bool = False) -> Constant:
        return Constant.apply(lambda v: v.mean(dim, keepdim=keepdim), self)

    def rsqrt(self) -> Constant:
        return Constant.apply(torch.rsqrt, self)

    def reciprocal(self) -> Constant:
        return Constant.apply(torch.reciprocal, self)

    def repeat_interleave(self, repeats: int, dim: int) -> Constant:
        return Constant.apply(lambda v: v.repeat_interleave(repeats, dim), self)

    @property
    def T(self) -> Constant:  # noqa: N802 - as in PyTorch
        return Constant.apply(torch.t, self)

    def __repr__(self) -> str:
        return f"Constant({self.name or '?'}, {tuple(self.shape)}, {str(self.dtype).removeprefix('torch.')})"


def _exact(value: Tensor) -> Tensor:
    return value.to(_wide(value.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _stored(result: Tensor, first: Constant | None) -> torch.dtype:
    """The dtype for a result: that of the first operand, made complex or real as the result is."""
    like = None if first is None else first.dtype
    if like is None or not (like.is_floating_point or like.is_complex):
        return result.dtype
    if result.is_complex():
        return like.to_complex()
    return like.to_real() if result.is_floating_point() else result.dtype


def _kept(compute: Callable[[], Tensor], shape: torch.Size) -> Callable[[], Tensor]:
    """Computed once where it is small."""
    return functools.cache(compute) if shape.numel() <= _EAGER else compute


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def sharing() -> bool:
    """Weights that no pass has changed are to be those of the original, and not copies."""
    return _SHARED.get()


@contextmanager
def weights_shared() -> Iterator[None]:
    """Within the block, graphs are made with the original's tensors where these are unchanged.

    They save a copy of a large model's weights. Nobody may write into either of the two.
    """
    token = _SHARED.set(True)
    try:
        yield
    finally:
        _SHARED.reset(token)
