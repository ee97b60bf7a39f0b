"""The versions of a model in a repository: their numbers, and what they must have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from normfuse.errors import UsageError
from normfuse.export.server.batching import max_batch_size
from normfuse.export.server.config import CONFIG, FILE_NAMES
from normfuse.export.server.signature import Signature, of_engine, of_onnx

__all__ = ["agree", "check_limits", "model_folder", "number_of", "read", "same_interface", "shown", "stays"]

_FORCE = "pass force=True (on the command line --force)"


def read(file: Path, backend: str) -> Signature:
    """The signature of a file that `backend` serves."""
    return of_onnx(file) if backend == "onnxruntime" else of_engine(file)


def model_folder(repository: Path, name: str) -> Path:
    """Where the model called `name` stands, or will.

    Raises:
        UsageError: the name is none that clients can use, or something else stands in the way.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"model name {name!r}: expected letters, digits, '.', '_' and '-', a letter or digit first; it is a part of URLs"
        )
    if repository.exists() and not repository.is_dir():
        raise UsageError(f"cannot write {repository}: it is a file, expected a folder")
    if not repository.exists() and not repository.parent.is_dir():
        raise UsageError(f"cannot write {repository}: the folder {repository.parent} does not exist")
    model = repository / name
    if model.exists() and not (model.is_dir() and (not any(model.iterdir()) or (model / CONFIG).is_file())):
        raise UsageError(f"{model} exists and is no model of a repository: it has no {CONFIG}; choose another name or remove it")
    return model


def number_of(model: Path, version: int | str, *, force: bool) -> tuple[int, list[int]]:
    """The number of the new version, and those of the others.

    Raises:
        UsageError: it is no number, or exists and `force` is off.
    """
    there = []
    if model.is_dir():
        there = sorted(int(p.name) for p in model.iterdir() if p.is_dir() and re.fullmatch(r"[1-9]\d*", p.name))
    if version == "next":
        return max(there, default=0) + 1, there
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UsageError(f"version is {version!r}, expected a number of 1 or more, or 'next'")
    if version in there and not force:
        raise UsageError(
            f"{model / str(version)} exists already; {_FORCE} to replace it, or version='next' (--model-version next) to add one"
        )
    return version, [v for v in there if v != version]


def same_interface(a: Signature, b: Signature) -> bool:
    """Whether both have the same inputs and outputs; the names of axes do not count."""
    return all(
        sorted((t.name, t.dtype, t.dims) for t in x) == sorted((t.name, t.dtype, t.dims) for t in y)
        for x, y in ((a.inputs, b.inputs), (a.outputs, b.outputs))
    )


def shown(signature: Signature) -> str:
    """The signature in one line, for messages."""
    return f"{', '.join(map(str, signature.inputs))} -> {', '.join(map(str, signature.outputs))}"


def agree(model: Path, others: Sequence[int], signature: Signature, backend: str) -> list[Signature]:
    """The signatures of the other versions.

    Raises:
        UsageError: one of them has another backend, or other inputs or outputs: one configuration is for all of them.
    """
    found = []
    for number in others:
        file = model / str(number) / FILE_NAMES[backend]
        if not file.is_file():
            raise UsageError(
                f"{model}: version {number} has no {file.name}, and all versions of a model have one backend; choose another name, "
                "or remove the old versions"
            )
        found.append(read(file, backend))
        if not same_interface(found[-1], signature):
            raise UsageError(
                f"{model}: version {number} has {shown(found[-1])}, the new one {shown(signature)}, and all versions of a model "
                "share one configuration; choose another name, or remove the old versions"
            )
    return found


def check_limits(model: Path, others: Sequence[int], signatures: Sequence[Signature], limit: int) -> None:
    """Raises UsageError where an older version does not take batches of `limit`, which a new configuration is to promise."""
    for number, signature in zip(others, signatures, strict=True):
        try:
            max_batch_size(signature, limit)
        except UsageError as e:
            raise UsageError(f"{model}: version {number} cannot be served with the new configuration: {e}") from e


def stays(model: Path, text: str, limit: int, *, force: bool) -> str | None:
    """A note where the configuration that is there is kept, "" where it says the same; None where it is written.

    Raises:
        UsageError: it allows larger batches than the new version takes.
    """
    file = model / CONFIG
    if force or not file.is_file():
        return None
    old = file.read_text(encoding="utf-8")
    if _bare(old) == _bare(text):
        return ""
    stated = re.search(r"^\s*max_batch_size\s*:\s*(\d+)", old, re.MULTILINE)
    if stated and int(stated[1]) > limit:
        raise UsageError(
            f"{file} allows batches of {stated[1]}, and the new version takes {limit}; {_FORCE} to replace the configuration"
        )
    return f"{file} stays as it is; it differs from what this export would write ({_FORCE} to replace it)"


def _bare(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))
