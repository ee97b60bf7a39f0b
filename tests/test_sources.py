"""From the name of a model to a model and its inputs, and every way in which that goes wrong."""

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.declared_inputs import declared_inputs
from normfuse.errors import CaptureError, UsageError
from normfuse.example_inputs import dynamic_shapes, inputs_for, parse_shape, read_inputs
from normfuse.pt2 import load_program
from normfuse.sources import Options, load_source

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
        pytest.param("mine:biuld", UsageError, "did you mean build", id="misspelt factory"),
        pytest.param("mine:value", UsageError, "type int", id="no factory"),
        pytest.param("mine:number", UsageError, "returned an object of type int", id="factory of something else"),
        pytest.param("mine:broken", CaptureError, "no weights here", id="factory that raises"),
        pytest.param("missing.pt2", UsageError, "missing.pt2 does not exist", id="missing file"),
        pytest.param("mine.py", UsageError, "package.module:factory", id="python file"),
        pytest.param("model.safetensors", UsageError, "holds weights", id="safetensors"),
        pytest.param("model.onnx", UsageError, "exported already", id="onnx"),
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


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


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


# -- saved programs ----------------------------------------------------------------------------------------------------


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        b, t, c = x.shape
        z = self.linear(x).reshape(b * t, c)[: (b * t) // 2 + 1]
        return {"z": z, "w": torch.cat([x.flatten(1), y], 1)}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    batch, seq = torch.export.Dim("batch", max=64), torch.export.Dim("seq")
    shapes = {"x": {0: batch, 1: seq}, "y": {0: batch}}
    exported = torch.export.export(Sized().eval(), (torch.randn(2, 6, 8), torch.randn(2, 5)), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "sized.pt2")
    return tmp_path / "sized.pt2"


def rewritten(program: Path, part: str, change: Callable[[bytes], bytes], name: str = "changed.pt2") -> Path:
    """A copy of an archive with one member changed."""
    changed = program.with_name(name)
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, change(data) if member.endswith(part) else data)
    return changed


def test_saved_program_with_dynamic_sizes_loads_without_trust(program: Path) -> None:
    found = load_source(str(program))
    assert isinstance(found.model, torch.export.ExportedProgram)
    assert [tuple(x.shape) for x in found.args] == [(2, 6, 8), (2, 5)]
    assert found.module(torch.randn(3, 4, 8), torch.randn(3, 5))["z"].shape == (7, 8)


def test_example_inputs_of_a_program_survive(program: Path) -> None:
    copy = rewritten(program, "nothing", lambda data: data)  # the copy itself breaks nothing
    assert load_program(copy).example_inputs is not None


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        pytest.param(
            "model.json", lambda d: d.replace(b"torch.ops.aten.linear.default", b"torch.os.mkdir"), "calls", id="operator"
        ),
        pytest.param("model.json", lambda d: d.replace(b"_operator.mul", b"_operator.call"), "calls", id="operator module"),
        pytest.param(
            "model.json",
            lambda d: d.replace(b"torch.ops.aten.linear.default", b"torch.ops.aten.__class__.__base__"),
            "calls",
            id="attribute of an operator",
        ),
        pytest.param(
            "model.json",
            lambda d: d.replace(b"\"Symbol('s17', positive=True, integer=True)\"", b"\"__import__('os').mkdir('pwned')\"", 1),
            "has the size",
            id="size",
        ),
        pytest.param(
            "model.json",
            lambda d: d.replace(b"\"L['y'].size()[0]", b"\"__import__('os').mkdir('pwned') or L['y'].size()[0]"),
            "has the guards",
            id="guard",
        ),
        pytest.param("sample_inputs/model.pt", lambda d: pickle.dumps(Evil()), "more than tensors", id="example inputs"),
        pytest.param(
            "weights/model_weights_config.json",
            lambda d: d.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
            "more than tensors",
            id="weights",
        ),
    ],
)
def test_program_that_could_run_code_needs_trust(program: Path, part: str, change: Callable[[bytes], bytes], reason: str) -> None:
    changed = rewritten(program, part, change)
    with zipfile.ZipFile(program) as a, zipfile.ZipFile(changed) as b:
        assert [a.read(n) for n in a.namelist()] != [b.read(n) for n in b.namelist()], "the attack was not planted"
    with pytest.raises(UsageError, match=f"could run code.*{reason}.*--trust"):
        load_source(str(changed))
    assert not Path("pwned").exists()


