"""What this machine remembers between processes: compiled kernels, and what was measured.

Everything here may be deleted at any time; it is made again.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "measurement", "remember"]

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$NORMFUSE_CACHE, or ~/.cache/normfuse ($XDG_CACHE_HOME/normfuse)."""
    if given := os.environ.get("NORMFUSE_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normfuse"
    except RuntimeError:  # no home folder; a folder in /tmp that others can guess is none to load code from
        return _own_folder()


@functools.cache
def _own_folder() -> Path:
    """For this process alone."""
    folder = tempfile.mkdtemp(prefix="normfuse-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def measurement(kind: str, key: Any) -> Any:
    """What was measured for `key` (JSON) on this machine; None if nothing was, or it cannot be read."""
    try:
        kept = json.loads(_file(kind, key).read_text(encoding="utf-8"))
        return kept["found"] if kept["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(kind: str, key: Any, found: Any) -> None:
    """Keep `found` (JSON) for `key`. A file appears whole or not at all; a folder that cannot be written keeps nothing."""
    path = _file(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump({"key": key, "found": found}, f, sort_keys=True)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as e:
        log.info("%s is not kept: %s", kind, e)


def _file(kind: str, key: Any) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / kind / f"{digest}.json"
