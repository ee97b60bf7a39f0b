"""Writing a program with its report."""

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from normfuse.errors import ExportError
from normfuse.files import atomic
from normfuse.reports.record import record

if TYPE_CHECKING:
    from torch import fx

__all__ = ["REPORT", "save_program"]

#: Name of the report among the extra files of the archive.
REPORT = "normfuse.json"


def save_program(gm: "fx.GraphModule", path: str | Path, *, force: bool = False) -> None:
    """Write what `normfuse.optimize` returned as an `ExportedProgram`, its report inside.

    Raises:
        ExportError: the module cannot be captured again; a module that was traced without example inputs has no shapes.
        UsageError: the file exists and `force` is off, it cannot be written, or somebody has hooked the module.
    """
    import torch

    from normfuse.capture.explained import IN_PARTS, explained
    from normfuse.given.model_kinds import check_hooks
    from normfuse.surroundings import undisturbed

    check_hooks(gm, type(gm).__name__)
    found = record(gm)
    if found is None or not found.has_inputs:
        raise ExportError("a .pt2 file holds a program for given shapes: pass example inputs to optimize")
    try:
        with undisturbed():
            program = torch.export.export(gm, found.args, found.kwargs, dynamic_shapes=found.dynamic_shapes)
    except Exception as e:
        why = explained(type(gm).__name__, e, found.args, found.kwargs)
        raise ExportError(f"{path} cannot be written: {why}{IN_PARTS if found.report.parts else ''}") from e
    with atomic(path, force=force) as partial, _Forgiving(partial) as file:
        torch.export.save(program, cast("IO[bytes]", file), extra_files={REPORT: found.report.to_json()})


class _Forgiving(io.RawIOBase):
    """A new file that takes every write and raises the first failure when it is closed.

    torch's writer aborts the whole process when a write fails, because its destructor writes once more.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)  # torch goes back to the start when it is done

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._failure is None:
            try:
                self._file.write(data)
            except OSError as e:
                self._failure = e
        return size

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._file.close()
        except OSError as e:
            self._failure = self._failure or e
        if self._failure is not None:
            raise self._failure
