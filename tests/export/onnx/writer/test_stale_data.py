"""Replacing an ONNX file removes the weights that it wrote, and no other file."""

from pathlib import Path

import pytest

from normfuse.export.onnx.writer.save import data_files, drop_stale

onnx = pytest.importorskip("onnx")


def _write(path: Path, *places: str) -> None:
    """An ONNX file whose weights stand at `places`."""
    weights = []
    for i, place in enumerate(places):
        tensor = onnx.TensorProto(name=f"w{i}", data_type=1, dims=[1], data_location=1)
        tensor.external_data.add(key="location", value=place)
        weights.append(tensor)
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], weights)).SerializeToString())


def _replaced(path: Path) -> None:
    """As an export does: what the old file names, a new file, then what is stale."""
    before = data_files(path)
    _write(path)
    drop_stale(before, path)


def test_own_weights_go(tmp_path: Path) -> None:
    data = tmp_path / "m.onnx.0123abcd.data"
    data.write_text("old")
    _write(tmp_path / "m.onnx", data.name)
    _replaced(tmp_path / "m.onnx")
    assert not data.exists()


@pytest.mark.parametrize(
    "name", ["notes.txt", "shared.data", "m.onnx.data", "other.onnx.0123abcd.data", "m.onnx.0123ABCD.data", "m.onnx.0123abcde.data"]
)
def test_files_of_others_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    _write(tmp_path / "m.onnx", name)
    _replaced(tmp_path / "m.onnx")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("way", ["../m.onnx.0123abcd.data", "{}/m.onnx.0123abcd.data"])
def test_files_elsewhere_stay(tmp_path: Path, way: str) -> None:
    (tmp_path / "inner").mkdir()
    data = tmp_path / "m.onnx.0123abcd.data"
    data.write_text("mine")
    _write(tmp_path / "inner" / "m.onnx", way.format(tmp_path))
    _replaced(tmp_path / "inner" / "m.onnx")
    assert data.read_text() == "mine"


def test_links_stay(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("mine")
    (tmp_path / "m.onnx.0123abcd.data").symlink_to("real")
    _write(tmp_path / "m.onnx", "m.onnx.0123abcd.data")
    _replaced(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.0123abcd.data").read_text() == "mine"


def test_weights_that_a_copy_of_the_model_uses_stay(tmp_path: Path) -> None:
    data = tmp_path / "m.onnx.0123abcd.data"
    data.write_text("shared")
    _write(tmp_path / "m.onnx", data.name)
    _write(tmp_path / "copy.onnx", data.name)
    _replaced(tmp_path / "m.onnx")
    assert data.read_text() == "shared"
