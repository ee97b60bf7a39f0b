"""From the name of a model to a model and its inputs, and every way in which that goes wrong."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normfuse.app.source_options import Options
from normfuse.app.sources import load_source
from normfuse.errors import CaptureError, UsageError
from tests.evil import Evil

MINE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout())

def with_inputs():
    return build(), (torch.ones(3, 4),)

def with_named_inputs():
    return build(), {"input": torch.ones(3, 4)}

def number():
    return 3

def broken():
    raise RuntimeError("no weights here")

def random():
    return nn.Linear(2, 2, bias=False)

class Nested:
    make = staticmethod(build)

module = nn.Linear(4, 2)
value = 3
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder that holds `mine.py`."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "halfway.py").write_text("import no_such_library", encoding="utf-8")
    (tmp_path / "crooked.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("mine", "halfway", "crooked"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# -- factories ---------------------------------------------------------------------------------------------------------


def test_factory_gives_a_module_in_eval_mode() -> None:
    found = load_source("mine:build")
    assert isinstance(found.model, nn.Sequential)
    assert not any(m.training for m in found.model.modules())
    assert found.name == "mine:build"
    assert not found.has_inputs
    assert found.example_inputs is None


@pytest.mark.parametrize("name", ["mine:module", "mine:Nested.make"])
def test_factory_may_be_a_module_or_an_attribute(name: str) -> None:
    assert isinstance(load_source(name).model, nn.Module)


def test_factory_brings_its_inputs() -> None:
    (x,) = load_source("mine:with_inputs").args
    assert x.shape == (3, 4)
    assert load_source("mine:with_named_inputs").example_inputs.keys() == {"input"}  # type: ignore[union-attr]


def test_random_weights_repeat_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (load_source("mine:random", Options(seed=s)).model.weight for s in (0, 0, 1))  # type: ignore[union-attr]
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        pytest.param("nonsense", UsageError, "names no model: expected timm:NAME", id="no kind"),
        pytest.param("", UsageError, "names no model", id="nothing"),
        pytest.param("timm:", UsageError, "names no model|no module", id="kind without a name"),
        pytest.param("no_such:build", UsageError, "there is no module 'no_such'", id="no such module"),
        pytest.param("mine.deeper:build", UsageError, "there is no module 'mine.deeper'|not a package", id="no such submodule"),
        pytest.param("halfway:build", CaptureError, "no_such_library", id="module that lacks a library"),
        pytest.param("crooked:build", CaptureError, "ZeroDivisionError", id="module that raises"),
        pytest.param("mine:biuld", UsageError, "did you mean 'build'", id="misspelt factory"),
        pytest.param("mine:value", UsageError, "type int", id="no factory"),
        pytest.param("mine:number", UsageError, "returned an object of type int", id="factory of something else"),
        pytest.param("mine:broken", CaptureError, "no weights here", id="factory that raises"),
        pytest.param("missing.pt2", UsageError, "missing.pt2 does not exist", id="missing file"),
        pytest.param("mine.py", UsageError, "FILE.py:factory", id="python file"),
        pytest.param("model.safetensors", UsageError, "holds weights", id="safetensors"),
        pytest.param("model.onnx", UsageError, "exported already", id="onnx"),
        pytest.param("model.xml", UsageError, "exported already", id="openvino"),
        pytest.param("model.plan", UsageError, "exported already", id="engine"),
        pytest.param("hf:nowhere", UsageError, "not a local Hugging Face folder", id="no such folder"),
    ],
)
def test_wrong_source_is_one_clear_error(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_source(source)


# -- libraries ---------------------------------------------------------------------------------------------------------


def test_timm_declares_its_input_size_and_gets_lively_norms() -> None:
    pytest.importorskip("timm")
    found = load_source("timm:resnet10t", Options(batch=3))
    assert found.args[0].shape == (3, 3, 176, 176)
    norms = [m for m in found.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(m.running_mean.std() > 0 and m.weight.std() > 0 and (m.running_var > 0).all() for m in norms)


def test_torchvision_knows_the_crop_of_its_weights() -> None:
    pytest.importorskip("torchvision")
    found = load_source("torchvision:squeezenet1_1", Options(batch=2))
    assert found.args[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_misspelt_model_gets_a_suggestion(library: str) -> None:
    pytest.importorskip(library)
    with pytest.raises(UsageError, match=r"did you mean .*resnet18"):
        load_source(f"{library}:resnte18")


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=40, architectures=["BertModel"]
    )
    folder = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_hugging_face_folder(hugging_face: Path) -> None:
    found = load_source(f"hf:{hugging_face}", Options(batch=2, tokens=8))
    assert type(found.model).__name__ == "BertModel"
    assert found.kwargs["input_ids"].shape == (2, 8)
    assert int(found.kwargs["input_ids"].max()) < 40


def test_hugging_face_folder_without_weights_is_random_with_lively_norms(
    hugging_face: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (hugging_face / "model.safetensors").unlink()
    found = load_source(f"hf:{hugging_face}")
    assert "no weights" in caplog.text
    assert all(m.weight.std() > 0 for m in found.module.modules() if isinstance(m, nn.LayerNorm))


def test_hugging_face_code_is_not_run_without_trust(hugging_face: Path) -> None:
    (hugging_face / "model.safetensors").unlink()
    config = json.loads((hugging_face / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (hugging_face / "config.json").write_text(json.dumps(config))
    (hugging_face / "evil.py").write_text(f"open({str(hugging_face / 'ran')!r}, 'w')")
    with pytest.raises(UsageError, match="--trust"):
        load_source(f"hf:{hugging_face}")
    assert not (hugging_face / "ran").exists()


def test_broken_hugging_face_folder_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CaptureError, match="model_type"):
        load_source("hf:empty")


# -- pickles -----------------------------------------------------------------------------------------------------------


def test_pickled_module_needs_trust() -> None:
    torch.save(nn.Linear(2, 2), "model.pt")
    with pytest.raises(UsageError, match="--trust"):
        load_source("model.pt")
    assert isinstance(load_source("model.pt", Options(trust=True)).model, nn.Linear)


def test_malicious_pickle_is_not_run() -> None:
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match="may run any code"):
        load_source("evil.pt")
    assert not Path("pwned").exists()


def test_state_dict_is_refused_and_told_what_to_do() -> None:
    torch.save(nn.Linear(2, 2).state_dict(), "weights.pth")
    with pytest.raises(UsageError, match=r"a state dict.*package\.module:factory"):
        load_source("weights.pth")
