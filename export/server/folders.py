"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from normfuse.errors import UsageError

__all__ = ["replace", "staging"]


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """An empty folder on the file system of `repository`, removed when the block ends.

    Raises:
        UsageError: nothing can be written there, or the disk is full.
    """
    repository, made = repository.resolve(), not repository.exists()
    try:
        repository.mkdir(exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{repository.name}.", dir=_place(repository)))
    except OSError as e:
        raise UsageError(f"cannot write {repository}: {e.strerror or e}") from e
    try:
        yield stage
    except OSError as e:
        raise UsageError(f"cannot write {repository}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made:
            with suppress(OSError):  # it holds a model now
                repository.rmdir()


def _place(repository: Path) -> Path:
    """Beside the repository where that can be: a server that watches it takes every folder inside for a model."""
    parent = repository.parent
    beside = os.access(parent, os.W_OK) and parent.stat().st_dev == repository.stat().st_dev
    return parent if beside and not os.path.ismount(repository) else repository


def replace(source: Path, target: Path, stage: Path) -> None:
    """Rename `source` to `target`; a folder that stood there goes to `stage`, and comes back if the rename fails."""
    if source.is_dir() and target.exists():
        old = Path(tempfile.mkdtemp(dir=stage)) / "old"
        os.rename(target, old)
        try:
            os.rename(source, target)
        except BaseException:
            os.rename(old, target)
            raise
    else:
        os.replace(source, target)
