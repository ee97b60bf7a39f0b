"""Optional libraries, imported when first needed."""

import importlib
from types import ModuleType

from normfuse.errors import MissingExtra

__all__ = ["need"]


def need(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` installs.

    Raises:
        MissingExtra: it is not installed; the message holds the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] != module.split(".")[0]:
            raise  # the library is there, something that it imports is not: its own message says more
        raise MissingExtra(f"{module.split('.')[0]} is not installed; install it with: pip install 'normfuse[{extra}]'") from e
