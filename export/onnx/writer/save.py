"""ONNX files on disk: one file, or a file and its weights beside it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from normfuse.export.onnx.tensors import mentions
from normfuse.export.onnx.writer.outline import outline
from normfuse.export.onnx.writer.stream import write_streamed
from normfuse.export.onnx.writer.variants import one_name_each
from normfuse.export.options import MAX_PROTO
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["MAX_PROTO", "data_files", "drop_stale", "save_model", "sha256_of_tensors", "weights_sha256"]

log = logging.getLogger(__name__)


def save_model(model: ir.Model, path: Path, *, limit: int = MAX_PROTO) -> None:
    """Write `model` to `path`; weights above `limit` bytes go to `<name>.<hash>.data` beside it.

    The name of the data file follows from its content: a new export never overwrites the data of the file that it replaces,
    so that old and new are complete at every moment.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size <= limit:
        with one_name_each(model):
            write_streamed(model, path)
        return
    name = f"{path.name}.{weights_sha256(model)[:8]}.data"
    with one_name_each(model):
        need("onnx_ir", extra="onnx").save(model, path, external_data=name)
    log.info("weights of %d bytes stand in %s", size, name)


def data_files(path: Path) -> tuple[Path, ...]:
    """The files with weights that the ONNX file `path` refers to; none when it is missing or no ONNX file."""
    try:
        proto = outline(path)
    except Exception:  # whatever the old file was, it has no data that we know of
        return ()
    places = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    # only what stands in the same folder: a path that leads elsewhere is not ours to touch
    return tuple(sorted(path.parent / p for p in places if Path(p).name == p != path.name))


def drop_stale(before: Iterable[Path], path: Path) -> None:
    """Remove the data files `before` of a replaced model that the new one at `path` does not use.

    Only files that `save_model` has named for `path` are removed, and none that another model in the folder mentions.
    """
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    for old in set(before) - set(data_files(path)):
        if ours.fullmatch(old.name) and old.is_file() and not old.is_symlink() and not _mentioned(old, path):
            old.unlink(missing_ok=True)


def _mentioned(data: Path, path: Path) -> bool:
    """Another ONNX file beside `path` takes weights from `data`."""
    return any(mentions(other, os.fsencode(data.name)) for other in path.parent.glob("*.onnx") if other.name != path.name)


def weights_sha256(model: ir.Model) -> str:
    """Hash over names and contents of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        digest.update(name.encode())
        if value.const_value is not None:
            digest.update(value.const_value.tobytes())
    return digest.hexdigest()


def sha256_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Hash over dtypes, shapes and contents of torch tensors."""
    import torch

    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
