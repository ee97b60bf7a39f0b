"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normfuse.errors import UsageError

__all__ = ["atomic", "check_target"]


def check_target(path: str | Path, *, force: bool = False) -> Path:
    """`path` as a Path that may be written: its folder exists and is writable, and no file would be lost.

    Long work calls this before it starts, so that a wrong path costs a second and not ten minutes.

    Raises:
        UsageError: the folder is missing or not writable, the target is a folder, or it exists and `force` is off.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {path}: the folder {folder} is not writable")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already; pass force=True (on the command line --force) to replace it")
    return path


def _umask() -> int:
    """The process's mask; the system tells it only by setting another one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def atomic(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` when the block ends well and removed when it does not.

    The temporary file stands in a folder of its own, so that side files written next to it (external data of ONNX)
    move with it: everything in that folder ends up beside `path`.

    Raises:
        UsageError: see `check_target`; also when the disk is full or the path cannot be written.
    """
    path = check_target(path, force=force)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        if not (folder / path.name).exists():
            raise FileNotFoundError(f"nothing was written to {path}")
        # side files first: whoever sees the main file finds them in place
        for part in sorted(folder.iterdir(), key=lambda p: p.name == path.name):
            os.chmod(part, 0o666 & ~_umask())  # some writers make files for their owner only
            os.replace(part, path.parent / part.name)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
