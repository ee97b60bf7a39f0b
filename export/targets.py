"""The targets that there are: one folder each."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from normfuse.errors import UsageError, did_you_mean
from normfuse.export.runtimes import newest_opset, parse_runtime
from normfuse.export.target import (
    ATTENTION_FORMS,
    FUSED_NORM_OPSET,
    MAX_OPSET,
    MIN_OPSET,
    NATIVE_ATTENTION,
    QUANTIZED_FORMS,
    AttentionForm,
    Folder,
    QuantizedForm,
    Target,
    TargetName,
)

__all__ = [
    "ATTENTION_FORMS",
    "FOLDERS",
    "FUSED_NORM_OPSET",
    "MAX_OPSET",
    "MIN_OPSET",
    "NATIVE_ATTENTION",
    "QUANTIZED_FORMS",
    "TARGETS",
    "AttentionForm",
    "Folder",
    "QuantizedForm",
    "Target",
    "TargetName",
    "attention_forms",
    "folder_of",
    "folder_written",
    "opset_for",
    "target_named",
]

#: The folders of `export/` that are targets, by name.
FOLDERS: dict[str, Folder] = {
    name: cast(Folder, importlib.import_module(f"normfuse.export.{name}.target").FOLDER)
    for name in ("onnx", "tensorrt", "openvino")
}
TARGETS: dict[str, Target] = {t.name: t for folder in FOLDERS.values() for t in folder.targets}


def folder_of(path: str | Path) -> Folder | None:
    """The folder that a file belongs to, by its name; None for a file of no target."""
    suffix = Path(path).suffix
    return next((folder for folder in FOLDERS.values() if suffix in folder.suffixes), None)


def folder_written(path: str | Path) -> Folder:
    """The folder that writes a file of that name.

    Raises:
        UsageError: there is none.
    """
    found = folder_of(path)
    if found is None:
        known = ", ".join(f"{' or '.join(f.suffixes)} ({f.what})" for f in FOLDERS.values())
        raise UsageError(f"-o {path}: expected a name that ends in {known}")
    return found


_CALLED = {"trt": "tensorrt", "ort": "onnxruntime", "onnx": "portable", "standard": "portable"}  # by others


def target_named(name: str) -> Target:
    """The target called `name`.

    Raises:
        UsageError: there is none; the message names the closest one.
    """
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(_CALLED.get(str(name).lower(), name), TARGETS) or "."
    raise UsageError(f"unknown target {name!r}{hint} Known targets: {', '.join(TARGETS)}")


def opset_for(target: Target, opset: int | None, runtime: str | None = None) -> int:
    """`opset`, or the default of `target`; the newest that ONNX Runtime `runtime` reads, where that is older.

    Raises:
        UsageError: torch cannot export to it, or `runtime` does not read it.
    """
    newest = MAX_OPSET if runtime is None else newest_opset(parse_runtime(runtime))
    if opset is None:
        return min(target.opset, newest)
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset!r} is not supported: expected an integer from {MIN_OPSET} to {MAX_OPSET}")
    if opset > newest:
        raise UsageError(
            f"opset {opset}: ONNX Runtime {runtime} reads opsets up to {newest}; leave opset out, or name a newer runtime"
        )
    return opset


def attention_forms(target: Target, opset: int, asked: str, *, native: bool) -> tuple[str, ...]:
    """The forms of attention to try, the plain one first; `native` where the file uses the kernel library anyway.

    Raises:
        UsageError: the form that is `asked` for does not exist there.
    """
    possible = target.attention_at(opset, native=native)
    if asked == "auto":
        return possible if target.runs_here else possible[:1]
    if asked in possible:
        return (asked,)
    if asked == NATIVE_ATTENTION and asked in target.attention:
        reason = "stands in files whose quantized layers are in the native form"
    else:
        reason = (
            f"needs opset {FUSED_NORM_OPSET}"
            if asked in target.attention
            else f"uses ops that target {target.name!r} does not have"
        )
    raise UsageError(f"attention={asked!r} {reason}; possible here: auto, {', '.join(possible)}")
