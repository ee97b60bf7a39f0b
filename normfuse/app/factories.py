"""Objects that a command line names: `package.module:attribute`, or `FILE.py:attribute`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from normfuse.errors import CaptureError, UsageError, did_you_mean

__all__ = ["find", "here_on_path"]


def find(text: str, expected: str) -> Any:
    """What `text` names; the current folder, or the folder of the file, is looked in too.

    Args:
        text: `package.module:attribute` or `FILE.py:attribute`; the attribute may have dots.
        expected: what could have been named, for the message.

    Raises:
        UsageError: there is no such module, file or attribute.
        CaptureError: the module cannot be imported.
    """
    name, _, attribute = text.partition(":")
    found: Any = _from_file(Path(name), text) if name.endswith(".py") else _from_module(name, text, expected)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise UsageError(f"{name} has no {attribute!r}{did_you_mean(part, known, most=3)}")
        found = getattr(found, part)
    return found


def here_on_path(folder: str | Path | None = None) -> None:
    """Modules of `folder` (default: the current one) can be imported."""
    where = os.path.abspath(folder or os.getcwd())
    if where not in sys.path and not (folder is None and "" in sys.path):
        sys.path.insert(0, where)


def _from_file(path: Path, text: str) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{text}: there is no file {path}")
    here_on_path(path.parent)
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        if (file := getattr(loaded, "__file__", None)) is not None and Path(file).resolve() == path.resolve():
            return loaded
        name = f"{name}_in_{path.resolve().parent.name}"  # another module has the name already
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as e:
        del sys.modules[name]
        if isinstance(e, Exception):
            raise CaptureError(f"{text}: importing {path} failed: {type(e).__name__}: {e}") from e
        raise
    return module


def _from_module(name: str, text: str, expected: str) -> ModuleType:
    here_on_path()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is not None and (name == e.name or name.startswith(f"{e.name}.")):
            raise UsageError(f"{text}: there is no module {e.name!r} (looked in {os.getcwd()} too); expected {expected}") from e
        raise CaptureError(f"{text}: importing {name} failed: {e}") from e
    except Exception as e:
        raise CaptureError(f"{text}: importing {name} failed: {type(e).__name__}: {e}") from e
