"""Weights in integers, activations in float: the arithmetic of each layer, what a file holds, and where exponents go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.errors import ExportError, UsageError
from normfuse.export.lowering.layers import quantized_layers
from normfuse.export.onnx.program import program
from normfuse.export.onnx.quantized import weight_only
from normfuse.export.onnx.quantized.forms import possible_forms
from normfuse.export.onnx.quantized.weights_alone import AS_WRITTEN
from normfuse.export.targets import TARGETS
from normfuse.ops._prepared import Packed, operand_of
from normfuse.quant.packing import unpack_rows
from tests.export.quantized_models import (
    Call,
    attention,
    conv,
    embedding,
    exported,
    linear,
    ops,
    outputs,
    product_codes,
    quantized,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

CASES = [
    pytest.param({"k": 128, "n": 20, "bits": 4}, "INT4", id="int4"),
    pytest.param({"k": 40, "n": 20, "bits": 3, "bias": False}, "INT4", id="3-bits"),
    pytest.param({"k": 37, "n": 20, "bits": 4}, "INT8", id="odd-inputs"),
    pytest.param({"k": 40, "n": 21, "bits": 4}, "INT8", id="odd-outputs"),
    pytest.param({"k": 40, "n": 20, "bits": 6, "epilogue": "relu"}, "INT8", id="6-bits-spread"),
    pytest.param({"k": 40, "n": 20, "bits": 8, "groups": 8, "epilogue": "gelu"}, "INT8", id="8-bits-8-groups"),
    pytest.param({"k": 40, "n": 20, "bits": 8, "groups": 1, "static": 0.05}, "INT8", id="static"),
    pytest.param({"k": 128, "n": 20, "bits": 4, "groups": 1, "block": 32}, "INT4", id="blocks"),
    pytest.param({"k": 128, "n": 20, "bits": 2, "groups": 1, "block": 64}, "INT4", id="blocks-2-bits"),
    pytest.param({"k": 37, "n": 20, "bits": 4, "groups": 1, "block": 32}, "INT8", id="blocks-odd-inputs"),
]


def _floats(model: nn.Module, bits: int) -> Tensor:
    """Ŵ = scale · (C << (E − e)), or with multipliers, [N, K] in float64."""
    return operand_of(Packed(model.w, model.e, model.s, bits, model.m)).double() * model.s.double()[:, None]


def _close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    assert float((got.double() - want).abs().max()) < 1e-5 * float(want.abs().max())


def _kinds(path: Path) -> set[str]:
    """Element types of the codes in a file."""
    model = onnx.load(path)
    names = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if t.name in names}


@pytest.mark.parametrize(("spec", "kind"), CASES)
def test_a_linear_layer_is_its_float_product(spec: dict[str, Any], kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = linear(**spec).eval()
    x = torch.randn(2, 5, spec["k"])
    file = exported(model, (x,), tmp_path, target="tensorrt", form="weight_only")
    assert file.form == "weight_only"
    assert _kinds(file.path) == {kind}
    assert not {n.domain for n in onnx.load(file.path).graph.node} - {""}
    want = x.double() @ _floats(model, spec["bits"]).T + (0 if model.b is None else model.b.double())
    want = {"relu": F.relu, "gelu": F.gelu}.get(spec.get("epilogue", "none"), lambda y: y)(want)
    _close(outputs(file, x, config=AS_WRITTEN)[0], want)


@pytest.mark.parametrize("group", [pytest.param(g, id=f"{g}-groups") for g in (1, 4)])
@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}-bits") for b in (4, 8)])
def test_a_convolution_is_its_float_product(group: int, bits: int, tmp_path: Path) -> None:
    """8 bits in 4 groups of exponents do not fit in bytes: the image is multiplied, by factors of its own group of channels."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 9, 7)
    model = conv(24, 12, group, bits, 4, padding=(1, 0, 0, 1), stride=(2, 1), epilogue="relu").eval()
    file = exported(model, (x,), tmp_path, target="tensorrt", form="weight_only")
    assert file.error is not None
    assert file.error.max_rel < 1e-5
    assert _kinds(file.path) == {"INT8"}
    assert file.ops.get("Mul", 0) == (bits == 8)


