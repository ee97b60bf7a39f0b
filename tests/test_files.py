"""Files appear whole or not at all."""

import os
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from normfuse.errors import UsageError
from normfuse.files import atomic, check_target, spelled


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_block_that_ends_well_leaves_the_file(tmp_path: Path) -> None:
    with atomic(tmp_path / "a.onnx") as path:
        path.write_text("whole")
        assert not (tmp_path / "a.onnx").exists()
    assert (tmp_path / "a.onnx").read_text() == "whole"
    assert _names(tmp_path) == ["a.onnx"]


def test_side_files_move_along(tmp_path: Path) -> None:
    with atomic(tmp_path / "a.onnx") as path:
        path.write_text("graph")
        path.with_name("a.onnx.data").write_text("weights")
    assert _names(tmp_path) == ["a.onnx", "a.onnx.data"]
    assert (tmp_path / "a.onnx.data").read_text() == "weights"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [pytest.param(None, id="new"), pytest.param("old", id="existing")])
def test_block_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException], before: str | None) -> None:
    target = tmp_path / "a.onnx"
    if before is not None:
        target.write_text(before)
    with pytest.raises(error), atomic(target, force=True) as path:
        path.write_text("half")
        raise error
    assert _names(tmp_path) == ([] if before is None else ["a.onnx"])
    assert before is None or target.read_text() == before


def test_existing_target_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "a.onnx"
    target.write_text("old")
    with pytest.raises(UsageError, match=r"a\.onnx exists already; pass force=True"), atomic(target):
        pytest.fail("the block must not run")
    with atomic(target, force=True) as path:
        path.write_text("new")
    assert target.read_text() == "new"


def test_relative_path_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic("a.json") as path:
        path.write_text("{}")
    assert _names(tmp_path) == ["a.json"]


def test_path_is_fixed_when_the_block_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that changes the current folder meanwhile must not move the result."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic(tmp_path / "a.json") as path:
        path.write_text("{}")
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        pytest.param("missing/a.onnx", "the folder .*missing does not exist", id="no-folder"),
        pytest.param("file/a.onnx", "the folder .*file does not exist", id="folder-is-a-file"),
        pytest.param("folder", "it is a folder", id="target-is-a-folder"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_wrong_target_is_found_before_the_work(tmp_path: Path, target: str, message: str, force: bool) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=message):
        check_target(tmp_path / target, force=force)
    assert _names(tmp_path) == ["file", "folder"]


def test_folder_without_permission_is_found_before_the_work() -> None:
    """Run as root, the check is made by a process that has given its rights away."""
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        folder = Path(shared, "locked")
        folder.mkdir(mode=0o555)
        code = f"""
import os
from normfuse.errors import UsageError
from normfuse.files import check_target
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    check_target({str(folder / "a.onnx")!r})
except UsageError as e:
    print(e)
"""
        assert _run(code).strip() == f"cannot write {folder}/a.onnx: the folder {folder} is not writable"


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was written"), atomic(tmp_path / "a.onnx"):
        pass
    assert _names(tmp_path) == []


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk's: the writer meets the same OSError, halfway."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = f"""
import resource, signal
from normfuse.errors import UsageError
from normfuse.files import atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, {limit[1]}))
try:
    with atomic({str(tmp_path / "big.onnx")!r}) as path, path.open("wb", buffering=0) as f:
        for _ in range(1000):
            f.write(bytes(1 << 12))
except UsageError as e:
    print(e)
"""
    said = _run(code)
    assert "cannot write" in said
    assert "File too large" in said
    assert _names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_device_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*a\.onnx: No space left on device"), atomic(tmp_path / "a.onnx"):
        Path("/dev/full").write_text("x")
    assert _names(tmp_path) == []


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """Both write all of their file; the one that ends last is the one that stays."""
    target = tmp_path / "a.onnx"
    with atomic(target, force=True) as first, atomic(target, force=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert _names(tmp_path) == ["a.onnx"]


def test_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Two exports at once: the one that ends last is refused, and its side files go with it."""
    target = tmp_path / "a.onnx"
    with pytest.raises(UsageError, match="exists already"), atomic(target) as path:
        path.write_text("late")
        path.with_name("a.onnx.1.data").write_text("late weights")
        target.write_text("early")
    assert target.read_text() == "early"
    assert _names(tmp_path) == ["a.onnx"]


@pytest.mark.parametrize(("content", "fits"), [("weights", True), ("other", False)])
def test_side_file_that_is_there_is_kept(tmp_path: Path, content: str, fits: bool) -> None:
    """Weights are named by their content: the same ones may be there already, others are not replaced."""
    (tmp_path / "a.onnx.1.data").write_text(content)
    expected = nullcontext() if fits else pytest.raises(UsageError, match=r"a\.onnx\.1\.data exists already")
    with expected, atomic(tmp_path / "a.onnx") as path:
        path.write_text("graph")
        path.with_name("a.onnx.1.data").write_text("weights")
    assert (tmp_path / "a.onnx.1.data").read_text() == content
    assert (tmp_path / "a.onnx").exists() == fits


@pytest.mark.parametrize("supported", [True, False])
def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("no links here")

    if not supported:
        monkeypatch.setattr(os, "link", refuse)
    with atomic(tmp_path / "a") as path:
        path.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    with pytest.raises(UsageError, match="exists already"), atomic(tmp_path / "b") as path:
        path.write_text("late")
        (tmp_path / "b").write_text("early")
    assert (tmp_path / "b").read_text() == "early"
    assert _names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("to", ["nowhere", "a.onnx"])
def test_link_counts_as_a_file(tmp_path: Path, to: str) -> None:
    (tmp_path / "a.onnx").symlink_to(to)
    with pytest.raises(UsageError, match="exists already"):
        check_target(tmp_path / "a.onnx")
    with atomic(tmp_path / "a.onnx", force=True) as path:
        path.write_text("new")
    assert not (tmp_path / "a.onnx").is_symlink()
    assert _names(tmp_path) == ["a.onnx"]


@pytest.mark.parametrize("letters", [240, 255])
def test_long_names_fit(tmp_path: Path, letters: int) -> None:
    with atomic(tmp_path / ("y" * letters)) as path:
        path.write_text("x")
    assert _names(tmp_path) == ["y" * letters]


@pytest.mark.parametrize("name", ["y" * 256, "y" * 5000, "a\0b"])
def test_names_that_cannot_be_are_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot write") as error:
        check_target(tmp_path / name)
    assert len(str(error.value)) < 400


def test_what_a_killed_process_left_is_swept_and_what_lives_is_not(tmp_path: Path) -> None:
    code = f"""
import os, signal
from normfuse.files import atomic
with atomic({str(tmp_path / "a.onnx")!r}) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, check=False)
    assert len(_names(tmp_path)) == 1
    (tmp_path / ".a.onnx.mine").mkdir()  # not ours
    with atomic(tmp_path / "b.onnx") as path:  # another target
        path.write_text("b")
    assert len(_names(tmp_path)) == 3
    with atomic(tmp_path / "a.onnx", force=True) as alive:
        alive.write_text("first")
        with atomic(tmp_path / "a.onnx", force=True) as path:
            path.write_text("second")
        assert alive.exists()
    assert _names(tmp_path) == [".a.onnx.mine", "a.onnx", "b.onnx"]


def test_paths_for_libraries_in_c_are_utf8() -> None:
    assert spelled("ä/ö.onnx") == "ä/ö.onnx"
    assert spelled(Path("a.onnx")) == "a.onnx"
