"""Where the shared object with the native kernels is, for those who must not load PyTorch; `normfuse.native` calls it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SWITCH", "library_file", "switched_off"]

#: The variable of the environment that switches the kernels off where it is 0.
SWITCH = "NORMFUSE_NATIVE"


def library_file() -> Path:
    """Where the shared object is, if it was built."""
    return Path(__file__).with_name("_native.so")


def switched_off() -> bool:
    """The user wants the kernels left out."""
    return os.environ.get(SWITCH, "1") == "0"
