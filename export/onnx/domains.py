"""Which domains of ops an ONNX file uses, read from its outermost fields: weights are passed over, nothing is parsed."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

__all__ = ["domains"]

_OPSET_IMPORT = 8  # field of ModelProto; field 1 of an entry is its domain
_FIXED = {1: 8, 5: 4}  # bytes by wire type


def domains(file: str | Path | bytes) -> frozenset[str]:
    """Names of the imported domains, "" for ONNX's own; empty for what is no ONNX file."""
    if isinstance(file, bytes):
        import io

        return _read(io.BytesIO(file), len(file))
    try:
        with Path(file).open("rb") as stream:
            return _read(stream, Path(file).stat().st_size)
    except OSError:
        return frozenset()


def _read(stream: BinaryIO, size: int) -> frozenset[str]:
    found = set()
    while stream.tell() < size:
        key = _varint(stream)
        field, wire = key >> 3, key & 7
        if wire == 0:
            _varint(stream)
        elif wire == 2:
            length = _varint(stream)
            if field == _OPSET_IMPORT:
                found.add(_domain(stream.read(length)))
            else:
                stream.seek(length, 1)
        elif wire in _FIXED:
            stream.seek(_FIXED[wire], 1)
        else:
            return frozenset()
    return frozenset(found)


def _domain(entry: bytes) -> str:
    if entry[:1] != b"\x0a" or len(entry) < 2:  # the name comes first, and short names have one byte of length
        return ""
    return entry[2 : 2 + entry[1]].decode(errors="replace")


def _varint(stream: BinaryIO) -> int:
    value = shift = 0
    while byte := stream.read(1):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    return value
