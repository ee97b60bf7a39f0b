"""Every form of a quantized layer gives the integers of its definition: floats that follow from them are equal bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normfuse import native
from normfuse.export.onnx.build import Build
from normfuse.export.onnx.quantized.forms import lower_quantized
from normfuse.export.onnx.quantized.sites import sites
from normfuse.export.ops.weights import SAFE, stretches
from normfuse.export.targets import TARGETS
from tests.export.quantized_models import conv, embedding, exported, linear, outputs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

KERNELS = pytest.param("native", True, id="kernels", marks=pytest.mark.skipif(not native.available(), reason="not built"))
FORMS = [KERNELS, pytest.param("native", False, id="functions"), pytest.param("integer", False, id="integer")]
WIDTHS = [(2, 1), (2, 8), (3, 4), (4, 4), (4, 5), (5, 4), (5, 8), (6, 4), (7, 2), (8, 1), (8, 4)]


class Many(nn.Module):
    """Several layers on one input, one output each: one export tries them all."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class Apart(Many):
    """Each layer reads a value of its own: ONNX Runtime fuses a DequantizeLinear with one reader only."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x.roll(i, 1)) for i, layer in enumerate(self.layers))


def _same(model: nn.Module, x: Tensor, folder: Path, form: str, kernels: bool, **options: object) -> None:
    file = exported(model, (x,), folder, form=form, verify=False, **options)
    got = outputs(file, x, kernels=kernels)
    for i, (want, have) in enumerate(zip(model(x), got, strict=True)):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"layer {i}: {m}")


@pytest.mark.parametrize(("form", "kernels"), FORMS)
def test_linears_of_every_width_are_equal(form: str, kernels: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [linear(20, 37, *width, bias=i % 2 == 0) for i, width in enumerate(WIDTHS)]
    layers += [linear(16, 37, 4, 4, a) for a in (2, 5)] + [linear(20, 37, epilogue="relu"), linear(33, 37, 4, 3, static=0.03)]
    x = torch.randn(2, 5, 37) * torch.logspace(-2, 2, 5)[:, None]  # rows with scales of their own
    _same(Many(*layers), x, tmp_path, form, kernels)


@pytest.mark.parametrize(("form", "kernels"), FORMS)
def test_extreme_codes_do_not_saturate(form: str, kernels: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [linear(32, 256, bits, groups, extreme=True) for bits, groups in ((8, 1), (7, 2), (4, 5), (4, 4), (6, 3))]
    x = torch.cat([torch.full((2, 256), 3.0), torch.full((2, 256), -3.0)])
    _same(Many(*layers), x, tmp_path, form, kernels)


@pytest.mark.parametrize(("form", "kernels"), FORMS)
def test_rows_that_have_no_scale(form: str, kernels: bool, tmp_path: Path) -> None:
    """Zeros and tiny numbers give the bias, NaN and Inf give NaN, and neither touches its neighbours."""
    torch.manual_seed(0)
    x = torch.randn(7, 37)
    x[0], x[1], x[2, 17], x[3, 0], x[4, 36] = 0, 1e-42, torch.nan, torch.inf, -torch.inf
    model = Many(linear(20, 37), linear(20, 37, 8, 4))
    _same(model, x, tmp_path, form, kernels)
    first = model(x)[0]
    assert first[2:5].isnan().all()
    assert first[[0, 1, 5, 6]].isfinite().all()


@pytest.mark.parametrize(("form", "kernels"), FORMS)
def test_convolutions_are_equal(form: str, kernels: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [
        conv(),
        conv(bits=8),
        conv(group=3),
        conv(group=12, bits=8),
        conv(kernel=(5, 3), stride=(2, 1), padding=(2, 0, 1, 1), dilation=(1, 2), static=0.03, epilogue="relu"),
    ]
    _same(Many(*layers), torch.randn(2, 12, 9, 11), tmp_path, form, kernels)


@pytest.mark.parametrize("form", [pytest.param("native", id="functions"), pytest.param("integer", id="integer")])
def test_embeddings_are_equal(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Many(*(embedding(30, 13, bits) for bits in range(2, 9)))
    _same(model, torch.randint(0, 30, (2, 7)), tmp_path, form, False)


@pytest.mark.parametrize("int4", [pytest.param(False, id="bytes"), pytest.param(True, id="int4")])
@pytest.mark.parametrize("form", [pytest.param("integer", id="integer"), pytest.param("qdq", id="qdq")])
def test_static_linears_are_equal(form: str, int4: bool, tmp_path: Path) -> None:
    """The QDQ form too where ONNX Runtime multiplies integers: one part, and no activation beyond the calibrated range."""
    torch.manual_seed(0)
    layers = [linear(20, 37, *width, static=0.03) for width in ((4, 4), (4, 5), (3, 2), (6, 3), (8, 1))]
    x = torch.randn(2, 5, 37).clamp(-127 * 0.03, 127 * 0.03)
    _same(Apart(*layers), x, tmp_path, form, False, int4_initializers=int4)


def test_qdq_in_parts_and_few_bits_is_close(tmp_path: Path) -> None:
    """The parts of a weight are added in float; fewer than 8 bits are cut by Clip."""
    torch.manual_seed(0)
    model = Many(linear(20, 37, 8, 4, static=0.03), linear(20, 37, 4, 4, 5, static=0.2), linear(20, 37, 6, 4, static=0.03))
    x = (torch.randn(2, 5, 37) * 2).clamp(-127 * 0.03, 127 * 0.03)
    file = exported(model, (x,), tmp_path, form="qdq", verify=False)
    for want, have in zip(model(x), outputs(file, x), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-4)


def test_int8_weights_of_other_targets_are_equal_with_exact_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Many(linear(32, 256, 8, 1, static=0.03, extreme=True))
    x = torch.full((2, 256), 3.0)
    file = exported(model, (x,), tmp_path, form="qdq", target="tensorrt")
    weights = [t.data_type for t in onnx.load(file.path).graph.initializer if len(t.dims) == 2]
    assert weights == [onnx.TensorProto.INT8]
    assert file.sqnr == float("inf")


def test_float64_and_half_keep_their_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for dtype, form, bound in (
        (torch.float64, "integer", 1e-14),
        (torch.float64, "native", 1e-14),
        (torch.float16, "native", 1e-3),
    ):
        model, x = Many(linear(20, 37)), torch.randn(3, 37, dtype=dtype)
        (have,) = outputs(exported(model, (x,), tmp_path, form=form, verify=False), x, kernels=False)
        assert have.dtype == dtype
        torch.testing.assert_close(have, model(x)[0], rtol=bound, atol=bound)


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"w{b}") for b in range(2, 9)])
def test_parts_cover_all_exponents_and_fit_a_byte(bits: int) -> None:
    for groups in range(1, 17):
        found = stretches(bits, groups)
        assert [e for low, high in found for e in range(low, high + 1)] == list(range(groups))
        assert all((2 ** (bits - 1) - 1) << (high - low) <= 127 for low, high in found)


def test_kernels_that_saturate_get_small_operands_only(tmp_path: Path) -> None:
    """uint8 · int8 adds two products in 16 bits on AVX2: 2 · 255 · 64 fits; anything larger is uint8 · uint8."""
    assert 2 * 255 * SAFE < 2**15
    torch.manual_seed(0)
    model = Many(*(linear(20, 37, *width, extreme=True) for width in ((4, 4), (4, 5), (8, 1))))
    file = exported(model, (torch.randn(2, 37),), tmp_path, form="integer", verify=False)
    kinds = [t.data_type for t in onnx.load(file.path).graph.initializer if list(t.dims) == [37, 20]]
    assert sorted(kinds) == [onnx.TensorProto.UINT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT8]


def test_target_without_markers_is_left_alone() -> None:
    ir = pytest.importorskip("onnx_ir")
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="empty"), ir_version=10)
    assert not list(sites(model))
    lower_quantized(model, "native", TARGETS["onnxruntime"], 23)
    assert Build.known(None) is None
    assert not list(model.graph)