def test_program_of_an_older_format_needs_trust(program: Path) -> None:
    with zipfile.ZipFile("old.pt2", "w") as archive:
        archive.writestr("archive/version", "8.8")
    with pytest.raises(UsageError, match="older format"):
        load_source("old.pt2")


def test_file_that_is_no_archive_is_an_error() -> None:
    Path("text.pt2").write_text("hello")
    with pytest.raises(UsageError, match=r"not a saved ExportedProgram"):
        load_source("text.pt2")


def test_archive_of_something_else_is_an_error_even_with_trust() -> None:
    with zipfile.ZipFile("other.pt2", "w") as archive:
        archive.writestr("archive/hello.txt", "hello")
    with pytest.raises(CaptureError, match="cannot read"):
        load_source("other.pt2", Options(trust=True))


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        pytest.param("1x3x8x8", (None, (1, 3, 8, 8), None), id="sizes"),
        pytest.param("7", (None, (7,), None), id="one size"),
        pytest.param("ids=2x5:int64", ("ids", (2, 5), "int64"), id="all parts"),
    ],
)
def test_shapes_are_read(text: str, parsed: tuple[Any, ...]) -> None:
    assert parse_shape(text) == parsed


@pytest.mark.parametrize("text", ["", "1x", "axb", "1,3", "x=1x2:complex64", "1x2:", "=3", "-1x3"])
def test_shapes_that_cannot_be_read_are_errors(text: str) -> None:
    with pytest.raises(UsageError, match="--shape"):
        parse_shape(text)


def test_stated_shapes_make_inputs() -> None:
    found = load_source("mine:build", Options(shapes=("5x4",)))
    assert found.args[0].shape == (5, 4)
    assert found.args[0].dtype is torch.float32
    named = load_source("mine:build", Options(shapes=("input=5x4:float64",))).kwargs
    assert named["input"].dtype is torch.float64


def test_stated_ids_are_known_to_the_embedding() -> None:
    model = nn.Sequential(nn.Embedding(6, 2))
    (ids,), _ = inputs_for(model, Options(shapes=("4x50:int64",)))  # type: ignore[misc]
    assert ids.dtype is torch.int64
    assert set(ids.unique().tolist()) == set(range(6))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"shapes": ("1x4", "input=1x4")}, id="half named"),
        pytest.param({"shapes": ("input=1x4", "input=1x4")}, id="named twice"),
        pytest.param({"shapes": ("image=1x4",)}, id="unknown name"),
        pytest.param({"batch": 0}, id="empty batch"),
    ],
)
def test_impossible_inputs_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        load_source("mine:build", Options(**options))


def test_flags_that_contradict_are_errors() -> None:
    with pytest.raises(UsageError, match="one of them"):
        Options(shapes=("1x4",), input=Path("x.npz"))
    with pytest.raises(UsageError, match="--batch"):
        Options(shapes=("1x4",), batch=2)


