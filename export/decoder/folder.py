"""The folder of a decoder: it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError
from normfuse.export.decoder.encdec_session import files_in
from normfuse.export.decoder.proof import Proof
from normfuse.export.runtimes import Release, spelled_runtime
from normfuse.files import as_path, workspace

__all__ = ["CONFIG", "MANIFEST", "MODEL", "DecoderFolder", "check_place", "copy_kernels", "placed", "write_tokenizer"]

MODEL, CONFIG, MANIFEST = "model.onnx", "genai_config.json", "normfuse.json"


@dataclass(frozen=True)
class DecoderFolder:
    """What an export left behind.

    Attributes:
        path: the folder.
        files: names and sizes in bytes.
        attention: form of the cached attention.
        layers: number of layers.
        rotated: layers whose attention rotates queries and keys itself.
        quantized: what the weights are stored in; None for floats.
        max_length, positions: slots of the cache unless asked otherwise, and what the model knows at most.
        runtime: the oldest ONNX Runtime that runs it rightly.
        proof: what the comparison found; None where it was left out.
        notes: what else the user should know.
    """

    path: Path
    files: dict[str, int]
    attention: str
    layers: int
    rotated: int
    quantized: str | None
    max_length: int
    positions: int
    runtime: Release
    proof: Proof | None
    notes: tuple[str, ...] = ()

    def manifest(self) -> dict[str, Any]:
        """For JSON."""
        proof = None if self.proof is None else dict(vars(self.proof))
        return {
            "path": str(self.path), "files": self.files, "attention": self.attention, "layers": self.layers,
            "rotated": self.rotated, "quantized": self.quantized, "max_length": self.max_length, "positions": self.positions,
            "runtime": spelled_runtime(self.runtime), "proof": proof, "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        size = sum(self.files.values()) / 1e6
        lines = [f"{self.path}: {self.layers} layers, {size:.1f} MB in {len(self.files)} files"]
        lines.append(f"  needs      ONNX Runtime {spelled_runtime(self.runtime)} or newer")
        rotated = f", {self.rotated} with their rotation inside" if self.rotated else ""
        lines.append(f"  attention  {self.layers} {self.attention}{rotated}")
        lines.append(f"  weights    {self.quantized or 'float32'}")
        lines.append(f"  cache      {self.max_length} tokens unless asked otherwise, {self.positions} at most")
        lines.append(f"  proof      {self.proof or 'not run'}")
        return "\n".join([*lines, *(f"  note       {note}" for note in self.notes)])


def check_place(folder: str | Path, *, force: bool) -> Path:
    """`folder` as a path that may be written, checked before long work starts.

    Raises:
        UsageError: what is above it is missing or not writable, or it exists and holds something that may not be replaced.
    """
    path = as_path(folder)
    above = path.absolute().parent
    if not above.is_dir():
        raise UsageError(f"cannot write {path}: the folder {above} does not exist")
    if not os.access(above, os.W_OK):
        raise UsageError(f"cannot write {path}: the folder {above} is not writable")
    if not path.name or path.name == "..":
        raise UsageError(f"cannot write {path}: it is not the name of a folder")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"cannot write {path}: it is no folder")
    if path.is_dir() and any(path.iterdir()):
        if not _is_ours(path):
            raise UsageError(f"{path} is no folder of a decoder: it is not replaced, name another one")
        if not force:
            raise UsageError(f"{path} exists already; pass force=True (on the command line --force) to replace it")
    return path


def _is_ours(path: Path) -> bool:
    """An export wrote the folder."""
    causal = (path / CONFIG).is_file() and (path / MODEL).is_file()
    return causal or ((path / MANIFEST).is_file() and files_in(path) is not None)


@contextmanager
def placed(folder: str | Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder, which becomes `folder` when the block ends well and disappears when it does not.

    Raises:
        UsageError: see `check_place`; also when the disk is full.
    """
    path = check_place(folder, force=force)
    try:
        with workspace(path.absolute()) as work:
            made = work / "new"
            made.mkdir()
            yield made
            check_place(path, force=force)  # it may have appeared meanwhile
            if path.is_dir():
                os.rename(path, work / "old")
                try:
                    os.rename(made, path)
                except OSError:
                    os.rename(work / "old", path)
                    raise
            else:
                os.rename(made, path)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}") from e


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer so that transformers 4, transformers 5 and genai read it."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    held = json.loads(file.read_text(encoding="utf-8"))
    for how_it_was_loaded in ("is_local", "local_files_only", "name_or_path"):
        held.pop(how_it_was_loaded, None)
    if held.get("tokenizer_class") == "TokenizersBackend":  # a name that only transformers 5 knows
        held["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_kernels(library: Path, folder: Path) -> str:
    """Put a copy of normfuse's kernels into the folder; its name. A link that leads out of the folder is refused by readers."""
    name = f"libnormfuse{library.suffix}"
    shutil.copyfile(library, folder / name)
    return name
