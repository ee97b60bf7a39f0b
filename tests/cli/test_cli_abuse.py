"""Command lines as they should not be: the right exit code, one short error that says the way out, no traceback, nothing left."""

import io
import json
import pickle
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cli_runner import Run, runner
from tests.evil import Evil

MODELS = """
import sys
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)), (torch.randn(2, 8),)

def bare():
    return mlp()[0]

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)

    def forward(self, tokens, mask, flag=True):
        return self.norm(self.embed(tokens)) * mask[..., None]

def text():
    return Text(), {"tokens": torch.randint(0, 20, (2, 6)), "mask": torch.ones(2, 6)}

class Fixed(nn.Module):
    def forward(self, x):
        assert x.shape[1] == 5
        return x.sum(2)

def fixed():
    return Fixed(), (torch.randn(2, 5, 4),)

class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def branch():
    return Branch(), (torch.randn(2, 5),)

class Broken(nn.Module):
    def forward(self, x):
        return x.nothing()

def broken():
    return Broken(), (torch.randn(2),)

class Long(nn.Module):
    def forward(self, x):
        raise ValueError("much to say " * 500 + "\\n" + "line\\n" * 50)

def long():
    return Long(), (torch.randn(2),)

def silent():
    model, x = mlp()
    nn.init.zeros_(model[2].weight), nn.init.zeros_(model[2].bias)
    return model, x

def constant():
    model, x = silent()
    nn.init.ones_(model[2].bias)
    return model, x

def not_finite():
    model, x = mlp()
    nn.init.constant_(model[2].bias, float("nan"))
    return model, x

class Bits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()[0]

    def forward(self, x):
        return self.layers(x).view(torch.int32).view(torch.float32)

def bits():
    return Bits(), (torch.randn(2, 8),)

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))

    def forward(self, images):
        boxes = self.head(self.backbone(images)).flatten(2).transpose(1, 2)
        return [b[b[:, 0] > 0.5] if b[:, 0].max() > 0.5 else b[:1] for b in boxes]

def detector():
    model = Detector()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return model, (torch.randn(2, 3, 8, 8),)

def raises():
    raise ValueError("inside the factory")

def exits():
    sys.exit(7)

def wrong():
    return 3

number = 5

def loader_dies():
    yield (torch.randn(2, 8),)
    raise RuntimeError("the loader died")

def loader_exits():
    yield (torch.randn(2, 8),)
    sys.exit(3)

def loader_of_another_size():
    return [(torch.randn(2, 9),)]

def no_loader():
    return 3

def loader_fails():
    raise OSError("no such data")
"""

