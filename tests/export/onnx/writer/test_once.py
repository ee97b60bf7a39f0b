"""What torch's exporter makes for a file serves the next ones, until something changes."""

import pytest
import torch
from torch import nn

from normfuse.export.onnx.writer.once import made_once
from tests.export.models import exported

registration = pytest.importorskip("torch.onnx._internal.exporter._registration")


@pytest.fixture
def made(monkeypatch):
    """The opsets for which torch compiled its translations, in order."""
    held = registration.ONNXRegistry.from_torchlib
    calls = []

    def from_torchlib(opset_version):
        calls.append(opset_version)
        return held(opset_version=opset_version)

    monkeypatch.setattr(registration.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
    monkeypatch.setattr("normfuse.export.onnx.writer.once._registries", {})
    return calls


def test_a_second_file_is_the_same_and_compiles_nothing(made, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval(), torch.randn(2, 8)
    written = [exported(model, (x,), tmp_path, opset=opset, force=True).path.read_bytes() for opset in (20, 20, 18, 20)]
    assert made == [20, 18]
    assert written[0] == written[1] == written[3] != written[2]


def test_who_reads_translations_may_add_to_its_own(made):
    with made_once():
        first = registration.ONNXRegistry.from_torchlib(opset_version=20)
        first.register_op(torch.ops.aten.relu.default, lambda x: x)
        first.functions["more"] = []
        second = registration.ONNXRegistry.from_torchlib(opset_version=20)
    assert made == [20]
    assert "more" not in second.functions
    assert [d.is_custom for d in first.get_decomps(torch.ops.aten.relu.default)] == [True, False]
    assert [d.is_custom for d in second.get_decomps(torch.ops.aten.relu.default)] == [False]


def test_a_new_operator_may_have_a_translation(made):
    with made_once():
        registration.ONNXRegistry.from_torchlib(opset_version=20)
        library = torch.library.Library("normfuse_test_once", "DEF")
        library.define("f(Tensor x) -> Tensor")
        registration.ONNXRegistry.from_torchlib(opset_version=20)
    library._destroy()
    assert made == [20, 20]


def test_torch_is_left_as_it_was():
    from torch._export import utils

    before = vars(registration.ONNXRegistry)["from_torchlib"], utils._materialize_cpp_cia_ops
    with made_once():
        assert vars(registration.ONNXRegistry)["from_torchlib"] is not before[0]
        assert utils._materialize_cpp_cia_ops is not before[1]
    assert (vars(registration.ONNXRegistry)["from_torchlib"], utils._materialize_cpp_cia_ops) == before
