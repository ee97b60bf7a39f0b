"""Convolutional networks in QDQ files for runtimes that keep codes from the first layer to the last."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import native
from normfuse.app.random_norms import randomise_norms
from normfuse.export.onnx.compare import sqnr
from normfuse.export.onnx.program import program
from normfuse.export.onnx.quantized.as_coded import as_coded
from normfuse.export.onnx.quantized.between import Codes, chain_of, narrowed
from normfuse.ir.ranges import range_of
from tests.export.quantized_models import exported, outputs

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SPEC = {"weight_bits": 8, "groups": 1, "activations": "static", "prefer": "size", "rounding": "nearest", "migration": False}


def quantized(model: nn.Module, *, size: int = 32, **spec: Any) -> tuple[nn.Module, Any, Tensor]:
    """The float model with lively norms, what `optimize` makes of it, and an input that it was not calibrated on."""
    model = randomise_norms(model.eval(), seed=0)
    images = [torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    scheme = normfuse.ShiftQuant(**{**SPEC, **spec})
    batches = [(x,) for x in images[:3]]
    return model, normfuse.optimize(model, batches[0], quantize=scheme, calibration=batches, verify="off"), images[3]


def optimized(path: Path, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, Any, Tensor]:
    """Residual blocks, a maximum, averages in the shortcuts, a classifier."""
    torch.manual_seed(0)
    return quantized(pytest.importorskip("timm").create_model("resnet10t", num_classes=10))


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_a_residual_network_is_codes_from_end_to_end(residual: Any, target: str, tmp_path: Path) -> None:
    model, fast, x = residual
    file = exported(fast, None, tmp_path, form="qdq", target=target)
    ops = optimized(file.path, tmp_path)
    assert ops["QLinearConv"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert (ops["QLinearAdd"], ops["QLinearAveragePool"], ops["NhwcMaxPool"], ops["QLinearGlobalAveragePool"]) == (4, 3, 1, 1)
    assert ops["QuantizeLinear"] == ops["QGemm"] == 1
    assert not ops.keys() & {"Conv", "Add", "Relu", "DequantizeLinear", "ReduceMean", "Gemm"}
    assert "all 255 steps behind a ReLU" in " ".join(file.notes)
    assert sqnr([model(x).detach()], outputs(file, x)) > 30


def test_the_file_is_its_definition(residual: Any, tmp_path: Path) -> None:
    """Code for code: a single one that differed would show at 60 dB."""
    _, fast, x = residual
    file = exported(fast, None, tmp_path, form="qdq", verify=False)
    found = program(fast)
    assert sqnr(as_coded(found, chain_of(found)).reference((x,)), outputs(file, x)) > 110


@pytest.mark.slow
def test_depthwise_layers_and_clips_at_6_are_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fast, x = quantized(pytest.importorskip("timm").create_model("mobilenetv2_035", num_classes=10))
    file = exported(fast, None, tmp_path, form="qdq")
    ops = optimized(file.path, tmp_path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QGemm"], ops["QuantizeLinear"]) == (52, 10, 1, 1)
    assert not ops.keys() & {"Conv", "Add", "Clip", "DequantizeLinear"}
    want = [model(x).detach()]
    assert sqnr(want, outputs(file, x)) > sqnr(want, [fast(x)]) - 1
    found = program(fast)
    scales = [c.scale for name, c in chain_of(found).codes.items() if name.startswith("hardtanh")]
    assert scales
    assert all(float(torch.tensor(s) * 255) <= 6 for s in scales)


def test_weights_are_signed_and_bytes_behind_a_relu_start_at_0(residual: Any, tmp_path: Path) -> None:
    _, fast, _ = residual
    graph = onnx.load(exported(fast, None, tmp_path, form="qdq", verify=False).path).graph
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for conv in (n for n in graph.node if n.op_type == "Conv"):
        weight, bias = (made[name] for name in conv.input[1:])
        assert held[weight.input[0]].dtype == "int8"
        assert held[bias.input[0]].dtype == "int32"
        assert held[weight.input[1]].shape == held[weight.input[0]].shape[:1]
    zeros = {n.output[0]: held[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
    behind = [zeros[made_by.output[0]] for made_by in graph.node if made_by.op_type == "QuantizeLinear"
              and made_by.input[0] in made and made[made_by.input[0]].op_type == "Relu"]  # fmt: skip
    assert behind
    assert not any(behind)
    assert all(z.dtype == "uint8" for z in zeros.values())


def test_saved_and_loaded_it_is_the_same_file(residual: Any, tmp_path: Path) -> None:
    _, fast, _ = residual
    normfuse.save(fast, tmp_path / "m.pt2")
    back = normfuse.load(tmp_path / "m.pt2")
    noted = [range_of(n) for n in back.graph.nodes if n.op == "call_function"]
    assert noted == [range_of(n) for n in fast.graph.nodes if n.op == "call_function"]
    assert any(noted)
    (tmp_path / "again").mkdir()
    first = exported(fast, None, tmp_path, form="qdq", verify=False)
    assert optimized(exported(back, None, tmp_path / "again", form="qdq", verify=False).path, tmp_path) == optimized(
        first.path, tmp_path
    )


def test_tensorrt_keeps_its_own_placement(residual: Any, tmp_path: Path) -> None:
    _, fast, _ = residual
    graph = onnx.load(exported(fast, None, tmp_path, form="qdq", target="tensorrt", verify=False).path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    assert any(made.get(name) != "DequantizeLinear" for n in graph.node if n.op_type == "Add" for name in n.input)
    assert onnx.TensorProto.UINT8 not in {t.data_type for t in graph.initializer}


class Mixed(nn.Module):
    """Concatenated branches, a copy of pixels, and a tail whose features a LayerNorm reads in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.join, self.tail, self.norm, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 1), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat((self.a(x).relu(), self.b(x).relu()), 1)
        x = nn.functional.interpolate(self.join(x).relu(), scale_factor=2.0, mode="nearest")
        return self.head(self.norm(self.tail(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    return quantized(Mixed(), size=12)


def test_concatenations_share_a_scale_and_floats_stay_floats(mixed: Any, tmp_path: Path) -> None:
    model, fast, x = mixed
    chain = chain_of(program(fast))
    parts = [chain.codes[n.name] for n in fast.graph.nodes for n in n.all_input_nodes if "cat" in str(n.target)] or None
    assert parts is None or len(set(parts)) == 1
    file = exported(fast, None, tmp_path, form="qdq")
    ops = optimized(file.path, tmp_path)
    assert ops["QLinearConv"] == 4
    assert ops["QLinearConcat"] == 1
    assert ops["Conv"] == 1  # what the LayerNorm reads keeps its floats
    want = [model(x).detach()]
    assert sqnr(want, outputs(file, x)) > 25


def test_a_layer_that_was_kept_in_float_stays_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, fast, _ = quantized(Mixed(), size=12, keep=("b",))
    ops = optimized(exported(fast, None, tmp_path, form="qdq", verify=False).path, tmp_path)
    assert ops["QLinearConv"] == 2  # in front of the concatenation and behind it; beside a branch in float stands another one


def test_without_ranges_only_what_layers_read_is_codes(residual: Any) -> None:
    """A module that somebody else made: what additions read has no scale."""
    _, fast, _ = residual
    found = program(fast)
    for node in found.exported.graph.nodes:
        node.meta.pop("custom", None)
    chain = chain_of(found)
    assert chain
    assert not any(n.name in chain.codes for n in found.exported.graph.nodes if n.op == "call_function"
                   and any("add" in str(r.target) for r in n.users) and "conv" in n.name)  # fmt: skip


def test_exponents_that_do_not_fit_into_a_byte_are_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fast, x = quantized(Mixed(), size=12, groups=4, exponents="range")
    found = program(fast)
    file = exported(fast, None, tmp_path, form="qdq")
    assert optimized(file.path, tmp_path)["QLinearConv"] == 4
    assert sqnr(as_coded(found, chain_of(found)).reference((x,)), outputs(file, x)) > 60
    assert sqnr([model(x).detach()], outputs(file, x)) > 25


def test_a_weight_is_narrowed_by_output() -> None:
    wide = np.array([[127, -64, 3], [1016, 8, -4], [0, 0, 0]], np.int32)
    codes, factor = narrowed(wide)
    assert codes.tolist() == [[127, -64, 3], [127, 1, 0], [0, 0, 0]]
    assert factor.tolist() == [1, 8, 1]


def test_few_bits_and_dynamic_scales_keep_their_form() -> None:
    torch.manual_seed(0)
    for spec in ({"activation_bits": 4}, {"activations": "dynamic"}):
        _, fast, _ = quantized(Mixed(), size=12, **spec)
        assert not chain_of(program(fast))


def test_where_products_saturate_the_file_is_compared_as_written(mixed: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    file = exported(mixed[1], None, tmp_path, form="qdq")
    assert "weight_bits=7" in " ".join(file.notes)


def test_codes_round_to_even_and_end_at_a_byte() -> None:
    x = torch.tensor([-1.0, 0.25, 0.75, 200.0])
    assert torch.equal(Codes(0.5, 2).rounded(x), torch.tensor([-1.0, 0.0, 1.0, 126.5]))
