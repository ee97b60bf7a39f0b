"""A file in its runtime, whichever that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Input", "Session"]


@dataclass(frozen=True)
class Input:
    """One input of a file: its name, element type as in NumPy, and sizes, names for those that may vary."""

    name: str
    dtype: str
    sizes: tuple[int | str, ...]


class Session(Protocol):
    """A file that was opened.

    Attributes:
        inputs: what it takes, in order.
    """

    @property
    def inputs(self) -> tuple[Input, ...]: ...

    def outputs(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, in order; what `feeds` holds beside the inputs is passed over.

        Raises:
            ExportError: the runtime fails on the inputs.
        """
