"""Files that appear whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: without locks nothing can be told to be left over, and nothing is swept
    fcntl = None  # type: ignore[assignment]

__all__ = ["as_path", "atomic", "check_target", "spelled", "workspace"]


def as_path(path: Any) -> Path:
    """Raises a UsageError if that is no path."""
    try:
        return Path(path)
    except TypeError as e:
        raise UsageError(f"expected the path of a file, got {type(path).__name__}") from e


def check_target(path: str | Path, *, force: bool = False) -> Path:
    """`path` as a Path that may be written: its folder exists and is writable, and no file would be lost.

    Long work calls this before it starts, so that a wrong path costs a second and not ten minutes. A link counts as a file,
    wherever it leads.

    Raises:
        UsageError: the folder is missing or not writable, the name is none, the target is a folder, or it exists and `force` is
            off.
    """
    path = as_path(path)
    folder = path.parent
    if not os.path.isdir(folder):
        raise UsageError(f"cannot write {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {path}: the folder {folder} is not writable")
    if os.path.isdir(path):
        raise UsageError(f"cannot write {path}: it is a folder")
    try:
        os.lstat(path)
    except FileNotFoundError:
        return path
    except OSError as e:
        raise UsageError(f"cannot write {_short(path)}: {e.strerror}") from e
    except ValueError as e:  # a letter that this system's file names do not have
        raise UsageError(f"cannot write {str(path)!a}: {e}") from e
    if not force:
        raise _exists(path)
    return path


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists already; pass force=True (on the command line --force) to replace it")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]} ({len(path.name)} letters)"


def spelled(path: str | Path) -> str:
    """The path for libraries in C++, which take text as UTF-8 whatever the locale says that names are made of."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def _umask() -> int:
    """The process's mask; the system tells it only by setting another one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that is removed when the block ends.

    What a killed process left behind is removed by the next block for the same path. Each folder is locked as long as its process
    lives, so that nothing in use is ever touched.
    """
    prefix = f".normfuse-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}-"
    _sweep(path.parent, prefix)
    folder, lock = _locked(prefix, path.parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(prefix: str, parent: Path) -> tuple[Path, int | None]:
    """A new folder and its lock; without a lock where the system has none."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        if fcntl is None:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # swept between its creation and its lock
            continue
        with suppress(OSError):  # not every file system can lock
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(folder):
            return folder, lock
        os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove folders that no living process has locked."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use, or no lock to be had
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


@contextmanager
def atomic(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` when the block ends well and removed when it does not.

    The temporary file stands in a folder of its own, so that side files written next to it (external data of ONNX)
    move with it: everything in that folder ends up beside `path`. Without `force` no file is replaced, also none that appeared
    while the block ran.

    Raises:
        UsageError: see `check_target`; also when the disk is full or the path cannot be written.
    """
    path = check_target(path, force=force)
    try:
        with workspace(path) as folder:
            yield folder / path.name
            if not (folder / path.name).exists():
                raise FileNotFoundError(f"nothing was written to {path}")
            # side files first: whoever sees the main file finds them in place
            parts = sorted(folder.iterdir(), key=lambda p: p.name == path.name)
            for part in parts:
                os.chmod(part, 0o666 & ~_umask())  # some writers make files for their owner only
            if force:
                for part in parts:
                    os.replace(part, path.parent / part.name)
            else:
                _place(parts, path.parent)
    except OSError as e:
        raise UsageError(f"cannot write {_short(path)}: {e.strerror or e}") from e


def _place(parts: list[Path], folder: Path) -> None:
    """Move files to names that are free: all of them or none."""
    made: list[Path] = []
    try:
        for part in parts:
            target = folder / part.name
            try:
                _move(part, target)
                made.append(target)
            except FileExistsError as e:
                # weights are named by their content: another export of the same model may have written them
                if part is parts[-1] or not _same(part, target):
                    raise _exists(target) from e
    except BaseException:
        for target in made:
            target.unlink(missing_ok=True)
        raise


def _move(part: Path, target: Path) -> None:
    """`os.rename`, which fails where `target` exists: on POSIX it would replace it."""
    try:
        os.link(part, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file system without hard links: claim the name, then replace one's own claim
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(part, target)
    else:
        part.unlink()


def _same(a: Path, b: Path) -> bool:
    if b.is_symlink() or not b.is_file() or a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as x, b.open("rb") as y:
        while block := x.read(2**22):
            if block != y.read(2**22):
                return False
    return True
