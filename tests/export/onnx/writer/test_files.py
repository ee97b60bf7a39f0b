"""A file appears whole, with its data, or not at all."""

import os
import resource
import signal
import subprocess
import sys

import onnx
import pytest
import torch
from torch import nn

from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx import proven
from normfuse.export.onnx.writer.save import data_files
from tests.export.models import exported, outputs, relative


def _model(seed=0, size=32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, size), nn.ReLU(), nn.Linear(size, 8)).eval()


X = torch.randn(2, 8)


def test_an_existing_file_stays_without_force(tmp_path):
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(UsageError, match="exists already; pass force=True"):
        exported(_model(), (X,), tmp_path)
    assert (tmp_path / "model.onnx").read_text() == "mine"
    exported(_model(), (X,), tmp_path, force=True)
    assert onnx.load(tmp_path / "model.onnx").graph.node


def test_a_missing_folder(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        exported(_model(), (X,), tmp_path / "nowhere")


@pytest.mark.parametrize("force", [False, True])
def test_above_the_tolerance_nothing_is_written(tmp_path, force):
    if force:
        (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(ExportError, match=r"deviates from the module by .* above the bound 0e\+00; nothing was written"):
        exported(nn.Sequential(_model(), nn.LayerNorm(8)).eval(), (X * 3,), tmp_path, tolerance=0.0, force=force)
    assert [p.name for p in tmp_path.iterdir()] == (["model.onnx"] if force else [])


def test_external_data_moves_with_the_file(tmp_path):
    model = _model()
    result = exported(model, (X,), tmp_path, external_data_above=100)
    (data,) = data_files(result.path)
    assert data.name.startswith("model.onnx.")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([data.name, "model.onnx"])
    assert result.bytes == data.stat().st_size + result.path.stat().st_size
    assert relative(next(iter(outputs(result, **{result.inputs[0]: X}).values())), model(X)) < 1e-5


def test_stale_data_goes_and_foreign_data_stays(tmp_path):
    (tmp_path / "other.data").write_text("mine")
    (old,) = data_files(exported(_model(0), (X,), tmp_path, external_data_above=100).path)
    (new,) = data_files(exported(_model(1), (X,), tmp_path, external_data_above=100, force=True).path)
    assert old != new
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["model.onnx", "other.data", new.name])
    exported(_model(2), (X,), tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "other.data"]


def test_the_same_data_file_is_kept(tmp_path):
    for force in (False, True):
        result = exported(_model(), (X,), tmp_path, external_data_above=100, force=force)
    assert all(p.exists() for p in data_files(result.path))


def test_interrupted_in_the_middle(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(proven, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exported(_model(), (X,), tmp_path, external_data_above=100)
    assert not list(tmp_path.iterdir())


_FULL = """
import os, sys, torch
from torch import nn
import resource, signal
from normfuse.errors import UsageError
from normfuse.export import to_onnx
model = nn.Sequential(nn.Linear(64, 4096)).eval()
to_onnx(nn.Linear(8, 8).eval(), sys.argv[1] + "/small.onnx", example_inputs=(torch.randn(2, 8),))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for above in (100, 1_000_000_000):  # the weights beside the file, and in it
    try:
        to_onnx(model, sys.argv[1] + "/model.onnx", example_inputs=(torch.randn(2, 64),), external_data_above=above)
    except UsageError as e:
        if "cannot write" not in str(e) or "too large" not in str(e):
            sys.exit(f"wrong message: {e}")
    else:
        sys.exit(f"no error with external_data_above={above}")
    if os.listdir(sys.argv[1]) != ["small.onnx"]:
        sys.exit(f"something was left: {os.listdir(sys.argv[1])}")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ") or not hasattr(resource, "RLIMIT_FSIZE"), reason="needs POSIX file size limits")
def test_no_space_left(tmp_path):
    """The kernel refuses to write past a limit, as it does on a full disk."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="not writable"):
        exported(_model(), (X,), tmp_path)
    tmp_path.chmod(0o700)


def test_without_verification_the_file_says_so(tmp_path):
    result = exported(_model(), (X,), tmp_path, verify=False)
    assert result.error is None
    assert result.notes == ("not run: verify=False",)
    assert "not run" in str(result)
