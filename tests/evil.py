"""An object whose pickle makes a folder called `pwned` when it is loaded by a reader that runs code."""

import os
from typing import Any


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)
