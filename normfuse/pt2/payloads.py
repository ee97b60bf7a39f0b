"""Weights, constants and example inputs of a saved program: bytes of tensors, and nothing that is unpickled freely."""

import collections
import io
import json
import math
from typing import Any

from normfuse.pt2.archive import CONSTANTS, INPUTS, WEIGHTS, Archive, parsed
from normfuse.pt2.parts import Maybe, boolean, each, integer_in, mapping, matching, one_of, path, record
from normfuse.pt2.problems import Broken, Unsafe
from normfuse.pt2.schema import DEVICE, SCALAR_TYPE

__all__ = ["example_inputs", "tensors"]

_COUNT = one_of(as_int=integer_in(0, 2**62))
_PREFIX = {WEIGHTS: "weight_", CONSTANTS: "tensor_"}
#: A tensor may repeat its values, as an expanded one does, but not fill memory from a few bytes.
_REPEATED = 2**28
#: Bytes of a value by the number of its dtype in the file: integers, floats, complex numbers, bool, bfloat16, unsigned, float8.
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2, 34: 4, 35: 8} | dict.fromkeys(
    range(29, 34), 1
)


def tensors(archive: Archive, folder: str) -> tuple[dict[str, bytes], list[str]]:
    """The weights or constants in `folder`: members to write anew, and members with raw values to copy.

    Raises:
        Unsafe: one is pickled, or is an object.
        Broken: values are missing, or fewer than their shape needs.
    """
    old = f"{folder}model.pt"  # PyTorch 2.8 and before
    if old in archive:
        found = _weights_only(archive.read(old), old)
        if not isinstance(found, dict) or not all(isinstance(k, str) and _is_tensor(v) for k, v in found.items()):
            raise Unsafe(f"{old} holds more than tensors")
        return {old: _saved({path(k, old): v for k, v in found.items()})}, []
    name = f"{folder}model_{folder.split('/')[1]}_config.json"
    meta = record(
        dtype=SCALAR_TYPE, sizes=each(_COUNT), requires_grad=boolean, device=DEVICE, strides=each(_COUNT), storage_offset=_COUNT,
        layout=integer_in(7, 7),
    )  # fmt: skip
    place = matching(rf"{_PREFIX[folder]}\d{{1,9}}", f"{_PREFIX[folder]}N")
    entry = record(path_name=place, is_param=boolean, use_pickle=boolean, tensor_meta=Maybe(meta))
    config = record(config=mapping(path, entry))(parsed(archive.read(name), name), name)
    dtypes: dict[str, int] = {}
    for key, found in config["config"].items():
        if found["use_pickle"]:
            raise Unsafe(f"{key} in {name} holds more than tensors: it is pickled")
        if found["tensor_meta"] is None:
            raise Broken(f"{name} does not say what {key} is")
        if dtypes.setdefault(found["path_name"], found["tensor_meta"]["dtype"]) != found["tensor_meta"]["dtype"]:
            raise Broken(f"{key} in {name} shares its values with a tensor of another dtype")
        _check_size(key, found["tensor_meta"], archive.size(folder + found["path_name"]))
    return {name: json.dumps(config).encode()}, [folder + p for p in dtypes]


def example_inputs(archive: Archive) -> dict[str, bytes]:
    """The inputs that the program was captured with, pickled anew."""
    pickled = archive.read(INPUTS)
    if not pickled:
        return {INPUTS: b""}
    value = _weights_only(pickled, INPUTS)
    if not _is_plain(value):
        raise Unsafe(f"{INPUTS} holds more than tensors")
    return {INPUTS: _saved(value)}


def _check_size(key: str, meta: dict[str, Any], stored: int) -> None:
    sizes, strides = ([n["as_int"] for n in meta[part]] for part in ("sizes", "strides"))
    width = _width(meta["dtype"], key)
    if len(sizes) != len(strides):
        raise Broken(f"{key} has {len(sizes)} sizes and {len(strides)} strides")
    count = math.prod(sizes)
    last = meta["storage_offset"]["as_int"] + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if count and (last + 1) * width > stored:
        raise Broken(f"{key} needs {(last + 1) * width} bytes, the file holds {stored}")
    if stored % width or count * width > max(stored, _REPEATED):
        raise Broken(f"{key} of shape {tuple(sizes)} does not fit the {stored} bytes that the file holds")


def _width(dtype: int, key: str) -> int:
    if dtype not in _BYTES:
        raise Broken(f"{key} has the dtype number {dtype}, which is not known")
    return _BYTES[dtype]


def _weights_only(pickled: bytes, name: str) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(pickled), map_location="cpu", weights_only=True)
    except Exception as e:
        raise Unsafe(f"{name} holds more than tensors") from e


def _saved(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _is_plain(value: Any) -> bool:
    if type(value) in (dict, collections.OrderedDict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if type(value) in (tuple, list):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, complex, str) or _is_tensor(value) or _is_name(value)


def _is_tensor(value: Any) -> bool:
    import torch

    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _is_name(value: Any) -> bool:
    import torch

    return type(value) in (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