def test_rows_of_a_table(tmp_path: Path) -> None:
    bits = 4
    torch.manual_seed(0)
    model, ids = embedding(30, 10, bits).eval(), torch.randint(0, 30, (2, 5))
    file = exported(model, (ids,), tmp_path, target="tensorrt", form="weight_only")
    assert _kinds(file.path) == {"INT4"}
    want = (unpack_rows(model.c, 10, bits).double() * model.s.double()[:, None])[ids]
    _close(outputs(file, ids, config=AS_WRITTEN)[0], want)


def test_attention_is_in_float(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6, 8)
    file = exported(attention(causal=True).eval(), (x,), tmp_path, target="tensorrt", form="weight_only")
    q, k, v = x, x.roll(1, 2), x
    _close(outputs(file, x)[0], F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.3))
    assert file.attention_sites == {"decomposed": 1}


def test_portable_files_of_older_opsets_hold_bytes(tmp_path: Path) -> None:
    x = torch.randn(3, 40)
    model = linear(20, 40, 4, 4).eval()
    old = exported(model, (x,), tmp_path, target="portable", form="weight_only")
    assert (old.opset, _kinds(old.path)) == (20, {"INT8"})
    new = exported(model, (x,), tmp_path, target="portable", form="weight_only", opset=21)
    assert _kinds(new.path) == {"INT4"}
    assert new.weight_bytes < old.weight_bytes


def test_onnxruntime_multiplies_blocks_as_its_own(tmp_path: Path) -> None:
    """The codes and scales are those of a MatMulNBits of the same block."""
    import onnxruntime

    torch.manual_seed(0)
    model, x = linear(24, 128, 4, 1, block=32).eval(), torch.randn(5, 128)
    file = exported(model, (x,), tmp_path, target="portable", form="weight_only", opset=21)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    (node,) = [n for n in onnx.load(tmp_path / "optimized.onnx").graph.node if n.op_type == "MatMulNBits"]
    facts = {a.name: a.i for a in node.attribute}
    assert (facts["K"], facts["N"], facts["bits"], facts["block_size"]) == (128, 24, 4, 32)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = x.double() @ _floats(model, 4).T + model.b.double()
    assert float((torch.from_numpy(got) - want).abs().max()) < 0.02 * float(want.abs().max())  # it rounds x to 8 bits


def test_block_sizes() -> None:
    """At least two blocks, of one size; none where TensorRT would unpack the weight."""
    assert [weight_only.block_size(k, 8) for k in (4, 40, 48, 64, 128, 192, 768, 1000)] == [2, 20, 16, 32, 64, 64, 128, 500]
    assert [weight_only.block_size(k, n) for k, n in ((37, 8), (8, 7), (2, 8))] == [0, 0, 0]


class Front(nn.Module):
    """`front`, then a 4-bit layer with four exponents."""

    def __init__(self, front: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.front = front
        self.layer = linear(20, 32, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.front(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


FRONTS: list[Any] = [
    pytest.param(lambda: nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32)), 0, id="layer-norm"),
    pytest.param(lambda: nn.Sequential(nn.Linear(16, 32), nn.RMSNorm(32)), 0, id="rms-norm"),
    pytest.param(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU()), 0, id="relu"),
    pytest.param(lambda: linear(32, 16, 8, 1, epilogue="relu"), 0, id="quantized-relu"),
    pytest.param(lambda: linear(32, 16, 4, 1), 0, id="quantized-in-blocks"),
    pytest.param(lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU()), 1, id="gelu"),
    pytest.param(Gated, 0, id="gate"),
]