TO = "-o x.onnx"
Q = f"export models:mlp {TO} --quantize w8a8"
T = f"export models:text {TO}"
CASES = [
    # sources
    ("inspect ''", "names no model"),
    ("inspect :", "names no model"),
    ("inspect timm:" + "a" * 20_000, "20,00"),
    ("inspect models:" + "a" * 20_000, "letters"),
    ("inspect " + "a" * 20_000, "letters"),
    ("inspect models.py:mpl", "did you mean 'mlp'"),
    ("inspect ./missing.py:mlp", "there is no file missing.py"),
    ("inspect models.py", "FILE.py:factory"),
    ("inspect models:mpl", "did you mean 'mlp'"),
    ("inspect models:number", "expected a function"),
    ("inspect models:wrong", "expected a module"),
    ("inspect models:raises", "inside the factory"),
    ("inspect models:exits", "sys.exit(7)"),
    ("inspect stops:build", "sys.exit('no')"),
    ("inspect syntax:build", "importing syntax failed"),
    ("inspect timm:resnet8x", "did you mean"),
    ("inspect torchvision:resnet19", "did you mean"),
    ("inspect hf:nowhere", "not a local Hugging Face folder"),
    ("optimise models:mlp", "No such command"),
    ("inspect models:mlp --fast", "No such option"),
    # inputs
    (f"export models:bare {TO}", "pass --shape"),
    (f"export models:mlp {TO} --shape axb", "--shape 'axb'"),
    (f"export models:mlp {TO} --shape 99999999999x99999999999", "do not fit into the memory"),
    (f"export models:mlp {TO} --shape 999999x999999", "do not fit into the memory"),
    (f"export models:mlp {TO} --shape 2x9", "does not run on the example inputs (float32[2, 9])"),
    (f"export models:mlp {TO} --shape 2x8:float13", "unknown dtype"),
    (f"export models:mlp {TO} --shape 2x8:int64", "input input is int64, the model computes in float32"),
    (f"export models:mlp {TO} --input wide.npz", "input input is float64, the model computes in float32"),
    (f"export models:mlp {TO} --input numbers.npz", "input input is int64"),
    (f"export models:mlp {TO} --input objects.npz", "cannot be read"),
    (f"export models:mlp {TO} --input strings.npz", "cannot be read"),
    (f"export models:mlp {TO} --input text.npz", "cannot be read"),
    (f"export models:mlp {TO} --input evil.pt", "cannot be read"),
    (f"export models:mlp {TO} --input no.npz", "does not exist"),
    (f"export models:mlp {TO} --input wide.npz --shape 2x8", "one of them"),
    (f"export models:mlp {TO} --shape 2x8 --batch 4", "one of them"),
    (f"export models:mlp {TO} --batch two", "Invalid value"),
    ("inspect timm:resnet10t --batch 0", "at least 1"),
    (f"verify models:mlp --seed {10**25}", "--seed"),
    (f"verify models:mlp --seed -{10**25}", "--seed"),
    ("verify models:mlp --tolerance small", "Invalid value"),
    # axes
    (f"{T} --dynamic time", "INPUT:AXIS=time"),
    (f"{T} --dynamic height", "no input has such an axis"),
    (f"{T} --dynamic words:1=seq", "words is no input; the inputs are tokens (2x6), mask (2x6)"),
    (f"{T} --dynamic flag:0=n", "flag is no input"),
    (f"{T} --dynamic tokens:2=seq", "tokens has 2 axes, 2x6"),
    (f"{T} --dynamic tokens:1=2seq", "cannot be the name"),
    (f"{T} --dynamic tokens:1=seq..5,mask:1=seq", "outside of that range"),
    (f"{T} --dynamic tokens:1=seq:7..9,mask:1=seq", "outside of that range"),
    (f"{T} --dynamic tokens:1=seq..8 --dynamic mask:1=seq..9", "two ranges"),
    (f"{T} --dynamic tokens:1=a,tokens:1=b", "two names"),
    (f"{T} --dynamic tokens:0=n,tokens:1=n", "axes of one name have one size"),
    (f"{T} --dynamic tokens:1=seq:9..4", "leaves nothing to vary"),
    (f"{T} --dynamic tokens:1=seq..{10**30}", "no axis is as long"),
    (f"{T} --dynamic tokens:1=seq", "the model fixes axis 1 of tokens at 6, in Text.forward (models.py:"),
    (f"export models:fixed {TO} --dynamic seq", "the model fixes axis 1 of x at 5, in Fixed.forward (models.py:"),
    (f"export models:bare {TO} --dynamic batch --shape 1x8", "state 2 or more there with --shape"),
    (f"export models:fixed {TO} --shape 1x5x16 --dynamic batch", "state 2 or more there with --shape"),
    (f"export models:bare {TO} --dynamic batch --input one.npz", "state 2 or more there with --input"),
    ("inspect x.onnx --dynamic batch", "has its dynamic axes inside"),
    ("bench models:fixed --dynamic seq --against onnxruntime", "the model fixes axis 1 of x at 5"),
    # capture
    (f"export models:broken {TO}", "nothing"),
    (f"export models:long {TO}", "Long does not run on the example inputs"),
    (f"export models:branch {TO}", "--partial"),
    # passes, targets
    (f"export models:mlp {TO} --target trt", "did you mean 'tensorrt'?"),
    (f"export models:mlp {TO} --target ORT", "did you mean 'onnxruntime'?"),
    (f"export models:mlp {TO} --target openvno", "unknown target"),
    (f"export models:mlp {TO} --opset 9999", "opset 9999"),
    (f"export models:mlp {TO} --passes afine", "did you mean 'affine'"),
    (f"export models:mlp {TO} --keep x", "--quantize"),
    (f"export models:mlp {TO} --quantize int8", "did you mean w8a8"),
    (f"export models:mlp {TO} --quantize INT4", "did you mean w4a8"),
    (f"export models:mlp {TO} --quantize statc", "did you mean 'static'"),
    (f"export models:mlp {TO} --quantize w99a99", "w99a99"),
    # calibration
    (f"{Q} --calibration scalar.npz", "a single number"),
    (f"{Q} --calibration wide.npz --shape 2x9", "does not run"),
    (f"{Q} --calibration strings.npz", "cannot be read"),
    (f"{Q} --calibration no.npz", "does not exist"),
    (f"{Q} --calibration nonsense", "expected a folder of images, a file"),
    (f"{Q} --calibration models.py:loader_dies", "batch 1 could not be loaded: RuntimeError: the loader died"),
    (f"{Q} --calibration syntax:batches", "importing syntax failed"),
    (f"{Q} --calibration models:loader_dies", "batch 1 could not be loaded: RuntimeError: the loader died"),
    (f"{Q} --calibration models:loader_exits", "sys.exit(3)"),
    (f"{Q} --calibration models:loader_fails", "no such data"),
    (f"{Q} --calibration models:no_loader", "an iterable of batches"),
    (f"{Q} --calibration models:loader_of_another_size", "batch 0"),
    # targets
    ("export models:mlp -o nowhere/x.onnx", "does not exist"),
    ("export models:mlp -o there.onnx", "exists already"),
    ("export models:mlp", "pass -o"),
    ("export models:mlp -o x.txt", "ends in .onnx"),
    ("optimize models:mlp -o x.onnx", "ends in .pt2"),
    ("verify models:mlp models.py", "expected a file that ends in .onnx"),
    ("bench models:mlp --against nothing", "unknown engine"),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    (tmp_path / "syntax.py").write_text("def build(:\n")
    (tmp_path / "stops.py").write_text("raise SystemExit('no')\n")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "there.onnx").write_text("mine")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    np.savez(tmp_path / "wide.npz", np.zeros((2, 8)))
    np.savez(tmp_path / "one.npz", np.zeros((1, 8), np.float32))
    np.savez(tmp_path / "numbers.npz", np.zeros((2, 8), np.int64))
    np.savez(tmp_path / "objects.npz", np.array([Evil()], dtype=object))
    np.savez(tmp_path / "strings.npz", np.array(["a", "b"]))
    np.savez(tmp_path / "scalar.npz", np.array(3.0))
    for name in ("syntax", "stops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with runner("models", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


@pytest.mark.parametrize(("line", "message"), [pytest.param(*case, id=f"{i}: {case[0][:70]}") for i, case in enumerate(CASES)])
def test_bad_command_line(run: Run, line: str, message: str) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in Path().iterdir()}
    code, out, err = run(*shlex.split(line))
    said = [text for text in err.splitlines() if text.strip()]
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert "should not happen" not in err
    assert 1 <= len(said) <= 6
    assert max(map(len, said)) <= 600
    assert out == ""
    after = {p.name: p.stat().st_mtime_ns for p in Path().iterdir() if p.name != "__pycache__"}
    assert after == before


