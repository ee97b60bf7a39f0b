"""`normfuse run` and `normfuse evaluate`: files in their runtimes, and accuracy before and after on labelled data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.app.evaluation import Evaluation, classes_of
from normfuse.errors import UsageError
from tests.cli_runner import Run, runner

pytest.importorskip("onnxruntime")

MODELS = """
import torch
from torch import nn

class Net(nn.Sequential):
    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}

def brightness():
    # class 0 where an image is dark, 1 where it is bright
    m = Net(nn.Flatten(), nn.Linear(192, 2))
    with torch.no_grad():
        m[1].weight.copy_(torch.stack([-torch.ones(192), torch.ones(192)]) / 192)
        m[1].bias.zero_()
    return m, (torch.randn(2, 3, 8, 8),)

def upside_down():
    m, x = brightness()
    with torch.no_grad():
        m[1].weight.neg_()
    return m, x

def three():
    m, x = brightness()
    return Net(m, nn.Linear(2, 3)), x

def image_to_image():
    return nn.Sequential(nn.Conv2d(3, 3, 1)), (torch.randn(2, 3, 8, 8),)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with runner("models", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


_exported: dict[str, bytes] = {}  # by model: most tests need the same file


def export(run: Run, source: str, file: str) -> None:
    if source not in _exported:
        code, _, err = run("export", source, "-o", file, "-q")
        assert code == 0, err
        _exported[source] = Path(file).read_bytes()
    Path(file).write_bytes(_exported[source])


def photos(folder: str, names: tuple[str, str] = ("bright", "dark"), count: int = 7) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(count):
        kind = names[i % 2]
        file = Path(folder) / kind / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((9, 9, 3), 200 if i % 2 == 0 else 20, np.uint8)).save(file)


# -- run ---------------------------------------------------------------------------------------------------------------


def test_a_file_gives_what_its_model_gives(run: Run) -> None:
    export(run, "models:brightness", "net.onnx")
    code, _, err = run("optimize", "models:brightness", "-o", "net.pt2", "-q")
    assert code == 0, err
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.save("x.npy", x)
    expected = x.reshape(2, -1).mean(1)
    for file in ("net.onnx", "net.pt2"):
        code, out, err = run("run", file, "--input", "x.npy", "-o", "y.npz", "--force")
        assert (code, err) == (0, "")
        assert "float32[2, 2]" in out
        assert "largest of the first row: " in out
        assert "wrote y.npz" in out
        (name,) = np.load("y.npz").files
        np.testing.assert_allclose(np.load("y.npz")[name][:, 1], expected, atol=1e-6)
        code, out, _ = run("run", file, "--json")
        assert code == 0
        assert json.loads(out)["outputs"][name]["shape"] == [2, 2]
        assert run("run", file, "-q")[:2] == (0, "")
    assert "on random inputs (seed 0)" in run("run", "net.onnx")[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run nowhere.onnx", "nowhere.onnx does not exist"),
        ("run models.py", "expected a file that a runtime runs (.onnx, .engine"),
        ("run timm:resnet18", "expected a file that a runtime runs"),
        ("run net.onnx --input no.npy", "--input no.npy does not exist"),
        ("run net.onnx --input two.npz", "takes 1 inputs"),
        ("run net.onnx --input wide.npy", "ONNX Runtime fails on the inputs"),
        ("run net.onnx -o y.txt", "ends in .npz"),
        ("run net.onnx -o there.npz", "exists already"),
        ("run net.onnx --input x.npy --shape 2x3x8x8", "pass one of them"),
        ("evaluate models:brightness net.onnx", "Missing option '--data'"),
        ("evaluate models:brightness net.onnx --data nowhere", "--data nowhere: does not exist"),
        ("evaluate net.onnx net.onnx --data photos", "name the PyTorch model first"),
        ("evaluate models:brightness models.py --data photos", "expected a file that a runtime runs"),
        ("evaluate models:brightness net.onnx --data x.npy", "expected a folder of images"),
        ("evaluate models:brightness net.onnx --data two.npz", "it holds a, b, and input is missing"),
        ("evaluate models:brightness net.onnx --data empty", "there are no images"),
        ("evaluate models:brightness net.onnx --data plain --max-drop 1", "have no labels"),
        ("evaluate models:brightness net.onnx --data photos --classes no.txt", "--classes no.txt cannot be read"),
        ("evaluate models:brightness net.onnx --data photos --classes names.txt", "'bright' is no class; did you mean 'brigt'"),
        ("evaluate models:brightness net.onnx --data beyond.npz", "'7' is beyond the 2 outputs"),
        ("evaluate models:three net.onnx --data photos", "there are 2 classes (bright, dark, ...) and the model has 3 outputs"),
        ("evaluate models:image_to_image net.onnx --data photos --preprocess unit", "evaluate is for classifiers"),
    ],
)
def test_mistakes_are_one_line(run: Run, line: str, message: str) -> None:
    if "net.onnx" in line:
        export(run, "models:brightness", "net.onnx")
    photos("photos")
    photos("plain", ("", ""))
    Path("empty").mkdir()
    Path("names.txt").write_text("brigt\ndark\n")
    x = np.zeros((2, 3, 8, 8), np.float32)
    np.save("x.npy", x)
    np.save("wide.npy", np.zeros((2, 3, 9, 9), np.float32))
    np.savez("there.npz", x)
    np.savez("two.npz", a=x, b=x)
    np.savez("beyond.npz", input=x, label=np.array([0, 7]))
    code, out, err = run(*line.split())
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert out == ""


