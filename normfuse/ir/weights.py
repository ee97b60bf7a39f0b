"""Where the weight of a layer lies: which of its axes holds what, and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.ir.constants import Constant

__all__ = ["Weight"]


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of a layer y = W x + b, however it is stored. A view says it once; rules ask.

    Attributes:
        value: W. Where there are groups its axis 0 holds the features of all of them, axis 1 those of one.
        field: the field of the view that holds it.
        out: the axis of W with the features that the layer writes.
        into: the axis of W with the features that it reads; None for a table, of which rows are read as they are.
        bias: b, if there is one.
        bias_field: the field of the view that holds b; empty if it has none.
        axis: of the features in what the layer reads and writes, counted from the end.
        groups: of features, each with weights of its own.
        unshifted: why one shift of all that the layer reads is no shift of what it writes, as a clause; empty if it is one.
        remedy: what the model could do about that.
    """

    value: Constant
    field: str
    out: int
    into: int | None
    bias: Constant | None = None
    bias_field: str = ""
    axis: int = -1
    groups: int = 1
    unshifted: str = ""
    remedy: str = ""

    @property
    def linear(self) -> bool:
        """Is it a matrix that the features are multiplied by, and no table?"""
        return self.into is not None and self.value.ndim == 2

    @property
    def outputs(self) -> int:
        return self._features(self.out)

    @property
    def inputs(self) -> int:
        assert self.into is not None
        return self._features(self.into)

    def _features(self, dim: int) -> int:
        return int(self.value.shape[dim]) * (self.groups if dim == 1 else 1)

    def beside(self, c: Constant, dim: int) -> Constant:
        """A vector over the features along `dim` of W, in a shape that broadcasts to W."""
        n, shape = self.value.ndim, self.value.shape
        if self.groups == 1 or dim == 0:
            return c.reshape(*[-1 if i == dim else 1 for i in range(n)])
        rows = c.reshape(self.groups, 1, -1).expand(self.groups, shape[0] // self.groups, shape[1])
        return rows.reshape(shape[0], shape[1], *[1] * (n - 2))

    def total(self, t: Constant) -> Constant:
        """Σ W t: what is added to the outputs when the vector t is added to the inputs everywhere."""
        assert self.into is not None
        assert not self.unshifted
        if self.linear:
            return (self.value if self.into == 1 else self.value.T) @ t
        return (self.value * self.beside(t, self.into)).sum([i for i in range(self.value.ndim) if i != self.out])
