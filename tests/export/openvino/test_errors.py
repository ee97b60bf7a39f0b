"""What can go wrong is told in one line, and leaves nothing behind."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import ExportError, MissingExtra, UsageError
from normfuse.export import to_openvino
from normfuse.export.openvino.graph import layer_counts, provenance, with_facts
from normfuse.export.openvino.options import OpenVinoKeywords, OpenVinoOptions
from normfuse.export.openvino.runtime import opened, read, said
from tests.export.openvino.openvino_models import outputs, written

pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("onnxscript")

X = torch.randn(2, 8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 4).eval()


def test_a_missing_library_has_its_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"pip install 'normfuse\[openvino\]'"):
        written(model(), tmp_path, example_inputs=(X,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.onnx", "model", "model.bin"])
def test_another_suffix_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match=r"names end in \.xml"):
        to_openvino(model(), tmp_path / name, example_inputs=(X,))


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_existing_files_are_kept(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name} exists already"):
        written(model(), tmp_path, example_inputs=(X,))
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(name, "mine")]


def test_what_deviates_is_not_written(tmp_path):
    with pytest.raises(ExportError, match="deviates from the module"):
        written(model(), tmp_path, example_inputs=(X,), tolerance=0.0)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    with pytest.raises(UsageError, match="unknown dtype"):
        written(model(), tmp_path, example_inputs=(X,), dtype="int8")
    with pytest.raises(UsageError, match="possible here: auto, decomposed"):
        written(model(), tmp_path, example_inputs=(X,), attention="mha")
    with pytest.raises(TypeError, match="unexpected keyword argument 'tune'"):
        written(model(), tmp_path, example_inputs=(X,), tune=True)
    assert not list(tmp_path.iterdir())


def test_what_openvino_does_not_read(tmp_path: Path):
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path / "nowhere.xml")
    (tmp_path / "broken.xml").write_text("<net>")
    with pytest.raises(UsageError, match=r"weights in broken\.bin, which is not beside it"):
        read(tmp_path / "broken.xml")
    (tmp_path / "broken.bin").write_bytes(b"")
    with pytest.raises(ExportError, match=r"^OpenVINO [\d.]+ does not read broken\.xml: Unable to read the model"):
        read(tmp_path / "broken.xml")
    for text in ("<net>", "<html><layers/></html>", "no xml"):
        (tmp_path / "broken.xml").write_text(text)
        with pytest.raises(UsageError, match="is not a model of OpenVINO"):
            layer_counts(tmp_path / "broken.xml")


def test_inputs_that_do_not_fit_are_one_line(tmp_path):
    made = written(model(), tmp_path, example_inputs=(X,))
    with pytest.raises(ExportError, match=r"OpenVINO fails on the inputs: .*incompatible") as found:
        outputs(made.path, input=torch.randn(2, 9))
    assert "\n" not in str(found.value)
    assert "src/" not in str(found.value)


def test_a_message_without_sources():
    text = "Exception from src/a.cpp:1:\nCheck 'x' failed at src/b.cpp:2:\nthe reason\n\n"
    assert said(RuntimeError(text)) == "the reason"
    assert said(RuntimeError("Exception from src/a.cpp:1:\n")) == "Exception from src/a.cpp:1:"
    assert said(RuntimeError("")) == "RuntimeError"


@pytest.mark.parametrize("end", ["\t<rt_info />\n", "\t<rt_info>\n\t\t<a value='1' />\n\t</rt_info>\n", ""])
def test_facts_stand_where_openvino_looks_for_them(end, tmp_path):
    file = tmp_path / "m.xml"
    file.write_text(
        with_facts(f"<?xml version='1.0'?>\n<net>\n\t<layers>\n\t</layers>\n\t<edges>\n\t</edges>\n{end}</net>\n", {"a": '<"&'})
    )
    assert provenance(file) == {"normfuse.a": '<"&'}


def test_the_fields_are_written_down_twice():
    assert set(OpenVinoKeywords.__annotations__) == set(OpenVinoOptions.__dataclass_fields__)


def test_a_file_of_somebody_else_can_be_opened(tmp_path):
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([-1, 4], openvino.Type.f32)
    openvino.save_model(openvino.Model([ops.relu(x)], [x], "m"), str(tmp_path / "m.xml"), compress_to_fp16=False)
    session = opened(tmp_path / "m.xml", threads=1)
    (y,) = session.outputs({session.inputs[0].name: torch.tensor([[-1.0, 0.0, 1.0, 2.0]])}).values()
    assert y.tolist() == [[0.0, 0.0, 1.0, 2.0]]
    assert provenance(tmp_path / "m.xml") == {}


def test_normfuse_errors_alone_leave_it(tmp_path):
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x @ x.mT)

    with pytest.raises(normfuse.NormfuseError):
        written(Unknown().eval(), tmp_path, example_inputs=(torch.randn(4, 4),))
    assert not list(tmp_path.iterdir())
