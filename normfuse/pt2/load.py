"""Reading a saved program without running what it says."""

import io
import json
import logging
import shutil
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from normfuse.errors import CaptureError, UsageError
from normfuse.files import as_path
from normfuse.pt2.archive import CONSTANTS, EXTRA, MODEL, WEIGHTS, Archive, not_there, opened, parsed
from normfuse.pt2.payloads import example_inputs, tensors
from normfuse.pt2.problems import Broken, Unsafe
from normfuse.pt2.save import REPORT
from normfuse.pt2.schema import program

if TYPE_CHECKING:
    import torch

__all__ = ["load_program", "read_report"]

_CHUNK = 2**22


def load_program(path: str | Path, *, trust: bool = False) -> "torch.export.ExportedProgram":
    """The program in a `.pt2` file.

    Raises:
        UsageError: there is no such file, it is none, or it may run code and `trust` is off.
        CaptureError: this version of torch cannot read it.
    """
    import torch

    import normfuse.ops  # noqa: F401 - registers what quantized models call

    path = as_path(path)
    source: Path | io.BytesIO = path
    if not trust:
        try:
            with opened(path) as archive:
                source = _copied(archive)
        except Unsafe as e:
            raise UsageError(
                f"{path} could run code when it is loaded ({e}); pass trust=True if you know where it comes from"
            ) from e
        except Broken as e:
            raise UsageError(f"{path} is not a saved ExportedProgram: {e}. Expected a file of torch.export.save") from e
    elif not path.is_file():
        raise not_there(path)
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs a traceback besides raising
    try:
        return torch.export.load(source)
    except Exception as e:
        raise CaptureError(
            f"torch {torch.__version__} cannot read {path}: {type(e).__name__}: {_reason(e)}. Expected a file of torch.export.save"
        ) from e
    finally:
        log.setLevel(level)


def read_report(path: str | Path) -> str | None:
    """The JSON of the report that `save_program` put into a file; None when there is none.

    Raises:
        UsageError: there is no such file, or it is no saved program.
    """
    try:
        with opened(as_path(path)) as archive:
            return archive.read(EXTRA + REPORT).decode("utf-8") if EXTRA + REPORT in archive else None
    except (Broken, Unsafe, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not a saved ExportedProgram: {e}") from e


def _copied(archive: Archive) -> io.BytesIO:
    """An archive of what was checked and nothing else; raw weights are copied, the rest is written anew."""
    if MODEL not in archive:
        raise Unsafe(f"it has no {MODEL}, so it is of an older format that is made of pickles")
    parts = {
        "archive_format": b"pt2",
        "archive_version": archive.read("archive_version"),
        "byteorder": sys.byteorder.encode(),
        ".data/version": b"6\n",
        MODEL: json.dumps(program(parsed(archive.read(MODEL), MODEL), MODEL)).encode(),
    }
    raw: list[str] = []
    for folder in (WEIGHTS, CONSTANTS):
        written, copied = tensors(archive, folder)
        parts |= written
        raw += copied
    parts |= example_inputs(archive)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as made:
        for name, data in parts.items():
            made.writestr(f"archive/{name}", data)
        for name in raw:
            try:
                with archive.open(name) as source, made.open(f"archive/{name}", "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, _CHUNK)
            except (zipfile.BadZipFile, EOFError) as e:
                raise Broken(f"{name} cannot be read ({e})") from e
    buffer.seek(0)
    return buffer


def _reason(e: Exception) -> str:
    """The last line of an error: PyTorch puts whole tracebacks into its messages."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