# -- evaluate ----------------------------------------------------------------------------------------------------------


def test_accuracy_on_folders_of_images(run: Run) -> None:
    export(run, "models:brightness", "net.onnx")
    photos("photos", ("1", "0"))  # numbers are outputs
    code, out, err = run("evaluate", "models:brightness", "net.onnx", "--data", "photos", "--max-drop", "60")
    assert (code, err) == (0, "")
    assert "7 samples" in out
    assert out.count("100.00 %") == 3
    photos("named")  # bright is 0 in alphabetical order, and output 1 of the model
    code, out, _ = run("evaluate", "models:brightness", "net.onnx", "--data", "named", "--json")
    assert json.loads(out)["accuracy_before"][0] == 0
    Path("names.txt").write_text("dark\nbright\n")
    code, out, _ = run("evaluate", "models:brightness", "net.onnx", "--data", "named", "--classes", "names.txt", "--json")
    assert json.loads(out)["accuracy_after"][0] == 1
    assert max(map(len, run("evaluate", "models:brightness", "net.onnx", "--data", "named")[1].splitlines())) <= 80


def test_another_model_loses_and_that_is_an_exit_code(run: Run) -> None:
    export(run, "models:upside_down", "net.onnx")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((41, 3, 8, 8)).astype(np.float32)
    np.savez("data.npz", input=x, label=(x.mean((1, 2, 3)) > 0).astype(np.int64))
    code, out, err = run("evaluate", "models:brightness", "net.onnx", "--data", "data.npz", "--max-drop", "1", "--json")
    assert code == 1
    assert "at most 1 were allowed" in err
    told = json.loads(out)
    assert (told["samples"], told["accuracy_before"][0], told["accuracy_after"][0], told["agreement"][0]) == (41, 1.0, 0.0, 0.0)
    export(run, "models:brightness", "same.onnx")
    code, _, err = run("evaluate", "models:brightness", "same.onnx", "--data", "data.npz", "--max-drop", "0.5")
    assert code == 3
    assert "more samples would tell" in err


def test_without_labels_the_agreement_is_told(run: Run) -> None:
    export(run, "models:brightness", "net.onnx")
    photos("plain", ("", ""))
    code, out, _ = run("evaluate", "models:brightness", "net.onnx", "--data", "plain")
    assert code == 0
    assert "agreement" in out
    assert "before" not in out


def test_figures_are_those_of_the_definitions() -> None:
    found = Evaluation(samples=100, agree=90, before=80, after=78, only_before=5, only_after=3)
    assert found.drop[0] == pytest.approx(0.02)
    assert found.drop[2] - found.drop[1] == pytest.approx(2 * 1.959964 * (9 - 0.04) ** 0.5 / 100)
    assert found.share(80)[1:] == pytest.approx((0.7112, 0.8666), abs=1e-4)  # Wilson's interval of 80 in 100
    low, high = Evaluation(10, 10, 10, 10).share(10)[1:]
    assert low == pytest.approx(0.7225, abs=1e-4)
    assert high == pytest.approx(1.0)


def test_names_of_classes_are_found() -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"label2id": {"cat": 2, "dog": 0}})()

    assert classes_of(["dog", "cat"], 3, Configured(), None) == [0, 2]
    assert classes_of(["b", "a"], 2, torch.nn.Identity(), None) == [1, 0]
    assert classes_of(["003", "1"], 5, torch.nn.Identity(), None) == [3, 1]
    with pytest.raises(UsageError, match="is beyond the 3 outputs"):
        classes_of([3], 3, torch.nn.Identity(), None)
