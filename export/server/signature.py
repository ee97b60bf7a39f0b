"""What an ONNX file or a TensorRT engine takes and gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError
from normfuse.export.onnx.inspect import read_model
from normfuse.export.tensorrt.engine import manifest_path, sha256
from normfuse.extras import need

__all__ = ["DTYPES", "Profile", "Signature", "TensorSpec", "of_engine", "of_onnx"]

#: Names that the server has for element types.
DTYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32", "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64", "float16": "TYPE_FP16",
    "float32": "TYPE_FP32", "float64": "TYPE_FP64", "bfloat16": "TYPE_BF16",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: its name in the file.
        dtype: a key of `DTYPES`.
        shape: an int where a size is fixed, the name of the axis where it is not, "" where it has no name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes, -1 where they are not fixed."""
        return tuple(size if isinstance(size, int) else -1 for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(str(size) if size != '' else '?' for size in self.shape)}]"


@dataclass(frozen=True)
class Profile:
    """Sizes that an engine was built for, of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a file, and what else the server must know of it.

    Attributes:
        inputs: without those that have a value in the file.
        outputs: all of them.
        profiles: by input; empty for an ONNX file.
        plugins: names of the plugins that an engine needs.
        side_files: files beside it that belong to it.
        tensorrt: the version that built an engine, where its manifest tells.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    side_files: tuple[Path, ...] = ()
    tensorrt: str | None = None

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return self.inputs + self.outputs


def of_onnx(path: Path) -> Signature:
    """The signature of an ONNX file; weights are not read.

    Raises:
        UsageError: the file is missing or is no ONNX model, an input or output is no tensor of numbers, or a file with its weights
            is missing or stands elsewhere.
    """
    onnx = need("onnx", extra="onnx")
    _must_exist(path)
    model = read_model(path)
    constants = {t.name for t in model.graph.initializer}
    return Signature(
        tuple(_onnx_tensor(path, v, onnx) for v in model.graph.input if v.name not in constants),
        tuple(_onnx_tensor(path, v, onnx) for v in model.graph.output),
        side_files=_data_files(path, model),
    )


def _onnx_tensor(path: Path, value: Any, onnx: Any) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise UsageError(f"{path}: {value.name!r} is a {(kind or 'value without a type').replace('_type', '')}, expected a tensor")
    dtype = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    if not value.type.tensor_type.HasField("shape"):
        raise UsageError(f"{path}: {value.name!r} has no shape in the file; expected one, with names for the axes that vary")
    shape = tuple(d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param for d in value.type.tensor_type.shape.dim)
    return _checked(path, TensorSpec(value.name, dtype, shape))


def _data_files(path: Path, model: Any) -> tuple[Path, ...]:
    """Files with weights, which the server needs beside the model under the same names."""
    found = set()
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            found.add(path.parent / entry.value)  # in that folder: the reader has refused others
    for file in found:
        if not file.is_file():
            raise UsageError(f"{path}: its weights {file} are missing; copy them there or export again")
    return tuple(sorted(found))


def _tensors(model: Any) -> Iterator[Any]:
    yield from model.graph.initializer
    pending = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    while pending:
        for attribute in pending.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer
                pending += graph.node


def of_engine(path: Path) -> Signature:
    """The signature of a TensorRT engine, from the manifest beside it.

    Raises:
        UsageError: the engine or its manifest is missing, the manifest does not say what it must, or the engine was built by
            TensorRT for RTX, which the server does not have.
    """
    _must_exist(path)
    manifest = manifest_path(path)
    if not manifest.is_file():
        raise UsageError(
            f"{path} has no manifest: expected {manifest}, which normfuse export writes beside an engine; keep the two together"
        )
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise UsageError(f"{manifest} cannot be read: {e}; export the engine again") from e
    if not isinstance(data, dict):
        raise UsageError(f"{manifest}: found a JSON {type(data).__name__}, expected an object; export the engine again")
    if data.get("module") == "tensorrt_rtx":
        raise UsageError(
            f"{path} was built by TensorRT for RTX, and the server loads engines of TensorRT only. Build it with --flavour "
            "tensorrt on a machine with the server's GPU and version of TensorRT, or give the server the ONNX file; "
            "accelerator='tensorrt' lets it build the engine itself"
        )
    if "sha256" in data and data["sha256"] != sha256(path):
        raise UsageError(
            f"{manifest} belongs to another engine than {path}: the hashes differ; keep the two of one export together"
        )
    inputs = _listed(path, manifest, data, "inputs")
    profiles = {i.name: found for i in inputs if (found := _profile(manifest, data, i)) is not None}
    plugins = data.get("plugins") or {}
    if not isinstance(plugins, (dict, list)):
        raise UsageError(f"{manifest}: 'plugins' is a {type(plugins).__name__}, expected an object; export the engine again")
    version = data.get("version")
    return Signature(
        inputs,
        _listed(path, manifest, data, "outputs"),
        profiles,
        tuple(map(str, plugins)),
        (manifest,),
        version if isinstance(version, str) else None,
    )


def _listed(path: Path, manifest: Path, data: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    entries = data.get(key)
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{manifest}: {key!r} is missing or empty, expected a list of tensors; export the engine again")
    found = []
    for entry in entries:
        match entry:
            case {"name": str(name), "dtype": str(dtype), "shape": list(shape)} if all(type(size) is int for size in shape):
                found.append(_checked(path, TensorSpec(name, dtype, tuple("" if size < 0 else size for size in shape))))
            case _:
                raise UsageError(
                    f"{manifest}: found {json.dumps(entry)[:200]} in {key!r}, expected an object with name, dtype and shape; "
                    "export the engine again"
                )
    return tuple(found)


def _profile(manifest: Path, data: Mapping[str, Any], tensor: TensorSpec) -> Profile | None:
    profiles = data.get("profiles") or {}
    entry = profiles.get(tensor.name) if isinstance(profiles, dict) else profiles
    if entry is None and -1 not in tensor.dims:
        return None
    match entry:
        case {"min": list(low), "opt": list(opt), "max": list(high)}:
            sizes = (low, opt, high)
            if all(len(s) == len(tensor.shape) and all(type(size) is int for size in s) for s in sizes):
                return Profile(tuple(low), tuple(opt), tuple(high))
    raise UsageError(
        f"{manifest}: the profile of input {tensor.name!r} is {json.dumps(entry)[:200]}, expected min, opt and max with "
        f"{len(tensor.shape)} sizes each; export the engine again"
    )


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")


def _checked(path: Path, tensor: TensorSpec) -> TensorSpec:
    if tensor.dtype == "string":
        raise UsageError(f"{path}: {tensor.name!r} is a tensor of strings, expected numbers; leave the tokenizer out of the model")
    if tensor.dtype not in DTYPES:
        raise UsageError(
            f"{path}: {tensor.name!r} has elements of type {tensor.dtype}, which the server does not know; expected one of "
            f"{', '.join(DTYPES)}"
        )
    if 0 in tensor.shape:
        raise UsageError(f"{path}: {tensor} has an axis of size 0, which the server refuses; expected sizes of 1 or more")
    return tensor
