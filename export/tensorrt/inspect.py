"""What can be said of an engine file: from its header and manifest anywhere, from TensorRT's inspector where there is a GPU."""

from __future__ import annotations

import ctypes
import itertools
import struct
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normfuse.errors import ExportError, MissingExtra, UsageError
from normfuse.export.tensorrt.builder import ask
from normfuse.export.tensorrt.engine import Engine, read_manifest, sha256
from normfuse.export.tensorrt.flavour import find
from normfuse.export.tensorrt.layers import kind

__all__ = ["Header", "Inspection", "has_gpu", "header", "inspect_engine"]

# Observed in TensorRT for RTX 1.7: a magic number, the size of the whole plan at byte 16, the version at byte 24.
_MAGIC = {b"vtrt": "tensorrt_rtx", b"ftrt": "tensorrt"}
_SIZE_AT, _VERSION_AT, _HEADER = 16, 24, 32


@dataclass(frozen=True)
class Header:
    """The first bytes of an engine: which module built it, and with TensorRT for RTX its version."""

    module: str
    version: str | None


@dataclass(frozen=True)
class Inspection:
    """Everything that is known of one engine.

    Attributes:
        path: the file.
        header: what its first bytes say.
        engine: what its manifest says; None without one.
        layers: TensorRT's own description of the layers, as its JSON; empty without a GPU.
        notes: what keeps it from running here, and what could not be looked at.
    """

    path: Path
    header: Header
    engine: Engine | None
    layers: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        made = None if self.engine is None else self.engine.manifest()
        return {
            "schema": 1,
            "source": str(self.path),
            "module": self.header.module,
            "version": self.header.version,
            "manifest": made,
            "inspector": self.layers,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Text of at most 80 columns."""
        if self.engine is None:
            lines = [f"{self.path}: {self.header.module} {self.header.version or ''}".rstrip()]
        else:
            lines = [str(self.engine)]
            passes = ", ".join(f"{name} ({count})" for name, count in self.engine.passes if count)
            lines += textwrap.wrap(f"  {'passes':<10} {passes}", 80, subsequent_indent=" " * 13) if passes else []
            lines.append(f"  {'sha256':<10} {self.engine.sha256}")
            lines += ["", *_table(self.engine)]
        for note in self.notes:
            lines += textwrap.wrap(f"note: {note}", 80, subsequent_indent=" " * 6)
        return "\n".join(lines)


def _table(engine: Engine) -> list[str]:
    """One line a fused layer: what it does, the types of its weights, and which operations of which modules are in it."""
    rows = []
    for layer in engine.layers:
        nodes = [node.strip("/").split("/") for node in layer.onnx]
        shared = _shared([n[:-1] for n in nodes])
        inner = " ".join(".".join(n[len(shared) :]) for n in nodes)
        where = f"{'.'.join(shared)}: {inner}" if shared else inner or layer.name
        rows.append((kind(layer), "+".join(dict.fromkeys(layer.constants)), where))
    first, second = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    lines = [f"  {a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows]
    return [line if len(line) <= 80 else f"{line[:77]}..." for line in lines]


def _shared(places: Sequence[Sequence[str]]) -> list[str]:
    """The module that all of them are in."""
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*places, strict=False))
    return [names[0] for names in same]


def inspect_engine(path: str | Path) -> Inspection:
    """Look at the engine at `path`.

    Raises:
        UsageError: there is no such file, it is no engine, it is cut off, or it is not the one that its manifest describes.
    """
    path = Path(path)
    head = header(path)
    engine = read_manifest(path)
    notes: list[str] = []
    if engine is None:
        notes.append("there is no manifest beside the file: signature, layers and passes are not known without a GPU")
    elif (found := sha256(path)) != engine.sha256:
        raise UsageError(
            f"{path} is not the engine that its manifest describes (sha256 {found[:12]}..., expected {engine.sha256[:12]}...): "
            "it is damaged or was replaced; build it again"
        )
    answer: dict[str, Any] = {}
    try:
        module = find(head.module)
        request = {"plan": str(path.resolve()), "gpu": has_gpu(), "plugins": bool(engine and engine.plugins)}
        answer = ask(module, "validity", request)
    except MissingExtra as e:
        notes.append(str(e))
    except ExportError as e:
        notes.append(f"TensorRT could not look at it: {e}")
    built = engine.version if engine is not None else head.version
    here = answer.get("version")
    if built and here and built != here:
        notes.append(f"it was built with {head.module} {built} and runs with that version only; {here} is installed here")
    if answer.get("refused"):
        notes.append(f"TensorRT does not load it on this GPU: {answer['refused']}")
    elif answer and engine is not None and not has_gpu():
        notes.append("there is no GPU here: the layers are those of the builder's log")
    return Inspection(path, head, engine, answer.get("inspector", {}), tuple(notes))


def header(path: Path) -> Header:
    """What the first bytes of the engine at `path` say.

    Raises:
        UsageError: there is no such file, it is no engine, or a part of it is missing.
    """
    try:
        with path.open("rb") as file:
            first = file.read(_HEADER)
            size = path.stat().st_size
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror or e}") from e
    module = _MAGIC.get(first[:4])
    if module is None or len(first) < _HEADER:
        raise UsageError(
            f"{path} is no TensorRT engine: it starts with {first[:4]!r}, expected one of {', '.join(map(repr, _MAGIC))}"
        )
    if module == "tensorrt":
        return Header(module, None)
    (whole,) = struct.unpack_from("<Q", first, _SIZE_AT)
    if size < whole:
        raise UsageError(f"{path} is cut off: {size} of {whole} bytes are there; copy or build it again")
    return Header(module, ".".join(map(str, first[_VERSION_AT : _VERSION_AT + 4])))


def has_gpu() -> bool:
    """A driver of NVIDIA is here, and it finds a GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
