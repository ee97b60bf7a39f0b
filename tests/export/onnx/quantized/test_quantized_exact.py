"""Every form of a quantized layer gives the integers of its definition: floats that follow from them are equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse import native
from normfuse.export.onnx.build import Build
from normfuse.export.onnx.quantized.forms import lower_quantized
from normfuse.export.onnx.quantized.sites import sites
from normfuse.export.onnx.runtime import session
from normfuse.export.onnx.writer.variants import base_name
from normfuse.export.ops.weights import SAFE, stretches
from normfuse.export.targets import TARGETS
from tests.export.quantized_models import Translated, attention, conv, embedding, linear, norm_codes, product_codes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

KERNELS = pytest.param(("native", True), id="kernels", marks=pytest.mark.skipif(not native.available(), reason="not built"))
FORMS = [KERNELS, pytest.param(("native", False), id="functions"), pytest.param(("integer", False), id="integer")]
WIDTHS = [(2, 1), (2, 8), (3, 4), (4, 4), (4, 5), (5, 4), (5, 8), (6, 4), (7, 2), (8, 1), (8, 4)]
SEEN = torch.arange(63).reshape(7, 9).remainder(5) > 0  # queries · keys


def _layers() -> dict[str, tuple[str, list[nn.Module]]]:
    """Name: the input that all of them read, and layers."""
    widths = [linear(20, 37, *width, bias=i % 2 == 0) for i, width in enumerate(WIDTHS)]
    blocks = [linear(20, 37, bits, 1, block=b, bias=b == 32) for bits in (2, 3, 4) for b in (32, 64)]
    others = [linear(16, 37, 4, 4, a) for a in (2, 5)] + [linear(20, 37, epilogue="relu"), linear(33, 37, 4, 3, static=0.03)]
    strange: Any = {"kernel": (5, 3), "stride": (2, 1), "padding": (2, 0, 1, 1), "dilation": (1, 2)}
    return {
        "linears": ("x", [*widths, *blocks, *others]),
        "extremes": (
            "wide",
            [
                *(linear(32, 256, *w, extreme=True) for w in ((8, 1), (7, 2), (4, 5), (4, 4), (6, 3))),
                linear(32, 256, 4, 1, block=64, extreme=True),
            ],
        ),
        "products": ("x", [product_codes(20, 37, 4, 4), product_codes(17, 37, 8, 3), product_codes(20, 37, 4, 1, 32)]),
        "norms": ("x", [norm_codes(kind, 37, residual=i % 2 == 0) for i, kind in enumerate(("layer", "rms", "crms", "l1"))]),
        "convs": (
            "image",
            [
                conv(), conv(bits=8), conv(group=3), conv(group=12, bits=8), conv(48, 12, 2, 5, 3, kernel=(1, 1), padding=(0, 0)),
                conv(**strange, static=0.03, epilogue="relu"),
            ],
        ),
        "tables": ("ids", [embedding(30, 13, bits) for bits in range(2, 9)]),
        "attention": (
            "heads",
            [
                attention(),
                attention(causal=True, kv_heads=2, bits=6),
                attention(mask=SEEN[:, :7]),
                attention(mask=torch.randn(2, 1, 1, 7)),
            ],
        ),
    }  # fmt: skip


class Everything(nn.Module):
    """Layers of all kinds, an output or more each: one export tries them all."""

    def __init__(self) -> None:
        super().__init__()
        found = _layers()
        self.reads = {name: of for name, (of, _) in found.items()}
        self.layers = nn.ModuleDict({name: nn.ModuleList(layers) for name, (_, layers) in found.items()})

    def forward(self, x: Tensor, wide: Tensor, image: Tensor, ids: Tensor, heads: Tensor) -> dict[str, tuple[Any, ...]]:
        given = {"x": x, "wide": wide, "image": image, "ids": ids, "heads": heads}
        return {name: tuple(f(given[of]) for f in self.layers[name]) for name, of in self.reads.items()}  # type: ignore[attr-defined]


Answer = Callable[..., tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]


def _inputs() -> dict[str, Tensor]:
    return {
        "x": torch.randn(2, 7, 37) * torch.logspace(-2, 2, 7)[:, None],  # rows with scales of their own
        "wide": torch.cat([torch.full((2, 256), 3.0), torch.full((2, 256), -3.0)]),
        "image": torch.randn(2, 12, 9, 11),
        "ids": torch.randint(0, 30, (2, 7)),
        "heads": torch.randn(2, 4, 7, 16),
    }


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Translated, dict[str, Path]]:
    torch.manual_seed(0)
    found = Translated(Everything(), tuple(_inputs().values()))
    folder = tmp_path_factory.mktemp("everything")
    return found, {form: found.written(folder / f"{form}.onnx", form) for form in ("native", "integer")}


@pytest.fixture(scope="module", params=FORMS)
def answer(request: pytest.FixtureRequest, everything: tuple[Translated, dict[str, Path]]) -> Answer:
    """(other inputs by name) -> what the module says and what the file in one form says, by the name of the layers."""
    form, kernels = request.param
    found, files = everything
    opened = session(files[form], threads=1, kernels=kernels)

    def ask(**other: Tensor) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        torch.manual_seed(1)
        inputs = tuple((_inputs() | other).values())
        got = iter(found.run(opened, *inputs))
        want = {name: torch.utils._pytree.tree_leaves(v) for name, v in found.model(*inputs).items()}
        return want, {name: [next(got) for _ in values] for name, values in want.items()}

    return ask


def test_integers_are_equal(answer: Answer) -> None:
    """Linears of every width, codes that saturate careless kernels, products of codes, convolutions, tables."""
    want, have = answer()
    for name in ("linears", "extremes", "products", "convs", "tables"):
        for i, (a, b) in enumerate(zip(want[name], have[name], strict=True)):
            torch.testing.assert_close(b, a, rtol=0, atol=0, msg=lambda m, at=f"{name} {i}": f"{at}: {m}")


def test_behind_norms_and_softmax_they_follow_the_roundings(answer: Answer) -> None:
    """Kernels round exp, sums and roots in their own order: a code may be the neighbouring one."""
    want, have = answer()
    for a, b in zip(want["norms"], have["norms"], strict=True):
        if a.dtype is torch.int8:
            assert (a.int() - b.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=0)
    for a, b in zip(want["attention"], have["attention"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)


def test_rows_that_have_no_scale(answer: Answer) -> None:
    """Zeros and tiny numbers give the bias, NaN and Inf give NaN, and neither touches its neighbours; with a static scale NaN
    counts as 0 and Inf as the largest code."""
    x = torch.randn(2, 7, 37)
    x[:, 0], x[:, 1], x[:, 2, 17], x[:, 3, 0], x[:, 4, 36] = 0, 1e-42, torch.nan, torch.inf, -torch.inf
    want, have = answer(x=x)
    for a, b in zip(want["linears"], have["linears"], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    assert want["linears"][-1].isfinite().all()
    first = want["linears"][0]
    assert first[:, 2:5].isnan().all()
    assert first[:, [0, 1, 5, 6]].isfinite().all()


def test_every_operator_of_a_native_file_is_one_node(everything: tuple[Translated, dict[str, Path]]) -> None:
    _, files = everything
    nodes = onnx.load(files["native"]).graph.node
    ours = [n for n in nodes if n.domain == "normfuse"]
    assert {base_name(n.op_type) for n in ours} == {
        "Attention", "NormQuantize", "QuantizeRows", "ShiftQuantConv2d", "ShiftQuantEmbedding", "ShiftQuantLinear",
        "ShiftQuantMatMul", "ShiftQuantMatMulQuantize",
    }  # fmt: skip
    assert sum(base_name(n.op_type) == "Attention" for n in ours) == 4
    assert not [n.op_type for n in onnx.load(files["integer"]).graph.node if n.domain]


def test_kernels_that_saturate_get_small_operands_only(everything: tuple[Translated, dict[str, Path]]) -> None:
    """uint8 · int8 adds two products in 16 bits on AVX2: 2 · 255 · 64 fits; anything larger is uint8 · uint8."""
    assert 2 * 255 * SAFE < 2**15
    graph = onnx.load(everything[1]["integer"]).graph
    kinds = [
        t.data_type for t in graph.initializer if list(t.dims) == [256, 32]
    ]  # of (8, 1), (7, 2), (4, 5), (4, 4), (6, 3), and in blocks
    uint8, int8 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8
    assert sorted(kinds) == sorted([uint8, uint8, uint8, int8, uint8, uint8])


# -- static scales -----------------------------------------------------------------------------------------------------


class _Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.behind_relu = linear(20, 37, 8, 1, static=0.03), linear(16, 37, 8, 1, static=0.03)
        self.conv = conv(24, 12, 1, 8, 1, static=0.03)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x), self.behind_relu(x.relu()), self.conv(image)


@pytest.mark.parametrize(("form", "target"), [*((f, "onnxruntime") for f in ("native", "integer", "qdq")), ("qdq", "tensorrt")])
def test_all_forms_have_the_same_codes(form: str, target: str, tmp_path: Path) -> None:
    """What is clipped becomes -127 or 127 of 8 bits in every form, and never -128."""
    inputs = (torch.randn(6, 37) * 8, torch.randn(2, 12, 7, 7) * 8)
    assert (inputs[0] < -128 * 0.03).any()
    model = Translated(_Clipped(), inputs)
    file = model.written(tmp_path / "m.onnx", form, target=target)
    for kernels in {False, form == "native" and native.available()}:
        for got, want in zip(model.run(session(file, threads=1, kernels=kernels), *inputs), model.model(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


class Static(nn.Module):
    """Equal in QDQ where ONNX Runtime multiplies integers, one part of the weight; close in parts or in few bits."""

    def __init__(self, *, parts: bool) -> None:
        super().__init__()
        self.equal = nn.ModuleList(linear(20, 37, *width, static=0.03) for width in ((4, 4), (4, 5), (3, 2), (6, 3), (8, 1)))
        in_parts = [linear(20, 37, 8, 4, static=0.03)] if parts else []
        self.close = nn.ModuleList([*in_parts, linear(20, 37, 4, 4, 5, static=0.2)])
        self.extreme = linear(32, 256, 8, 1, static=0.03, extreme=True)

    def forward(self, x: Tensor, wide: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (*(f(x) for f in self.equal), self.extreme(wide)), tuple(f(x) for f in self.close)


@pytest.fixture(scope="module", params=["onnxruntime", "tensorrt"])
def static(request: pytest.FixtureRequest) -> tuple[str, Translated, tuple[Tensor, ...], list[Tensor]]:
    """For each target the layers that its QDQ form takes."""
    torch.manual_seed(0)
    inputs = ((torch.randn(2, 5, 37) * 2).clamp(-127 * 0.03, 127 * 0.03), torch.full((2, 256), 3.0))
    model = Static(parts=request.param == "onnxruntime")
    return request.param, Translated(model, inputs), inputs, torch.utils._pytree.tree_leaves(model(*inputs))


@pytest.mark.parametrize("int4", [pytest.param(False, id="bytes"), pytest.param(True, id="int4")])
@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_static_linears_are_equal(static: Any, form: str, int4: bool, tmp_path: Path) -> None:
    target, model, inputs, want = static
    file = model.written(tmp_path / "model.onnx", form, target=target, int4=int4)
    # QDQ for others as written, in float: ONNX Runtime multiplies its int8 exactly only with x64quantprecision, under which version
    # 1.32 gives a weight's DequantizeLinear a zero point of the wrong shape
    as_written = target == "tensorrt" and form == "qdq"
    opened = session(file, threads=1, optimized=not as_written)
    have = model.run(opened, *inputs)
    for i, (a, b) in enumerate(zip(want, have, strict=True)):
        exact = not as_written and (i < 6 or form == "integer")
        torch.testing.assert_close(b, a, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-4, msg=lambda m, i=i: f"layer {i}: {m}")
    kinds = {t.data_type for t in onnx.load(file).graph.initializer if len(t.dims) == 2}
    assert (onnx.TensorProto.INT4 in kinds) == int4
    if as_written:
        assert onnx.TensorProto.UINT8 not in kinds


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bound"), [pytest.param(torch.float64, 1e-14, id="float64"), pytest.param(torch.float16, 1e-3, id="float16")]
)
def test_float64_and_half_keep_their_integers(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = linear(20, 37), torch.randn(3, 37, dtype=dtype)
    found = Translated(model, (x,))
    for form in ("native", "integer"):
        (have,) = found.run(session(found.written(tmp_path / f"{form}.onnx", form), threads=1, kernels=False), x)
        assert have.dtype == dtype
        torch.testing.assert_close(have, model(x), rtol=bound, atol=bound)


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"w{b}") for b in range(2, 9)])
def test_parts_cover_all_exponents_and_fit_a_byte(bits: int) -> None:
    for groups in range(1, 17):
        found = stretches(bits, groups)
        assert [e for low, high in found for e in range(low, high + 1)] == list(range(groups))
        assert all((2 ** (bits - 1) - 1) << (high - low) <= 127 for low, high in found)


def test_target_without_markers_is_left_alone() -> None:
    ir = pytest.importorskip("onnx_ir")
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="empty"), ir_version=10)
    assert not list(sites(model))
    lower_quantized(model, "native", TARGETS["onnxruntime"], 23)
    assert Build.known(None) is None
    assert not list(model.graph)
