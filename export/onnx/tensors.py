"""Where the weights of an ONNX file stand, and whether they can be there."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from normfuse.errors import UsageError
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx

__all__ = ["check_file", "check_tensors", "mentions"]


def check_file(path: Path) -> None:
    """Complain about a file whose weights would be read from outside its folder; the runtime would read any file.

    Raises:
        UsageError: a tensor names such a file, or more values than its bytes hold.
    """
    if mentions(path, b"location"):  # the key without which nothing stands elsewhere
        onnx = need("onnx", extra="onnx")
        try:
            proto = onnx.load(str(path), load_external_data=False)
        except Exception:  # no ONNX file: the runtime says so
            return
        check_tensors(proto, path)


def check_tensors(proto: onnx.ModelProto, path: Path) -> None:
    """As `check_file`, for the message that was read from `path`."""
    for tensor in _tensors(proto.graph):
        _check(tensor, path)
    for function in proto.functions:
        for tensor in _in_nodes(function.node):
            _check(tensor, path)


def mentions(file: Path, text: bytes) -> bool:
    """The bytes of a file contain `text`; also true where that cannot be found out."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text) >= 0
    except ValueError:  # an empty file cannot be mapped
        return False
    except OSError:
        return True


def _check(tensor: onnx.TensorProto, path: Path) -> None:
    name = tensor.name[:80]
    if any(d < 0 for d in tensor.dims):
        raise UsageError(f"{path} is broken: tensor {name!r} has the shape {tuple(tensor.dims)}")
    wanted = math.prod(tensor.dims) * _bits(tensor.data_type) // 8
    stated = {e.key: e.value for e in tensor.external_data}
    if tensor.data_location == 1 or "location" in stated:
        where = stated.get("location", "")
        if not _is_inside(where, path):
            raise UsageError(f"{path} takes tensor {name!r} from {where[:80]!r}: weights must stand in the folder of the file")
        if any(not stated.get(k, "0").isdecimal() for k in ("offset", "length")):
            raise UsageError(f"{path} is broken: tensor {name!r} has no proper place in {where!r}")
        held = int(stated["length"]) if "length" in stated else None
    else:
        held = len(tensor.raw_data) if tensor.HasField("raw_data") else None
    if held is not None and wanted > held:
        raise UsageError(f"{path} is broken: tensor {name!r} of shape {tuple(tensor.dims)} needs {wanted} bytes and has {held}")


def _bits(data_type: int) -> int:
    """Bits of a value at least; 0 where the type is not known or has no fixed size."""
    onnx = need("onnx", extra="onnx")
    kinds = onnx.TensorProto
    if data_type in (kinds.UNDEFINED, kinds.STRING):
        return 0
    name = kinds.DataType.Name(data_type) if data_type in kinds.DataType.values() else ""
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):
        return 4
    if name in ("INT2", "UINT2"):
        return 2
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) if name else 0


def _is_inside(where: str, path: Path) -> bool:
    parts = {*PurePosixPath(where).parts, *PureWindowsPath(where).parts}
    if not where or "\0" in where or ".." in parts or PurePosixPath(where).is_absolute() or PureWindowsPath(where).anchor:
        return False
    found = (path.parent / where).resolve()
    # a cache may keep a file and its weights as links into one other folder
    return any(found.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
                yield from _tensors(graph)
