"""Versions in a model repository, which share a configuration, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from normfuse.errors import UsageError
from normfuse.export.server import check_place, write_repository
from tests.export.server.server_models import config, engine, image, model, tree

pytest.importorskip("onnxruntime")


def test_a_version_that_exists_stays_without_force(tmp_path: Path) -> None:
    served = write_repository(tmp_path / "r", "m", image(tmp_path / "m.onnx"))
    before = (served.path / "1/model.onnx").read_bytes()
    (served.path / "labels.txt").write_text("mine")
    other = model(tmp_path / "o.onnx", {"x": ("float32", ["n", 9])}, {"y": ("x", "float32", ["n", 9])})
    with pytest.raises(UsageError, match=r"m/1 exists already; pass force=True .* or version='next'"):
        write_repository(tmp_path / "r", "m", other)
    assert (served.path / "1/model.onnx").read_bytes() == before
    write_repository(tmp_path / "r", "m", other, force=True)
    assert (served.path / "1/model.onnx").read_bytes() == other.read_bytes()
    assert list(config(served).input[0].dims) == [9]
    assert (served.path / "labels.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["m"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "o.onnx", "r"]


def test_the_next_version_stands_beside_the_old_one(tmp_path: Path) -> None:
    file = image(tmp_path / "m.onnx")
    first = write_repository(tmp_path / "r", "m", file, version="next")
    edited = (first.path / "config.pbtxt").read_text().replace("count: 1", "count: 2")
    second = write_repository(tmp_path / "r", "m", image(tmp_path / "n.onnx", "rows"), version="next")
    assert (first.version, second.version, second.notes) == (1, 2, ())
    (first.path / "config.pbtxt").write_text(edited)
    third = write_repository(tmp_path / "r", "m", file, version=7)
    assert tree(first.path) == ["1/model.onnx", "2/model.onnx", "7/model.onnx", "config.pbtxt"]
    assert third.files == (first.path / "7/model.onnx",)
    assert any("stays as it is" in n for n in third.notes)
    assert (first.path / "config.pbtxt").read_text() == edited
    last = write_repository(tmp_path / "r", "m", file, version="next", force=True)
    assert last.version == 8
    assert config(last).instance_group[0].count == 1


def test_versions_share_one_configuration(tmp_path: Path) -> None:
    file = image(tmp_path / "m.onnx")
    write_repository(tmp_path / "r", "m", file)
    other = model(tmp_path / "o.onnx", {"x": ("float16", ["n", 3, 4])}, {"y": ("x", "float32", ["n", 3, 4])})
    square = model(tmp_path / "q.onnx", {"x": ("float32", ["n", 3, 4])}, {"y": ("x", "float32", ["m", 3, 4])})
    for force in (False, True):
        with pytest.raises(UsageError, match=r"version 1 has x float32 .*, the new one x float16 .* share one configuration"):
            write_repository(tmp_path / "r", "m", other, version=2, force=force)
        with pytest.raises(UsageError, match=r"version 1 has no model\.plan, and all versions of a model have one backend"):
            write_repository(tmp_path / "r", "m", engine(tmp_path / "m.engine"), version=2, force=force)
    with pytest.raises(UsageError, match="allows batches of 64, and the new version takes 0"):
        write_repository(tmp_path / "r", "m", square, version=2)
    assert tree(tmp_path / "r") == ["m/1/model.onnx", "m/config.pbtxt"]


def test_a_new_configuration_must_suit_the_old_versions(tmp_path: Path) -> None:
    small = {"min": [1, 3, 4], "opt": [1, 3, 4], "max": [4, 3, 4]}
    write_repository(tmp_path / "r", "m", engine(tmp_path / "a.engine", profiles={"x": small}))
    large = engine(tmp_path / "b.engine")
    kept = write_repository(tmp_path / "r", "m", large, version=2)
    assert config(kept).max_batch_size == 4
    with pytest.raises(UsageError, match="version 1 cannot be served with the new configuration: max_batch is 32"):
        write_repository(tmp_path / "r", "m", large, version=2, force=True)


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = image(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="it is a file, expected a folder"):
        write_repository(file, "m", file)
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        write_repository(tmp_path / "nowhere/r", "m", file)
    if Path("/proc/self").exists():
        with pytest.raises(UsageError, match="cannot write /proc/normfuse"):
            write_repository("/proc/normfuse", "m", file)
    (tmp_path / "r/m").mkdir(parents=True)
    (tmp_path / "r/m/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is no model of a repository: it has no config\.pbtxt"):
        write_repository(tmp_path / "r", "m", file, force=True)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_repository(tmp_path / "s", "m", file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "r"]
    assert tree(tmp_path / "r") == ["m/notes.txt"]


def test_a_failed_rename_brings_the_old_version_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = write_repository(tmp_path / "r", "m", image(tmp_path / "m.onnx"))
    before = {p: (served.path / p).read_bytes() for p in tree(served.path)}
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "r/m" and Path(source).name != "old":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UsageError, match="Input/output error"):
        write_repository(tmp_path / "r", "m", tmp_path / "m.onnx", instances=5, force=True)
    assert {p: (served.path / p).read_bytes() for p in tree(served.path)} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "r"]


def test_a_wrong_place_is_told_before_the_work(tmp_path: Path) -> None:
    file = image(tmp_path / "m.onnx")
    check_place(tmp_path / "r", "m")
    assert not (tmp_path / "r").exists()
    write_repository(tmp_path / "r", "m", file)
    check_place(tmp_path / "r", "m", version="next")
    check_place(tmp_path / "r", "m", force=True)
    for folder, name, match in (
        (tmp_path / "r", "m", "exists already"),
        (tmp_path / "r", "a/b", "model name"),
        (file, "m", "is a file"),
    ):
        with pytest.raises(UsageError, match=match):
            check_place(folder, name)
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="is not writable"):
        check_place(tmp_path / "locked", "m")
