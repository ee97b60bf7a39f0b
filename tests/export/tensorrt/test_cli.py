"""Engines from the command line: built, looked at, tried out, deployed; mistakes are one line and exit code 2."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_runner import Run, runner

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
pytest.importorskip("onnx")

pytestmark = pytest.mark.slow

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(1, 3, 9, 9),)

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.q, self.k = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 8), nn.Linear(16, 8)
        self.v = nn.Linear(16, width)
        self.last = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x):
        y = self.norm(x) + x
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(y)

def wide():
    return Wide(16), (torch.randn(2, 5, 16),)

def even():
    return Wide(8), (torch.randn(2, 5, 16),)

def pair():
    return build()[0], (torch.randn(2, 3, 9, 9),)
"""
SHAPES = "x=1x3x9x9:4x3x9x9:16x3x9x9"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process, in a folder with `engine_models.py`; (exit code, standard output, standard error)."""
    with runner("engine_models", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


def test_the_whole_way(run: Run, tmp_path: Path) -> None:
    """--shapes alone makes the batch axis dynamic: the model's own example has one item."""
    code, out, err = run("export", "engine_models:build", "-o", "net.engine", "--shapes", SHAPES, "--dtype", "fp16")
    assert code == 0, err
    assert "profile    x 1x3x9x9:4x3x9x9:16x3x9x9" in out
    assert max(map(len, out.splitlines())) <= 80
    assert sorted(p.name for p in tmp_path.glob("net*")) == ["net.engine", "net.engine.json", "net.engine.log"]
    code, out, err = run("inspect", "net.engine")
    assert code == 0, err
    assert "conv" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, err = run("inspect", "net.engine", "--json")
    told = json.loads(out)
    assert told["manifest"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": [-1, 3, 9, 9]}]
    assert told["module"] == "tensorrt_rtx"


def test_json(run: Run) -> None:
    code, out, err = run("export", "engine_models:build", "-o", "net.engine", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["engine"]["profiles"] == {}
    assert told["engine"]["sha256"]
    assert told["report"]["passes"]


def test_dry_run(run: Run, tmp_path: Path) -> None:
    code, out, err = run("export", "engine_models:build", "-o", "net.engine", "--dry-run")
    assert code == 0, err
    assert "tensorrt_rtx" in out
    assert "refused" not in out
    assert not list(tmp_path.glob("net*"))


def test_dry_run_asks_about_what_would_be_built(run: Run, tmp_path: Path) -> None:
    """Values wider than keys: TensorRT's attention refuses them, so that the build spells them out, and so must the dry run.
    Plugins are there with their kernels."""
    for flags in ((), ("--plugins", "rms_norm"), ("--dtype", "fp16")):
        code, out, err = run("export", "engine_models:wide", "-o", "net.engine", "--dry-run", *flags)
        assert code == 0, err
        assert ("RmsNorm" in out) == bool("rms_norm" in flags)
        assert "Attention" not in out
    assert run("export", "engine_models:even", "-o", "net.engine", "--dry-run")[1].count("  Attention ") == 1


def test_an_onnx_file_becomes_an_engine(run: Run) -> None:
    assert run("export", "engine_models:pair", "-o", "net.onnx", "--target", "tensorrt", "--dynamic", "batch")[0] == 0
    code, out, err = run("export", "net.onnx", "-o", "net.engine", "--shapes", SHAPES, "--dtype", "bf16")
    assert code == 0, err
    assert "bf16" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param((), "pass -o NAME.onnx or -o NAME.engine or -o NAME.xml", id="nowhere"),
        pytest.param(("-o", "net.tflite"), "ends in .onnx (an ONNX file), .engine or .plan or .trt", id="suffix"),
        pytest.param(("-o", "net.onnx", "--shapes", SHAPES), "--shapes is for TensorRT engines", id="shapes-of-onnx"),
        pytest.param(("-o", "net.engine", "--target", "portable"), "leave --target out", id="target"),
        pytest.param(("-o", "net.engine", "--int4"), "--int4 is for ONNX files", id="int4"),
        pytest.param(("-o", "net.engine", "--shapes", "x=1x3x9:4x3x9:16x3x9"), "'x' has 4 axes", id="rank"),
        pytest.param(("-o", "net.engine", "--shapes", "image=1x3x9x9:4x3x9x9:16x3x9x9"), "no input 'image'", id="name"),
        pytest.param(("-o", "net.engine", "--shapes", "x=8x3x9x9:4x3x9x9:16x3x9x9"), "min <= opt <= max", id="order"),
        pytest.param(("-o", "net.engine", "--capability", "12"), "numbers like 8.6", id="capability"),
        pytest.param(("-o", "net.engine", "--plugins", "layer_norm"), "no plugin is called 'layer_norm'", id="plugin"),
        pytest.param(("-o", "net.engine", "--plugins", "rms_norm"), "no place for any of them", id="no-place"),
        pytest.param(("-o", "net.engine", "--repository", "repo"), "pass one of them", id="both"),
        pytest.param(("-o", "net.onnx", "--name", "net"), "--name is for --repository", id="name-alone"),
        pytest.param(("-o", "net.onnx", "--model-version", "2"), "--model-version is for --repository", id="version-alone"),
        pytest.param(("--repository", "repo", "--dry-run"), "pass -o NAME.engine", id="dry-repository"),
        pytest.param(("--repository", "repo", "--report", "r.html"), "--report goes with -o", id="report-of-repository"),
        pytest.param(("--repository", "repo", "--shapes", SHAPES), "--shapes is for TensorRT engines", id="shapes-of-server"),
        pytest.param(("--repository", "repo", "--backend", "tensorrt"), "onnxruntime+tensorrt", id="rtx-in-server"),
        pytest.param(("--repository", "repo", "--model-version", "\u00b2"), "a number from 1 on, or next", id="superscript"),
        pytest.param(("--repository", "repo", "--model-version", "two"), "a number from 1 on, or next", id="version"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run("export", "engine_models:build", *arguments)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["engine_models.py"]


def test_passes_of_an_exported_file_are_refused(run: Run) -> None:
    assert run("export", "engine_models:build", "-o", "net.onnx")[0] == 0
    code, _, err = run("export", "net.onnx", "-o", "net.engine", "--passes", "affine")
    assert code == 2
    assert "exported already" in err
    code, _, err = run("export", "net.onnx", "-o", "other.onnx", "--passes", "affine")
    assert code == 2
    assert "--passes starts from the PyTorch model" in err


def test_repository(run: Run, tmp_path: Path) -> None:
    code, _, err = run("export", "engine_models:pair", "--repository", "repo", "--name", "net", "--dynamic", "batch")
    assert code == 0, err
    assert (tmp_path / "repo" / "net" / "1" / "model.onnx").is_file()
    assert 'name: "net"' in (tmp_path / "repo" / "net" / "config.pbtxt").read_text()
    code, _, err = run("export", "engine_models:pair", "--repository", "repo", "--name", "net", "--dynamic", "batch")
    assert code == 2
    assert "exist" in err
    code, _, err = run(
        "export", "engine_models:pair", "--repository", "repo", "--name", "net", "--dynamic", "batch", "--model-version", "next"
    )
    assert code == 0, err
    assert (tmp_path / "repo" / "net" / "2" / "model.onnx").is_file()
