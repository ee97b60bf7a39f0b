"""`Scheme`: a number format, and how a model gets into it."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from typing import Any, ClassVar

__all__ = ["Scheme"]


class Scheme(ABC):
    """What `normfuse.optimize(quantize=…)` takes. A number format is a frozen dataclass that is one, and a pass that does it.

    Attributes:
        rewritten_by: module and class of the pass, which is made from the scheme; imported when it is needed, since its operators
            load the native kernels.
        keep: patterns of module paths that stay in float.
        overrides: other values for layers, by pattern of their module path.
    """

    rewritten_by: ClassVar[tuple[str, str]]
    keep: tuple[str, ...]
    overrides: Any

    @property
    @abstractmethod
    def needs_data(self) -> str:
        """What of it has to come from real data, as the subject of a sentence; empty for nothing."""

    @abstractmethod
    def at(self, path: str) -> Scheme:
        """That of the layer at `path`."""

    def kept(self, path: str) -> str | None:
        """The pattern of `keep` that keeps the layer at `path` in float."""
        return next((p for p in self.keep if fnmatch.fnmatchcase(path, p)), None)
