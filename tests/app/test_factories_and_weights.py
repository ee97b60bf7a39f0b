"""Sources from files of Python, weights beside a source, and what is said about both."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normfuse.app.source_options import Options
from normfuse.app.sources import load_source
from normfuse.errors import CaptureError, UsageError

MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 2)
    def forward(self, x):
        return self.b(self.a(x).relu())

def make():
    return Net(), (torch.ones(3, 4),)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynet.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "json.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mynet", "broken", "json_in_deeper"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_file_of_python_is_a_source() -> None:
    loaded = load_source("mynet.py:make")
    assert type(loaded.module).__name__ == "Net"
    assert loaded.data == "the example inputs"
    assert loaded.weights == ""
    assert load_source("./mynet.py:make").module.__class__ is loaded.module.__class__  # imported once


def test_file_with_the_name_of_a_module_that_is_loaded_is_itself() -> None:
    import json

    assert type(load_source("deeper/json.py:make").module).__name__ == "Net"
    assert sys.modules["json"] is json


def test_file_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(CaptureError, match=r"importing broken.py failed: ZeroDivisionError"):
        load_source("broken.py:make")
    with pytest.raises(UsageError, match=r"there is no file nowhere\.py"):
        load_source("nowhere.py:make")


@pytest.mark.parametrize("layout", ["plain", "checkpoint", "data parallel", "safetensors"])
def test_weights_go_into_the_model_that_a_factory_builds(layout: str) -> None:
    torch.manual_seed(7)
    state = {k: torch.randn_like(v) for k, v in load_source("mynet.py:make").module.state_dict().items()}
    file = Path("w.safetensors" if layout == "safetensors" else "w.pth")
    if layout == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, file)
    elif layout == "checkpoint":
        torch.save({"epoch": 3, "state_dict": state}, file)
    else:
        torch.save({f"module.{k}" if layout == "data parallel" else k: v for k, v in state.items()}, file)
    loaded = load_source("mynet.py:make", Options(weights=file))
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    assert loaded.weights == str(file)


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    torch.save({"a.weight": torch.zeros(4, 4), "a.bias": torch.zeros(4), "c": torch.zeros(1)}, "other.pth")
    with pytest.raises(UsageError, match=r"2 are missing \(b.weight, b.bias\), 1 are not in it \(c\)"):
        load_source("mynet.py:make", Options(weights=Path("other.pth")))
    state = load_source("mynet.py:make").module.state_dict() | {"b.bias": torch.zeros(3)}
    torch.save(state, "wide.pth")
    with pytest.raises(UsageError, match=r"b.bias is \[3\], expected \[2\]"):
        load_source("mynet.py:make", Options(weights=Path("wide.pth")))
    with pytest.raises(UsageError, match="pass one of them"):
        Options(weights=Path("other.pth"), pretrained=True)


def test_weights_that_could_run_code_are_refused() -> None:
    Path("evil.pth").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(UsageError, match="cannot be read as weights alone"):
        load_source("mynet.py:make", Options(weights=Path("evil.pth")))
    torch.save([1, 2], "list.pth")
    with pytest.raises(UsageError, match="holds no state dict"):
        load_source("mynet.py:make", Options(weights=Path("list.pth")))


def test_trusted_pickle_finds_modules_of_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_source("mynet.py:make").module, "whole.pt")
    monkeypatch.delitem(sys.modules, "mynet")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != Path.cwd()])
    loaded = load_source("whole.pt", Options(trust=True, shapes=("2x4",)))
    assert type(loaded.module).__name__ == "Net"
    assert loaded.data == "random data"


def test_random_weights_are_said_to_be_random() -> None:
    pytest.importorskip("timm")
    loaded = load_source("timm:resnet10t", Options(seed=3))
    assert loaded.weights == "random (seed 3)"
    assert loaded.data == "random data"
    assert isinstance(loaded.module, nn.Module)