# -- what no table says --------------------------------------------------------------------------------------------------


def test_no_folder_for_temporary_files_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    code, _, err = run("bench", "models:mlp")
    assert code == 2
    assert "No usable temporary directory" in err
    assert "set TMPDIR" in err
    assert "should not happen" not in err


@pytest.mark.parametrize("verb", ["optimize models:mlp -o x.pt2", "export models:mlp -o x.onnx", "inspect models:mlp"])
@pytest.mark.parametrize("partial", [True, False])
def test_partial_is_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch, verb: str, partial: bool) -> None:
    from normfuse import api

    original, asked = api.optimize, []

    def spy(*args: object, partial: bool = False, **kwargs: object) -> object:
        asked.append(partial)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(api, "optimize", spy)
    assert run(*verb.split(), *(["--partial"] if partial else []))[0] == 0
    assert asked == [partial]


def test_partial_comes_after_the_sizes_were_tried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse import api

    original, asked = api.optimize, []

    def spy(*args: object, partial: bool = False, **kwargs: object) -> object:
        asked.append(partial)
        return original(*args, **(kwargs | {"dynamic_shapes": None} if partial else kwargs))  # type: ignore[arg-type]

    monkeypatch.setattr(api, "optimize", spy)
    run("inspect", "models:branch", "--partial", "--dynamic", "batch")
    assert asked == [False, True]


@pytest.mark.parametrize("factory", ["silent", "constant", "not_finite"])
def test_verify_fails_where_nothing_was_compared(run: Run, factory: str) -> None:
    code, out, err = run("verify", f"models:{factory}", "--json")
    assert code == 1
    assert not json.loads(out)["holds"]
    assert err.startswith("failed: nothing was compared: the output is ")
    assert run("optimize", f"models:{factory}", "-o", "x.pt2", "-q")[0] == 0
    code, out, err = run("verify", f"models:{factory}", "x.pt2", "--json")
    assert code == 1
    assert not json.loads(out)["holds"]
    assert err.startswith("failed: nothing was compared: the output is ")


def test_verify_holds_without_a_float64_form_and_says_so(run: Run) -> None:
    code, out, _ = run("verify", "models:bits")
    assert code == 0
    assert "not proven in float64" in out
    assert run("verify", "models:bits", "--tolerance", "0", "-q")[0] == 1


def test_parts_of_a_detector(run: Run) -> None:
    code, _, err = run("inspect", "models:detector")
    assert code == 2
    assert "--partial" in err
    code, out, _ = run("inspect", "models:detector", "--partial", "--json")
    assert code == 0
    assert (json.loads(out)["norms_before"], json.loads(out)["norms_after"]) == ({"batch_norm": 2}, {"batch_norm": 0})
    code, out, _ = run("verify", "models:detector", "--partial", "--json")
    assert code == 0
    assert json.loads(out)["report"]["exact"]["max_rel"] <= 1e-9
    for verb, name in (("optimize", "x.pt2"), ("export", "x.onnx")):
        code, out, err = run(verb, "models:detector", "--partial", "-o", name)
        assert (code, out) == (2, "")
        assert "use the module in Python" in err
        assert len(err.splitlines()) == 1
        assert not Path(name).exists()


def test_what_libraries_print_is_kept_for_a_run_that_ends_well() -> None:
    from normfuse.cli.messages import unless_it_fails

    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        with unless_it_fails():
            print("progress")  # noqa: T201
        with pytest.raises(ValueError, match="bad"), unless_it_fails():
            print("a graph of a thousand lines")  # noqa: T201
            raise ValueError("bad")
    assert err.getvalue() == "progress\n"
