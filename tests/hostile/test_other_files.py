"""Hostile ONNX files, arrays and checkpoints."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normfuse.app.example_inputs import read_inputs
from normfuse.app.sources import load_source
from normfuse.errors import NormfuseError, UsageError
from normfuse.export.onnx.inspect import op_counts
from normfuse.export.onnx.runtime import session
from tests.evil import Evil
from tests.hostile.watch import plant, untouched

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    Path("models/inside.data").write_bytes(bytes(64))


def model(
    *, at: str | None = None, dims: tuple[int, ...] = (16,), where: str = "initializer", raw: bytes = bytes(64), **place: str
) -> Any:
    """x + w, with w in the file or, by `at`, elsewhere."""
    helper, kinds = onnx.helper, onnx.TensorProto
    w = onnx.TensorProto(name="w", data_type=kinds.FLOAT, dims=dims)
    if at is None:
        w.raw_data = raw
    else:
        w.data_location = kinds.EXTERNAL
        for key, value in {"location": at, **place}.items():
            w.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    if where == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=w))
    x, y = (helper.make_tensor_value_info(n, kinds.FLOAT, [16]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [w] if where == "initializer" else [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_weights_in_the_folder_are_read() -> None:
    Path("models/m.onnx").write_bytes(model(at="inside.data").SerializeToString())
    assert session("models/m.onnx").get_inputs()[0].name == "x"
    assert op_counts("models/m.onnx") == {"Add": 1}


def test_links_into_one_folder_are_followed() -> None:
    """A cache of downloads keeps a file and its weights as links to where they stand."""
    Path("blobs").mkdir()
    Path("blobs/1").write_bytes(model(at="inside.data").SerializeToString())
    Path("blobs/2").write_bytes(bytes(64))
    Path("view").mkdir()
    Path("view/m.onnx").symlink_to("../blobs/1")
    Path("view/inside.data").symlink_to("../blobs/2")
    assert op_counts("view/m.onnx") == {"Add": 1}


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "weights outside": (lambda: model(at="../secret").SerializeToString(), "must stand in the folder"),
    "weights outside, by a detour": (lambda: model(at="a/../../secret").SerializeToString(), "must stand in the folder"),
    "weights at an absolute place": (lambda: model(at="/etc/passwd").SerializeToString(), "must stand in the folder"),
    "weights on a drive": (lambda: model(at="C:\\secret").SerializeToString(), "must stand in the folder"),
    "weights with backslashes": (lambda: model(at="..\\secret").SerializeToString(), "must stand in the folder"),
    "weights nowhere": (lambda: model(at="").SerializeToString(), "must stand in the folder"),
    "weights behind a link": (lambda: model(at="link").SerializeToString(), "must stand in the folder"),
    "constant outside": (lambda: model(at="../secret", where="constant").SerializeToString(), "must stand in the folder"),
    "place before the file": (lambda: model(at="inside.data", offset="-8").SerializeToString(), "no proper place"),
    "fewer bytes than values": (lambda: model(at="inside.data", length="8").SerializeToString(), "needs 64 bytes and has 8"),
    "absurd shape": (lambda: model(dims=(2**40, 2**20)).SerializeToString(), "needs"),
    "shape below zero": (lambda: model(dims=(-4, -4)).SerializeToString(), "shape"),
    "text": (lambda: b"hello", "not an ONNX model|does not take the model"),
    "nothing": (lambda: b"", "not an ONNX model|does not take the model"),
    "half": (lambda: model(raw=bytes(64)).SerializeToString()[:-40], "not an ONNX model|does not take the model"),
    "pickle": (lambda: pickle.dumps(Evil()), "not an ONNX model|does not take the model"),
}


@pytest.mark.parametrize("opened", [session, op_counts])
@pytest.mark.parametrize("name", FILES)
def test_hostile_onnx_file(name: str, opened: Callable[[Path], Any], tmp_path: Path) -> None:
    make, reason = FILES[name]
    Path("models/m.onnx").write_bytes(make())
    Path("models/link").symlink_to("../secret")
    if opened is session and name in ("absurd shape", "shape below zero"):
        reason = "does not take the model|needs|shape"  # nothing stands elsewhere: the runtime finds it
    with untouched(tmp_path), pytest.raises(NormfuseError, match=reason):
        opened(Path("models/m.onnx"))


def _array(name: str) -> bytes:
    buffer = io.BytesIO()
    save = np.save if name.endswith(".npy") else np.savez
    save(buffer, np.array([Evil()], dtype=object))
    return buffer.getvalue()


def _zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("x.npy", _array("x.npy"), id="object in an array"),
        pytest.param("x.npz", _array("x.npz"), id="object in arrays"),
        pytest.param("x.npz", _zip(**{"x.npy": pickle.dumps(Evil())}), id="pickle in arrays"),
        pytest.param("x.npy", pickle.dumps(Evil()), id="pickle called array"),
        pytest.param("x.pt", pickle.dumps(Evil()), id="pickle as inputs"),
        pytest.param("x.pt", _saved([Evil()]), id="saved object as inputs"),
    ],
)
def test_hostile_inputs(name: str, data: bytes, tmp_path: Path) -> None:
    Path(name).write_bytes(data)
    with untouched(tmp_path), pytest.raises(UsageError, match=r"x\.np|x\.pt"):
        read_inputs(Path(name))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(pickle.dumps(Evil()), id="pickle"),
        pytest.param(_saved(Evil()), id="saved object"),
        pytest.param(_saved({"state_dict": Evil()}), id="object in a state dict"),
    ],
)
def test_hostile_checkpoint(suffix: str, data: bytes, tmp_path: Path) -> None:
    Path(f"m{suffix}").write_bytes(data)
    with untouched(tmp_path), pytest.raises(UsageError, match="may run any code"):
        load_source(f"m{suffix}")
