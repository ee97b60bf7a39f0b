"""Chains of codes: what is taken into them, what stays out, and that they compute the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import normfuse
from normfuse import native
from normfuse.capture.capture import capture
from normfuse.errors import UsageError
from normfuse.export import to_onnx
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Run
from normfuse.passes.quantize.shiftquant import ShiftQuantize
from normfuse.passes.quantize.shiftquant.chains import chains
from normfuse.passes.quantize.speed import Speed
from tests.passes.quantize.chained import files_agree, images, operators, quantized, spec, sqnr, value_of


def _refused(module: fx.GraphModule) -> dict[str, str]:
    return {s.path: s.note for p in normfuse.report(module).passes for s in p.refused if s.rule == "codes"}


class Block(nn.Module):
    """A residual block whose first one changes the size."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, outputs, 1)
        self.b = nn.Conv2d(outputs, outputs, 3, stride, 1)
        self.down = nn.Conv2d(channels, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + self.down(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, 2, 2)
        self.blocks = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


class Mobile(nn.Module):
    """An inverted residual with squeeze-and-excite."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.hardswish) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.up, self.depth = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 5, 1, 2, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.down, self.last = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 16, 3, 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        y = self.activation(self.depth(self.activation(self.up(x))))
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.last(x + self.down(y))


def test_a_residual_network_is_one_chain() -> None:
    model = Residual()
    fast = quantized(model)
    assert operators(fast) == {
        "quantize_codes": 1, "codes_conv2d": 6, "codes_max_pool2d": 1, "codes_mean": 1, "flatten": 1, "shiftquant_linear": 1,
    }  # fmt: skip
    (site,) = [s for p in normfuse.report(fast).passes for s in p.applied if s.rule == "codes"]
    assert site.path == "stem"
    assert "6 convolutions" in site.note
    assert {q.path for q in normfuse.report(fast).quantization if q.kind == "conv2d" and not q.kept} >= {"stem", "blocks.0.down"}
    layers = quantized(Residual(), chains=False)
    assert sqnr(model, fast) > max(28.0, sqnr(model, layers) - 0.5)


@pytest.mark.parametrize("bits", [4, 6])
def test_fewer_bits(bits: int) -> None:
    model = Residual()
    chained, layers = (
        sqnr(model, quantized(model, weight_bits=bits)),
        sqnr(model, quantized(Residual(), weight_bits=bits, chains=False)),
    )
    assert chained > layers - 1.5


@pytest.mark.parametrize("activation", [pytest.param(f, id=f.__name__) for f in (F.relu, F.relu6, F.hardswish, F.silu)])
def test_activations_gates_and_sums(activation: Callable[[Tensor], Tensor]) -> None:
    model = Mobile(activation)
    fast = quantized(model)
    found = operators(fast)
    assert found["codes_conv2d"] == 5
    assert found["codes_gate"] == found["codes_mean"] == found["quantize_codes"] == found["dequantize_codes"] == 1
    assert not {"silu", "hardswish", "relu6", "hardtanh", "add"} & set(found)
    assert set(_refused(fast)) == {"squeeze", "excite"}
    assert sqnr(model, fast) > 24


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
@pytest.mark.parametrize("model", [pytest.param(m, id=m.__name__) for m in (Residual, Mobile)])
def test_every_instruction_set_and_the_definition_give_the_same_codes(
    model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, x = quantized(model()), images(5)[4]
    conv = [n for n in fast.graph.nodes if getattr(n.target, "_opname", "") == "codes_conv2d"][-1]
    found = []
    for isa in native.isas():
        native.force_isa(isa)
        found.append(value_of(fast, conv, x))
    native.force_isa(None)
    monkeypatch.setattr(native, "available", lambda: False)
    expected = value_of(fast, conv, x)
    assert all(torch.equal(y, expected) for y in found)
    assert float(expected.float().std()) > 5


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
@pytest.mark.parametrize("model", [pytest.param(m, id=m.__name__) for m in (Residual, Mobile)])
@pytest.mark.parametrize("bits", [4, 8])
def test_files_compute_the_module(model: Callable[[], nn.Module], bits: int, tmp_path: Path) -> None:
    files_agree(quantized(model(), weight_bits=bits), tmp_path)


class Islands(nn.Module):
    """Something that is not understood between two chains, with a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3 if i == 0 else 8, 8, 3, 1, 1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x))))
        z = y + torch.cumsum(y, 2) / 20
        return self.d(F.relu(self.c(z)))


def test_islands_stay_in_float() -> None:
    model = Islands()
    fast = quantized(model)
    found = operators(fast)
    assert found["codes_conv2d"] == 4
    assert found["cumsum"] == 1
    assert found["codes_add"] == 1  # one of its operands is quantized for it
    assert found["quantize_codes"] == 2
    assert sqnr(model, fast) > 25


