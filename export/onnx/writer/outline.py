"""An ONNX file without its weights: the message says where in the file they stand, and they are not read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normfuse.extras import need

__all__ = ["outline"]

_LARGE = 1024  # bytes; what is smaller stays in the message, as shapes do

# Field numbers of onnx.proto, and wire types of protobuf
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}


def outline(path: Path) -> Any:
    """The `ModelProto` at `path`; large initializers are external data, whose location is the file itself.

    Saved in the same folder it is the same model, for a checker or a reader of graphs, without the memory that weights take.

    Raises:
        ValueError: the bytes are no such message.
    """
    onnx = need("onnx", extra="onnx")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        parts = []
        for number, wire, start, first, end in _fields(content, 0, len(content)):
            if number == _GRAPH and wire == _LENGTH_DELIMITED:
                model = onnx.ModelProto(graph=onnx.GraphProto.FromString(b"".join(_graph(content, first, end, path.name))))
                parts.append(model.SerializeToString())
            else:
                parts.append(content[start:end])
        return onnx.ModelProto.FromString(b"".join(parts))


def _graph(content: mmap.mmap, start: int, end: int, name: str) -> Iterator[bytes]:
    onnx = need("onnx", extra="onnx")
    for number, wire, begin, first, last in _fields(content, start, end):
        weight = _weight(content, first, last) if number == _INITIALIZER and wire == _LENGTH_DELIMITED else None
        if weight is None:
            yield content[begin:last]
            continue
        head, offset, length = weight
        tensor = onnx.TensorProto.FromString(head)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        yield onnx.GraphProto(initializer=[tensor]).SerializeToString()


def _weight(content: mmap.mmap, start: int, end: int) -> tuple[bytes, int, int] | None:
    """The bytes of a tensor but for its values, and where those stand; None for a small one, and for one that stands elsewhere."""
    fields = list(_fields(content, start, end))
    values = [(first, last) for number, _, _, first, last in fields if number == _RAW_DATA]
    if len(values) != 1 or values[0][1] - values[0][0] < _LARGE:
        return None
    head = b"".join(content[begin:last] for number, _, begin, _, last in fields if number != _RAW_DATA)
    return head, values[0][0], values[0][1] - values[0][0]


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Number, wire type, begin, first byte of the value and end of each field of the message between two places."""
    at = start
    while at < end:
        begin = at
        key, at = _varint(content, at, end)
        wire = key & 7
        first = at
        if wire == _VARINT:
            _, at = _varint(content, at, end)
        elif wire == _LENGTH_DELIMITED:
            length, first = _varint(content, at, end)
            at = first + length
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise ValueError(f"no protobuf message: wire type {wire} at byte {begin}")
        if at > end:
            raise ValueError(f"no protobuf message: the field at byte {begin} is cut off")
        yield key >> 3, wire, begin, first, at


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"no protobuf message: the number at byte {at} is cut off")
