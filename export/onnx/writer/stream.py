"""An ONNX file with its weights inside, written one weight after the other.

A library that makes the message first holds all weights two or three times more: in it, as its bytes, and on the way into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from normfuse.errors import ExportError
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["write_streamed"]

_LARGE = 1024  # bytes; what is smaller stands in the message

# Field numbers of onnx.proto, and the wire type of what has a length
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_LENGTH_DELIMITED = 2


def write_streamed(model: ir.Model, path: Path) -> None:
    """Write an `onnx_ir.Model`; the bytes are those of `onnx_ir.save(model, path)`.

    Raises:
        ExportError: a weight has another number of bytes than its shape and dtype say.
    """
    ir = need("onnx_ir", extra="onnx")
    with _without_weights(model) as weights:
        proto = ir.to_proto(model)
    ahead, behind = _around(proto, "graph", _GRAPH)
    before, after = _around(proto.graph, "initializer", _INITIALIZER)
    heads = []
    for tensor in proto.graph.initializer:
        weight = weights.get(tensor.name)
        if weight is not None:
            tensor.ClearField("raw_data")
        head = tensor.SerializeToString()
        heads.append((head if weight is None else head + _key(_RAW_DATA, weight.nbytes), weight))
    lengths = [len(head) + (0 if weight is None else weight.nbytes) for head, weight in heads]
    keys = [_key(_INITIALIZER, length) for length in lengths]
    size = len(before) + sum(map(len, keys)) + sum(lengths) + len(after)
    with path.open("wb") as f:
        f.write(ahead + _key(_GRAPH, size) + before)
        for key, (head, weight) in zip(keys, heads, strict=True):
            f.write(key + head)
            if weight is not None:
                _write(f, weight)
        f.write(after + behind)


def _write(f: BinaryIO, weight: ir.TensorProtocol) -> None:
    data = weight.tobytes()
    if len(data) != weight.nbytes:
        raise ExportError(f"weight {weight.name} has {len(data)} bytes and should have {weight.nbytes}; please report it")
    f.write(data)


@contextmanager
def _without_weights(model: ir.Model) -> Iterator[dict[str, Any]]:
    """The large initializers by name, while tensors without bytes stand in the model for them."""
    ir = need("onnx_ir", extra="onnx")
    nothing = ir.tensor(np.zeros(0, np.uint8))
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= _LARGE
        and value.const_value.dtype != ir.DataType.STRING
        and not isinstance(value.const_value, (ir.ExternalTensor, ir.TensorProtoTensor))
    }
    try:
        for name, weight in weights.items():
            value = model.graph.initializers[name]
            value.const_value = ir.LazyTensor(
                lambda: nothing, weight.dtype, weight.shape, name=name, doc_string=weight.doc_string,
                metadata_props=dict(weight.metadata_props),
            )  # fmt: skip
        yield weights
    finally:
        for name, weight in weights.items():
            model.graph.initializers[name].const_value = weight


def _around(message: Any, field: str, number: int) -> tuple[bytes, bytes]:
    """The bytes of `message` ahead of a field and behind it; fields are written in the order of their numbers."""
    ahead, behind = type(message)(), type(message)()
    for descriptor, _ in message.ListFields():
        if descriptor.name != field:
            one = ahead if descriptor.number < number else behind
            _copy(message, one, descriptor.name)
    return ahead.SerializeToString(), behind.SerializeToString()


def _copy(message: Any, other: Any, field: str) -> None:
    value = getattr(message, field)
    if hasattr(value, "MergeFrom") or hasattr(value, "extend"):
        getattr(other, field).MergeFrom(value)
    else:
        setattr(other, field, value)


def _key(field: int, length: int) -> bytes:
    """What stands in front of the bytes of a field: its number and how many there are."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
