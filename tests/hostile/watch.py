"""What a hostile file must not do: make the marker, import the module that waits for it, write or remove anything."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "pwned"
MODULE = "normfuse_hostile_marker"
#: Python that any attack tries to run; without quotes of one kind, so that it fits into both.
CODE = "__import__('os').mkdir('pwned')"


def plant(folder: Path) -> None:
    """A module whose import makes the marker, and what attacks look up in it."""
    (folder / f"{MODULE}.py").write_text(
        f"import enum, os\nos.path.exists({MARKER!r}) or os.mkdir({MARKER!r})\n"
        "class E(enum.Enum):\n    A = 'y'\ndef f(*args, **kwargs): return None\n"
    )
    importlib.invalidate_caches()


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file, link and folder below `folder` with its size and its bytes."""
    return {
        str(p.relative_to(folder)): (p.lstat().st_mode, p.read_bytes() if p.is_file() and not p.is_symlink() else b"")
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts
    }


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in `folder`, the current one, changes while the block runs, and the module stays unknown."""
    sys.modules.pop(MODULE, None)
    before = contents(folder)
    yield
    assert MODULE not in sys.modules, "a module was imported"
    assert not Path(MARKER).exists(), "code ran"
    assert contents(folder) == before, "something was written or removed"