def test_inputs_are_read_from_files() -> None:
    x, y = torch.randn(2, 4), torch.arange(3)
    np.savez("named.npz", input=x.numpy())
    np.savez("placed.npz", x.numpy(), y.numpy())
    np.save("one.npy", x.numpy())
    torch.save((x, y), "two.pt")
    torch.save(x, "one.pt")
    from safetensors.torch import save_file

    save_file({"input": x}, "named.safetensors")
    for name in ("named.npz", "named.safetensors"):
        found = read_inputs(Path(name))
        assert isinstance(found, dict)
        assert torch.equal(found["input"], x)
    for name in ("one.npy", "one.pt"):
        (only,) = read_inputs(Path(name))
        assert torch.equal(only, x)
    for name in ("placed.npz", "two.pt"):
        first, second = read_inputs(Path(name))
        assert torch.equal(first, x)
        assert torch.equal(second, y)
    assert torch.equal(load_source("mine:build", Options(input=Path("named.npz"))).kwargs["input"], x)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("x.csv", b"1,2", "expected .npz", id="other kind"),
        pytest.param("x.npz", b"no archive", "cannot be read", id="damaged"),
        pytest.param("x.pt", pickle.dumps(Evil()), "cannot be read as tensors", id="malicious pickle"),
        pytest.param("x.npy", None, "does not exist", id="missing"),
    ],
)
def test_input_files_that_cannot_be_read_are_errors(name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_inputs(Path(name))
    assert not Path("pwned").exists()


def test_input_file_of_objects_is_refused() -> None:
    np.save("objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):
        read_inputs(Path("objects.npy"))
    assert not Path("pwned").exists()


def test_dynamic_axes_of_images_and_tokens() -> None:
    image, ids = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, dtype=torch.int64)
    shapes = dynamic_shapes(("batch", "seq", "height"), (image,), {"ids": ids, "flag": False}, ["image", "ids", "flag"])
    assert {k: {a: d.__name__ for a, d in (v or {}).items()} for k, v in shapes.items()} == {
        "image": {0: "batch", 2: "height"},
        "ids": {0: "batch", 1: "seq"},
        "flag": {},
    }
    assert shapes["image"][0] is shapes["ids"][0]


@pytest.mark.parametrize(
    ("names", "x", "message"),
    [
        pytest.param(("time",), torch.zeros(2, 2), "not known", id="unknown axis"),
        pytest.param(("seq",), torch.zeros(2, 2), "no input has", id="axis that no input has"),
        pytest.param(("batch",), torch.zeros(1, 2), "size 1", id="example of size one"),
    ],
)
def test_dynamic_axes_that_cannot_be_are_errors(names: tuple[str, ...], x: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dynamic_shapes(names, (x,), {}, ["x"])


# -- what models declare -----------------------------------------------------------------------------------------------


def test_module_of_nobody_declares_nothing() -> None:
    assert declared_inputs(nn.Linear(2, 2)) is None


def test_declared_inputs_repeat_and_leave_the_generator_alone() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, depth=1).eval().double()
    state = torch.get_rng_state()
    (a,), _ = declared_inputs(model)  # type: ignore[misc]
    (b,), _ = declared_inputs(model)  # type: ignore[misc]
    assert a.shape == (2, 1, 32, 32)  # as built: neither 224 pixels nor three channels
    assert a.dtype is torch.float64
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    model(a)


def _bert(t: Any) -> nn.Module:
    return t.BertModel(
        t.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    )


def _gpt2(t: Any) -> nn.Module:
    return t.GPT2LMHeadModel(
        t.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=12, bos_token_id=0, eos_token_id=0)
    )


def _t5(t: Any) -> nn.Module:
    return t.T5Model(t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _vit(t: Any) -> nn.Module:
    return t.ViTModel(t.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32))


def _clip(t: Any) -> nn.Module:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}))


def _wav2vec2(t: Any) -> nn.Module:
    return t.Wav2Vec2Model(
        t.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(16,) * 7, vocab_size=40,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "names"),
    [
        pytest.param(_bert, {"input_ids"}, id="encoder"),
        pytest.param(_gpt2, {"input_ids", "use_cache"}, id="decoder"),
        pytest.param(_t5, {"input_ids", "decoder_input_ids", "use_cache"}, id="encoder-decoder"),
        pytest.param(_vit, {"pixel_values"}, id="images"),
        pytest.param(_clip, {"input_ids", "pixel_values"}, id="text and images"),
        pytest.param(_wav2vec2, {"input_values"}, id="audio"),
    ],
)
def test_hugging_face_models_run_on_what_they_declare(build: Callable[[Any], nn.Module], names: set[str]) -> None:
    model = build(pytest.importorskip("transformers")).eval()
    args, kwargs = declared_inputs(model)  # type: ignore[misc]
    assert args == ()
    assert kwargs.keys() == names
    assert all(v.shape[0] == 2 for v in kwargs.values() if isinstance(v, torch.Tensor))
    with torch.no_grad():
        found = model(**kwargs)
    assert "past_key_values" not in found


def test_tokens_fit_the_positions_of_the_model() -> None:
    model = _gpt2(pytest.importorskip("transformers"))
    kwargs = declared_inputs(model, tokens=100)[1]  # type: ignore[index]
    assert kwargs["input_ids"].shape == (2, 10)
