"""Options as values: the keywords of the public functions are their fields, and what is wrong is an error where they are made."""

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.app.language.options import DecoderKeywords, DecoderOptions
from normfuse.errors import UsageError
from normfuse.export import EngineOptions, ExportOptions, to_onnx, to_tensorrt
from normfuse.export.onnx.lower import STEPS
from normfuse.export.onnx.quantized.forms import FORMS
from normfuse.export.options import EngineKeywords, ExportKeywords, FileKeywords, PluginName
from normfuse.export.server import write_repository
from normfuse.export.server.options import ServeKeywords, ServeOptions
from normfuse.export.targets import ATTENTION_FORMS, NATIVE_ATTENTION, QUANTIZED_FORMS, TARGETS
from normfuse.export.tensorrt import build_onnx
from normfuse.export.tensorrt.plugins.plans import PLUGINS
from tests.export.models import attention, exported


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (ExportOptions, ExportKeywords),
        (EngineOptions, EngineKeywords),
        (ServeOptions, ServeKeywords),
        (DecoderOptions, DecoderKeywords),
    ],
)
def test_keywords_are_the_fields_and_have_their_types(options: Any, keywords: Any) -> None:
    known = {"torch": torch}
    fields = {f.name for f in dataclasses.fields(options)}
    hints = typing.get_type_hints(options, localns=known)
    assert typing.get_type_hints(keywords, localns=known) == {name: hints[name] for name in fields}


@pytest.mark.parametrize(
    ("function", "options"), [(to_onnx, ExportOptions), (to_tensorrt, EngineOptions), (write_repository, ServeOptions)]
)
def test_help_shows_every_keyword_with_its_default(function: Any, options: Any) -> None:
    shown = inspect.signature(function).parameters
    assert all(shown[f.name].default == f.default for f in dataclasses.fields(options))
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())
    assert all(f"        {f.name}: " in function.__doc__ for f in dataclasses.fields(options))


def test_names_of_plugins_are_typed() -> None:
    assert set(typing.get_args(PluginName)) == set(PLUGINS)


def test_a_file_that_is_built_as_it_is_has_fewer() -> None:
    assert set(FileKeywords.__annotations__) < set(inspect.signature(build_onnx).parameters)
    with pytest.raises(UsageError, match="opset starts from the PyTorch model"):
        build_onnx("a.onnx", "a.engine", EngineOptions(opset=20))
    with pytest.raises(UsageError, match="plugins starts from"):
        build_onnx("a.onnx", "a.engine", EngineOptions(plugins=("rms_norm",)))


def test_a_value_is_as_good_as_keywords_and_those_go_before_it(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval(), torch.randn(2, 8)
    options = ExportOptions(target="portable", opset=18, progress=False)
    by_value = to_onnx(model, tmp_path / "value.onnx", options, example_inputs=(x,))
    by_name = exported(model, (x,), tmp_path, target="portable", opset=18)
    assert (by_value.target, by_value.opset, by_value.ops) == (by_name.target, by_name.opset, by_name.ops)
    both = to_onnx(model, tmp_path / "both.onnx", options, example_inputs=(x,), opset=19)
    assert (both.target, both.opset) == ("portable", 19)


def test_a_name_that_does_not_exist_is_suggested_another() -> None:
    with pytest.raises(TypeError, match=r"to_onnx\(\) got an unexpected keyword argument 'targt'; did you mean 'target'\?"):
        to_onnx(nn.Identity(), "x.onnx", targt="portable")  # type: ignore[call-arg]


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (ExportOptions, {"target": "onnxruntme"}, "did you mean 'onnxruntime'"),
    (ExportOptions, {"opset": 16}, "expected an integer from 17 to 23"),
    (ExportOptions, {"opset": 23, "runtime": "1.20"}, "ONNX Runtime 1.20 reads opsets up to"),
    (ExportOptions, {"runtime": "new"}, "expected a release of ONNX Runtime"),
    (ExportOptions, {"attention": "flash"}, "unknown form of attention 'flash': expected auto, decomposed"),
    (ExportOptions, {"attention": "mha", "target": "portable"}, "uses ops that target 'portable' does not have"),
    (ExportOptions, {"form": "packed"}, "unknown form 'packed'"),
    (ExportOptions, {"dtype": "fp8"}, "unknown dtype 'fp8'"),
    (ExportOptions, {"io_dtype": "high"}, "unknown io_dtype 'high': expected fp32, low"),
    (EngineOptions, {"dtype": "fp64"}, "unknown dtype"),
    (EngineOptions, {"attention": "qkv"}, "does not have"),
    (EngineOptions, {"flavour": "trt"}, "unknown flavour"),
    (EngineOptions, {"capabilities": ["86"]}, "expected numbers like 8.6"),
    (EngineOptions, {"plugins": ["layer_norm"]}, "no plugin is called 'layer_norm'"),
    (EngineOptions, {"shapes": ["x=1xx"]}, "is no shape"),
    (ServeOptions, {"instances": 0}, "expected 1 or more"),
]


@pytest.mark.parametrize(("options", "values", "message"), WRONG)
def test_wrong_values_are_errors_where_they_are_made(options: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(**values)


def test_values_are_spelt_one_way() -> None:
    assert ExportOptions(dtype=torch.float16) == ExportOptions(dtype="half")
    assert EngineOptions(shapes=["x=1x8:2x8:4x8"]) == EngineOptions(shapes={"x": ((1, 8), (2, 8), (4, 8))})
    assert EngineOptions(opset=20).as_file().attention == "decomposed"
    assert EngineOptions().as_file().attention == "attention23"


def test_every_form_is_known_to_some_target() -> None:
    assert tuple(FORMS) == QUANTIZED_FORMS
    assert {form for target in TARGETS.values() for form in target.quantized} == set(FORMS)
    assert {form for target in TARGETS.values() for form in target.attention} == {*ATTENTION_FORMS, NATIVE_ATTENTION}


def test_steps_to_a_file_have_names_of_their_own_which_errors_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)

    def fails(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr("normfuse.export.onnx.lower.name_graph", fails)
    with pytest.raises(Exception, match=r"the ONNX graph cannot be written \(names\): ValueError: broken"):
        exported(attention(), (torch.randn(2, 5, 32),), tmp_path)
