"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from normfuse.errors import UsageError
from normfuse.export.decoder.folder import CONFIG, MODEL, check_place, placed


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    for name in (CONFIG, MODEL):
        (path / name).write_text(text)
    return path


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with placed(tmp_path / "out", force=False) as work:
        (work / MODEL).write_text("new")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / MODEL).read_text() == "new"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), placed(tmp_path / "out", force=False) as work:
        (work / MODEL).write_text("half")
        raise ValueError("broken")
    with pytest.raises(UsageError, match="No space left"), placed(tmp_path / "out", force=False) as work:
        (work / MODEL).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_by_force_alone(tmp_path: Path) -> None:
    out = _folder(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="--force"):
        check_place(out, force=False)
    (out / "stray.data").write_text("old")
    with placed(out, force=True) as work:
        (work / MODEL).write_text("new")
    assert [p.name for p in out.iterdir()] == [MODEL]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_stays_where_the_new_one_fails(tmp_path: Path) -> None:
    out = _folder(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="broken"), placed(out, force=True):
        raise ValueError("broken")
    assert (out / MODEL).read_text() == "old"


def test_places_that_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_text("")
    for place, said in (
        (other, "no folder of a decoder"),
        (tmp_path / "no" / "out", "does not exist"),
        (other / "holiday.jpg", "no folder"),
    ):
        with pytest.raises(UsageError, match=said):
            check_place(place, force=True)
    link = tmp_path / "link"
    link.symlink_to(other)
    with pytest.raises(UsageError, match="no folder"):
        check_place(link, force=True)