class Branches(nn.Module):
    """Concatenated branches, one of them read by a float operator too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 12, 3, 1, 1)
        self.last = nn.Conv2d(20, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        a, b = self.a(x), F.relu(self.b(x))
        y = torch.cat([a, b, F.max_pool2d(a, 3, 1, 1)], 1)
        return self.last(y), b.cumsum(1)


def test_concatenated_codes_are_worth_the_same() -> None:
    model = Branches()
    fast = quantized(model)
    found = operators(fast)
    assert found["cat"] == found["codes_max_pool2d"] == 1
    assert found["dequantize_codes"] == 2
    x = images(5)[4]
    with torch.no_grad():
        for y, z in zip(model(x), fast(x), strict=True):
            assert float((y - z).norm() / y.norm()) < 0.05


def test_other_batches_and_sizes() -> None:
    model, data = Residual(), images()
    batch = torch.export.Dim("batch")
    fast = normfuse.optimize(
        model.eval(), (data[0],), quantize=spec(), calibration=data, dynamic_shapes={"x": {0: batch}}, verify="off"
    )
    x = torch.cat(data)
    with torch.no_grad():
        torch.testing.assert_close(fast(x)[2:4], fast(data[1]))


@pytest.mark.skipif("avx2" not in (native.isas() if native.available() else ()), reason="no AVX2")
def test_weights_stay_within_pairs_where_products_are_taken_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "compared", lambda *_: Speed(2.0, True))  # whatever this machine measures
    model, fast = Residual(), []
    for isa in (None, "avx2"):
        native.force_isa(isa)
        fast.append(quantized(model, prefer="speed", keep=("head",)))
    native.force_isa(None)
    for module, limited in zip(fast, (False, True), strict=True):
        codes = (module.get_submodule("blocks.0.b").codes ^ 128).view(torch.int8).int()
        pairs = codes.reshape(len(codes), -1, 2)
        most = torch.maximum(pairs.clamp_min(0).sum(-1), -pairs.clamp_max(0).sum(-1)).max()
        assert bool(most <= 128) is limited
    assert abs(sqnr(model, fast[0]) - sqnr(model, fast[1])) < 3


def test_the_mean_of_an_output_stays_where_it_was() -> None:
    model, moved = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), []
    for corrected in (False, True):
        fast = quantized(model, weight_bits=3, bias_correction=corrected)
        with torch.no_grad():
            moved.append(torch.cat([model(x) - fast(x) for x in images()]).mean((0, 2, 3)).abs().mean())
    assert moved[1] < moved[0] / 2


# -- what stays out ------------------------------------------------------------------------------------------------------


def test_a_convolution_alone_is_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 18 * 16, 4))
    fast = quantized(model)
    assert operators(fast) == {"shiftquant_conv2d": 1, "flatten": 1, "shiftquant_linear": 1}
    assert "alone" in _refused(fast)["0"]


def test_what_is_kept_stays_in_float() -> None:
    fast = quantized(Residual(), keep=("blocks.0.b",))
    assert operators(fast)["conv2d"] == 1
    assert "keep='blocks.0.b'" in _refused(fast)["blocks.0.b"]
    assert operators(fast)["codes_conv2d"] == 5


def test_one_layer_with_other_bits() -> None:
    fast = quantized(Residual(), weight_bits=4, overrides={"stem": {"weight_bits": 8}})
    assert {q.path: q.weight_bits for q in normfuse.report(fast).quantization}["stem"] == 8


def test_values_that_are_no_numbers_refuse_the_chain() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x.log())))

    with pytest.raises(UsageError, match="holds NaN or Inf in the calibration data"):
        quantized(Log())


def test_other_dtypes_stay_out() -> None:
    data = [x.bfloat16() for x in images()]
    fast = normfuse.optimize(Residual().eval().bfloat16(), (data[0],), quantize=spec(), calibration=data, verify="off")
    assert "float32" in _refused(fast)["stem"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activations": "dynamic"}, "static scales"),
        ({"sqnr_budget": 20.0}, "sqnr_budget"),
        ({"finetune_steps": 3}, "finetune_steps"),
    ],
)
def test_what_chains_do_not_go_with(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec(**given)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_chain_that_does_not_pay_stays_out(ratio: float) -> None:
    """The timer says that everything with a chain in it is so much faster, and every layer by itself twice as fast."""
    data = [[x] for x in images()]
    graph = Graph.of(capture(Residual().eval(), (data[0][0],), None).gm)
    told = iter([ratio])
    report = ShiftQuantize(spec(prefer="speed"), lambda integers, floats: next(told, 2.0))(graph, Run(data))
    found = [n.target._opname for n in graph.fx.nodes if n.op == "call_function"]
    assert ("codes_conv2d" in found) is (ratio > 1)
    assert ("shiftquant_conv2d" in found) is (ratio < 1)
    (site,) = [s for s in (*report.applied, *report.refused) if s.rule == "codes"]
    assert f"{ratio:.2f} times as fast" in site.note


def test_a_file_with_float_activations_holds_no_chain(tmp_path: Path) -> None:
    fast = quantized(Residual())
    with pytest.raises(UsageError, match=r"leaves activations in float, and .* reads or writes their codes"):
        to_onnx(fast, tmp_path / "model.onnx", form="weight_only", target="tensorrt")


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_observers(observer: str) -> None:
    model = Residual()
    assert sqnr(model, quantized(model, observer=observer)) > 20


def test_the_proof_runs_it() -> None:
    model, data = Residual().eval(), images()
    fast = normfuse.optimize(model, (data[0],), quantize=spec(), calibration=data)
    found = normfuse.report(fast)
    assert operators(fast)["codes_conv2d"] > 1
    assert found.sqnr is not None
    assert found.sqnr > 25
