"""Small files to serve: ONNX graphs made by hand, engines as their manifests tell, and the server's own schema."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from normfuse.export.server import Served

onnx = pytest.importorskip("onnx")

Shape = Sequence[int | str | None]


def model(
    path: Path,
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, tuple[str, str, Shape]],
    *,
    nodes: Sequence[Any] = (),
    initializers: Sequence[Any] = (),
) -> Path:
    """Write an ONNX file: inputs are (dtype, shape) by name, outputs (input that is copied, dtype, shape)."""
    copies = [onnx.helper.make_node("Cast", [source], [name], to=_code(dtype)) for name, (source, dtype, _) in outputs.items()]
    graph = onnx.helper.make_graph(
        [*nodes, *copies],
        "served",
        [onnx.helper.make_tensor_value_info(n, _code(dtype), shape) for n, (dtype, shape) in inputs.items()],
        [onnx.helper.make_tensor_value_info(n, _code(dtype), shape) for n, (_, dtype, shape) in outputs.items()],
        list(initializers),
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9), str(path))
    return path


def image(path: Path, batch: int | str | None = "batch") -> Path:
    return model(path, {"x": ("float32", [batch, 3, 4])}, {"y": ("x", "float32", [batch, 3, 4])})


def engine(path: Path, **changes: Any) -> Path:
    """An engine of which only the manifest is real."""
    path.write_bytes(b"engine " + path.name.encode())
    manifest = {
        "schema": 1,
        "module": "tensorrt",
        "version": "10.16.0",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "inputs": [{"name": "x", "dtype": "float16", "shape": [-1, 3, 4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [-1, 5]}],
        "profiles": {"x": {"min": [1, 3, 4], "opt": [8, 3, 4], "max": [32, 3, 4]}},
        "plugins": {},
        **changes,
    }
    path.with_name(f"{path.name}.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))
    return path


def parsed(config: Path | str) -> Any:
    """config.pbtxt as a message of the server's schema, which tritonclient carries; unknown fields and wrong types do not parse."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient, which carries the server's schema, is not installed (pip install --no-deps tritonclient)")
    # by its path: the package around it needs grpc
    file = Path(found.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    return text_format.Parse(config if isinstance(config, str) else config.read_text(encoding="utf-8"), schema.ModelConfig())


def config(served: Served) -> Any:
    """The configuration that was written, parsed."""
    return parsed(served.path / "config.pbtxt")


def tree(folder: Path) -> list[str]:
    """Every file below."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def type_name(tensor: Any) -> str:
    """`TYPE_FP32` and the like, of an input or output of a parsed configuration."""
    name: str = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
    return name


def _code(dtype: str) -> int:
    name = {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())
    code: int = onnx.TensorProto.DataType.Value(name)
    return code