@pytest.mark.parametrize(("front", "multiplications"), FRONTS)
def test_exponents_go_into_what_is_in_front(front: Callable[[], nn.Module], multiplications: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Front(front()).eval(), torch.randn(3, 5, 16)
    file = exported(model, (x,), tmp_path, target="tensorrt", form="weight_only")
    assert file.error is not None
    assert file.error.max_rel < 1e-5
    vectors = [
        n
        for n in onnx.load(file.path).graph.node
        if n.op_type == "Mul" and any("const" in i and _is_powers(file.path, i) for i in n.input)
    ]
    assert len(vectors) == multiplications


def _is_powers(path: Path, name: str) -> bool:
    """2^-e for each channel."""
    found = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name == name]
    return bool(found) and found[0].shape == (32,) and bool((np.log2(found[0]) % 1 == 0).all()) and found[0].min() < found[0].max()


def test_exponents_stay_where_something_else_reads_the_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second, norm = linear(20, 32, 4, 4), linear(20, 32, 4, 4), nn.LayerNorm(32)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = first, second, norm

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.norm(x)
            return self.first(y), self.second(y), y

    file = exported(Two().eval(), (torch.randn(3, 32),), tmp_path, target="tensorrt", form="weight_only")
    assert file.ops["Mul"] == 2
    assert file.error is not None
    assert file.error.max_rel < 1e-5


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in ("vision", "convs")])
def test_whole_models(name: str, tmp_path: Path) -> None:
    model, _ = quantized(name)
    file = exported(model, None, tmp_path, target="tensorrt")
    assert file.form == "weight_only"
    assert file.error is not None
    assert file.error.max_rel < 1e-5
    assert file.sqnr is not None
    assert 20 < file.sqnr < 80  # of the module, whose activations are rounded
    assert any("dB against the module" in note for note in file.notes)


def test_a_wrong_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = weight_only._dequantized

    def wrong(at: Any, codes: Any, scale: Any, *rest: Any, **how: Any) -> Any:
        return right(at, codes, scale * np.float32(1.001), *rest, **how)

    monkeypatch.setattr(weight_only, "_dequantized", wrong)
    with pytest.raises(ExportError, match="deviates from the module"):
        exported(linear(20, 40).eval(), (torch.randn(2, 40),), tmp_path, target="tensorrt", form="weight_only")
    assert not list(tmp_path.glob("*.onnx"))


def test_refusals(tmp_path: Path) -> None:
    x = torch.randn(2, 40)
    model = quantized_layers(program(linear(20, 40).eval(), (x,)).exported)
    with pytest.raises(UsageError, match="form='native' or form='integer' or form='qdq'"):
        possible_forms(model, TARGETS["onnxruntime"], 23, "weight_only")
    with pytest.raises(UsageError, match="packs its weights anyway"):
        possible_forms(model, TARGETS["portable"], 21, "weight_only", int4=True)
    assert possible_forms(model, TARGETS["portable"], 20, "auto") == ("integer",)
    codes = quantized_layers(program(product_codes(20, 40, 4, 4).eval(), (x,)).exported)
    with pytest.raises(UsageError, match=r"QuantizeRows.*form='integer'"):
        possible_forms(codes, TARGETS["portable"], 20, "weight_only")
    with pytest.raises(UsageError, match="leaves activations in float"):
        possible_forms(codes, TARGETS["tensorrt"], 23, "auto")
    with pytest.raises(ExportError, match="float64"):
        exported(linear(20, 40).double().eval(), (x.double(),), tmp_path, target="tensorrt", form="weight_only", dtype="fp64")


def test_layers_share_their_factors(tmp_path: Path) -> None:
    """Two layers with the same exponents over one input: one multiplication."""
    torch.manual_seed(0)
    layer = linear(20, 32, 4, 4)
    model = Call(lambda x, **t: (layer.f(x, **t), ops.shiftquant_linear(x, t["w"], t["e"], t["s"], None, None, 4, 8, "relu")))
    for name in layer.names:
        model.register_buffer(name, getattr(layer, name))
    model.names = layer.names
    file = exported(model.eval(), (torch.randn(3, 32),), tmp_path, target="tensorrt", form="weight_only")
    assert file.ops["Mul"] == 1
