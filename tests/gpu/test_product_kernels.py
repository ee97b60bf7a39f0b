"""Integer products and linear layers behind norms: kernels against exact integers and float64, and images of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.gpu.blocks import TENSOR_MEMORY_FROM
from normfuse.gpu.compile import CAPABILITIES, compiled
from normfuse.gpu.launch import Launch
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.planes import GROUPS, LARGEST_K, from_packed
from normfuse.gpu.product import plan_product
from normfuse.gpu.source import suited
from normfuse.ops._epilogue import activation, finish
from normfuse.ops._prepared import _on_gpu, gpu_weight
from normfuse.ops.rms_norm_linear import rms_norm_linear
from normfuse.quant.integers import integer_matmul, quantize_rows, quantize_static
from normfuse.quant.packing import pack
from normfuse.quant.weight import QuantizedWeight
from normfuse.words import EPILOGUES
from tests.gpu.interpreter import Case, interpret
from tests.gpu.test_planes import BITS, random_weight

pytest.importorskip("triton", reason="the kernels are written in Triton")

op = torch.ops.normfuse
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: What a stored result may be off by, relative: a rounding; the interpreter cuts where bfloat16 is rounded.
RTOL = {"fp32": 2e-6, "fp16": 2.0**-10, "bf16": 2.0**-7}


def _rows(m: int, k: int, seed: int = 0) -> Tensor:
    q = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    q[0] = 127
    return q


# -- kernels -----------------------------------------------------------------------------------------------------------


def _product(
    w: QuantizedWeight, q: Tensor, row_scale: Tensor, scale: Tensor, dtype: str = "fp32", hint: int = 1, **how: Any
) -> Case:
    n, k = w.codes.shape
    data, e = from_packed(pack(w).numpy(), w.exponents.numpy(), n, w.bits)
    inputs = {"q": q, "row_scale": row_scale, "planes": torch.tensor(data), "shifts": torch.tensor(e), "scale": scale}
    inputs |= {name: how[name] for name in ("bias", "residual") if how.get(name) is not None}
    kwargs = {name: name in inputs for name in ("bias", "residual")} | {
        "epilogue": how.get("epilogue", "none"), "rows_hint": hint
    }  # fmt: skip
    capability = 100 if how.get("separate") else 0
    return Case("normfuse.gpu.product:plan_product", (k, n, dtype, w.bits, w.groups), kwargs, inputs, capability)


#: Rows, inputs and outputs that fill no block, just one, and a bit more; the hint makes blocks of other sizes.
_SIZES = ((5, 67, 21, 1), (1, 128, 16, 1), (17, 130, 16, 1), (3, 33, 65, 20))


def _exact() -> dict[str, tuple[QuantizedWeight, Tensor]]:
    found = {}
    for bits in BITS:
        for groups in (1, 4, (2, 3, GROUPS)[bits % 3]):
            m, k, n, _ = _SIZES[(bits + groups) % len(_SIZES)]
            found[f"sum-{bits}-{groups}"] = random_weight(n, k, bits, groups, bits + groups), _rows(m, k, bits)
        k = 1000 if bits % 2 else 512  # tiles of K that several warps share, the last one not full
        groups = 4 if bits % 3 else 1
        found[f"split-{bits}-{groups}"] = random_weight(17, k, bits, groups, bits), _rows(3, k, bits)
        # each product of a turn with a sum of its own, as on 10.0; blocks of rows that are taken together, and some left over
        found[f"separate-{bits}-{groups}"] = random_weight(21, 300, bits, groups, bits), _rows(5, 300, bits)
        found[f"together-{bits}-{groups}"] = random_weight(70, 70, bits, groups, bits), _rows(150, 70, bits)
    return found


EXACT = _exact()


def _behind() -> Iterator[tuple[str, dict[str, Any]]]:
    """What comes behind the sum."""
    generator = torch.Generator().manual_seed(3)
    for i, epilogue in enumerate(EPILOGUES):
        for j, dtype in enumerate(DTYPES):
            bias = torch.randn(21, generator=generator) if (i + j) % 2 else None
            residual = torch.randn(6, 21, generator=generator).to(DTYPES[dtype]) if (i + j) % 3 else None
            yield f"behind-{epilogue}-{dtype}", {"epilogue": epilogue, "dtype": dtype, "bias": bias, "residual": residual}


BEHIND = dict(_behind())
LINEAR, LINEAR_ROWS, LINEAR_SCALE = random_weight(21, 90, 4, 4), _rows(6, 90), torch.rand(6, 1) * 0.01 + 0.001


def _norm_linears() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """kind, dtype, epilogue, hint, x, W, b"""
    generator = torch.Generator().manual_seed(4)
    sizes = ((5, 67, 21, 1), (1, 64, 16, 1), (17, 70, 70, 30))
    for i, (m, k, n, hint) in enumerate(sizes):
        for j, dtype in enumerate(DTYPES):
            for kind in ("rms", "crms"):
                x, w = (torch.randn(a, k, generator=generator).to(DTYPES[dtype]) for a in (m, n))
                bias = torch.randn(n, generator=generator).to(DTYPES[dtype]) if (i + j) % 2 else None
                yield f"norm-{kind}-{dtype}-{m}", (kind, dtype, EPILOGUES[(i + j) % 5], hint, x, w, bias)
    large = 1e4 * torch.randn(3, 80, generator=generator).clamp(-4, 4)  # its squares are no float16
    yield "norm-large", ("rms", "fp16", "none", 1, large.half(), torch.randn(9, 80, generator=generator).half(), None)
    x, w = torch.randn(150, 64, generator=generator), torch.randn(70, 64, generator=generator)
    yield "norm-together", ("rms", "fp32", "none", 100, x, w, None)
    yield "norm-zeros", ("rms", "fp32", "none", 1, torch.zeros(2, 80), torch.randn(9, 80, generator=generator), torch.ones(9))


NORM_LINEARS = dict(_norm_linears())
EPS = 1e-5


def _norm_linear_case(kind: str, dtype: str, epilogue: str, hint: int, x: Tensor, w: Tensor, bias: Tensor | None) -> Case:
    kwargs = {"bias": bias is not None, "eps": EPS, "epilogue": epilogue, "rows_hint": hint}
    inputs = {"x": x, "weight": w} | ({} if bias is None else {"bias": bias})
    return Case("normfuse.gpu.norm_linear:plan_norm_linear", (kind, w.shape[1], w.shape[0], dtype), kwargs, inputs)


def _operators() -> Iterator[tuple[str, Case]]:
    """The functions that the operators are on a GPU."""
    w, x = random_weight(19, 45, 6, 4, 5), torch.randn(2, 3, 45, generator=torch.Generator().manual_seed(5))
    packed, bias = (pack(w), w.exponents, w.scale), torch.linspace(-1, 1, 19)
    q, s, residual = _rows(6, 45).view(2, 3, 45), torch.rand(2, 3, 1) + 0.5, torch.randn(2, 3, 19)
    linear, matmul, norm = (f"normfuse.ops.{n}" for n in ("shiftquant_linear", "shiftquant_matmul", "rms_norm_linear"))
    yield "shiftquant_linear-rows", Case(f"{linear}:SHIFTQUANT_LINEAR.on_gpu", (x, *packed, bias, None, 6, 8, "gelu"))
    yield (
        "shiftquant_linear-static",
        Case(f"{linear}:SHIFTQUANT_LINEAR.on_gpu", (x.half(), *packed, None, torch.tensor(0.03), 6, 8)),
    )
    yield "shiftquant_linear-flat", Case(f"{linear}:SHIFTQUANT_LINEAR.on_gpu", (x[0, 0], *packed, bias, None, 6, 4))
    yield "shiftquant_linear-strided", Case(f"{linear}:SHIFTQUANT_LINEAR.on_gpu", (x.transpose(0, 1), *packed, bias, None, 6, 8))
    yield "shiftquant_linear-empty", Case(f"{linear}:SHIFTQUANT_LINEAR.on_gpu", (x[:0], *packed, bias, None, 6, 8))
    yield "shiftquant_matmul-rows", Case(f"{matmul}:SHIFTQUANT_MATMUL.on_gpu", (q, s, *packed, bias, residual, 6, "silu"))
    yield (
        "shiftquant_matmul-one",
        Case(f"{matmul}:SHIFTQUANT_MATMUL.on_gpu", (q, torch.tensor(0.5), *packed, None, None, 6, "none")),
    )
    yield "shiftquant_matmul-float64", Case(f"{matmul}:SHIFTQUANT_MATMUL.on_gpu", (q, s.double(), *packed, None, None, 6, "none"))
    yield (
        "shiftquant_matmul_quantize-rows",
        Case(f"{matmul}:SHIFTQUANT_MATMUL_QUANTIZE.on_gpu", (q, s, *packed, bias, residual, 6, "relu", 8)),
    )
    many = QuantizedWeight(w.codes, w.exponents + 7, w.scale, 6)  # more exponents than the kernels take: the definition
    yield (
        "shiftquant_linear-many",
        Case(f"{linear}:SHIFTQUANT_LINEAR.on_gpu", (x, pack(many), many.exponents, many.scale, bias, None, 6, 8)),
    )
    yield (
        "rms_norm_linear-fp32",
        Case(f"{norm}:RMS_NORM_LINEAR.on_gpu", (x, torch.randn(7, 45), torch.ones(7).half(), 1e-6, "gelu")),
    )
    yield "rms_norm_linear-fp16", Case(f"{norm}:RMS_NORM_LINEAR.on_gpu", (x.half(), torch.randn(7, 45).half(), None, 1e-6))


OPERATORS = dict(_operators())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    cases = {
        key: _product(
            w, q, torch.ones(len(q), 1), torch.ones(len(w.codes)), hint=_hint(key), separate=key.startswith("separate")
        )
        for key, (w, q) in EXACT.items()
    }  # fmt: skip
    cases |= {key: _product(LINEAR, LINEAR_ROWS, LINEAR_SCALE, LINEAR.scale, **how) for key, how in BEHIND.items()}
    cases |= {
        "nan": _product(LINEAR, LINEAR_ROWS, LINEAR_SCALE * torch.tensor([[1], [torch.nan], [1], [1], [1], [1]]), LINEAR.scale)
    }
    cases |= {key: _norm_linear_case(*of) for key, of in NORM_LINEARS.items()}
    return interpret(cases | OPERATORS, tmp_path_factory.mktemp("interpreter"))


def _hint(key: str) -> int:
    what, bits, groups = key.split("-")
    if what == "sum":
        return _SIZES[(int(bits) + int(groups)) % len(_SIZES)][3]
    return {"together": 100, "separate": 32}.get(what, 1)


def _close(found: Tensor, expected: Tensor, dtype: str) -> None:
    bound = RTOL[dtype] * expected.abs() + RTOL["fp32"] * float(expected.abs().max())
    assert found.dtype == DTYPES[dtype]
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("key", [pytest.param(k, id=k) for k in EXACT])
def test_sums_are_exact(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    """With scales of 1 the floats are the integers; beyond 2^24 they are the integers rounded once."""
    w, q = EXACT[key]
    assert w.groups == int(key.rpartition("-")[2])
    assert torch.equal(results[key][0], (q.long() @ w.operand().long().T).float())


@pytest.mark.parametrize("key", [pytest.param(k, id=k) for k in BEHIND])
def test_what_comes_behind_the_sum(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    how, acc = BEHIND[key], integer_matmul(LINEAR_ROWS, LINEAR.operand())
    expected = finish(acc, LINEAR_SCALE, LINEAR.scale, how["bias"], how["epilogue"], how["residual"], torch.float64)
    _close(results[key][0], expected, how["dtype"])


def test_rows_without_a_scale_are_nan(results: dict[str, tuple[Tensor, ...]]) -> None:
    assert results["nan"][0].isnan().all(1).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("key", [pytest.param(k, id=k) for k in NORM_LINEARS])
def test_norm_and_linear_are_those_of_float64(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    kind, dtype, epilogue, _, x, w, bias = NORM_LINEARS[key]
    wide, d = x.double(), x.shape[-1]
    square, total = wide.square().sum(-1, keepdim=True), wide.sum(-1, keepdim=True)
    mean = square / d if kind == "rms" else (square + total.square()) / (d + 1)
    y = (wide / (mean + EPS).sqrt()) @ w.double().T
    _close(results[key][0], activation(y if bias is None else y + bias.double(), epilogue), dtype)


@pytest.mark.parametrize("key", [pytest.param(k, id=k) for k in OPERATORS])
def test_operators_are_their_definitions(key: str, results: dict[str, tuple[Tensor, ...]]) -> None:
    args, name = OPERATORS[key].args, key.partition("-")[0]
    if name != "rms_norm_linear":  # scales from the same rows, sums exact: the result differs by roundings of what is behind
        with torch.no_grad():
            expected = getattr(op, name)(*args)
    else:
        expected = rms_norm_linear(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for found, value in zip(results[key], expected, strict=True):
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        if value.dtype == torch.int8:
            assert int((found.int() - value.int()).abs().max()) <= 1
            assert float((found == value).float().mean()) > 0.99
        else:
            wide = value.dtype == torch.float16
            torch.testing.assert_close(found, value, rtol=2e-3 if wide else 2e-6, atol=2e-3 if wide else 2e-6)


def test_static_and_dynamic_rows_are_those_of_the_definition() -> None:
    """The definition that the operators are compared with, once more from its parts."""
    args = OPERATORS["shiftquant_linear-static"].args
    w = random_weight(19, 45, 6, 4, 5)
    acc = integer_matmul(quantize_static(args[0], 0.03, 8), w.operand())
    expected = finish(acc, torch.tensor(0.03), w.scale, None, "none", None, torch.float32).half()
    torch.testing.assert_close(op.shiftquant_linear(*args), expected, rtol=2e-3, atol=1e-4)
    x = OPERATORS["shiftquant_linear-rows"].args[0]
    assert quantize_rows(x, 8)[1].shape == (2, 3, 1)


# -- weights on the device ---------------------------------------------------------------------------------------------


def test_planes_are_made_once_and_live_as_long_as_the_weight() -> None:
    w = random_weight(19, 45, 4, 3)
    packed, bias = pack(w), torch.zeros(19)
    first = gpu_weight(packed, w.exponents, w.scale, bias, None, 4)
    assert first is not None
    assert first.groups == 3
    assert first.static is None
    assert gpu_weight(packed, w.exponents, w.scale, bias, None, 4) is first
    static = gpu_weight(packed, w.exponents, w.scale, bias, torch.tensor(0.5), 4)
    assert static is not None
    assert static.static == 0.5
    packed.copy_(pack(QuantizedWeight(-w.codes, w.exponents, w.scale, 4)))
    again = gpu_weight(packed, w.exponents, w.scale, bias, None, 4)
    assert again is not None
    assert not torch.equal(again.planes, first.planes)
    number = id(packed)
    assert number in _on_gpu
    del packed
    assert number not in _on_gpu


def test_weights_that_the_kernels_do_not_take() -> None:
    w = random_weight(4, 10, 4, 12)
    assert gpu_weight(pack(w), w.exponents, w.scale, None, None, 4) is None


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [pytest.param(h, id=f"{h}rows") for h in (1, 20, 100, 5000)])
def test_plans_fit_every_device(hint: int) -> None:
    for bits in BITS:
        for groups in range(1, GROUPS + 1):
            for n in (7, 768, 11008):
                launch = plan_product(
                    768, n, "fp16", bits, groups, bias=True, residual=False, epilogue="none", rows_hint=hint
                )  # fmt: skip
                c, sums = launch.constants, 1 if bits + groups <= 9 else 2
                block, rows = int(c["BLOCK"] or 0), int(c["BLOCK_ROWS"] or 0)
                assert launch.columns == -(-n // block)
                assert launch.rows_each == rows
                stage = int(c["INNER"] or 0) * (int(c["PIECES"] or 0) * block + int(c["TURNS"] or 0) * rows)
                assert launch.stages >= 2
                assert launch.stages * stage <= 99 << 10
                assert block < 64 or rows * int(c["TURNS"] or 0) * sums <= 256  # see `normfuse.gpu.blocks`


def test_sums_are_separate_where_they_are_in_tensor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = plan_product(768, 768, "fp16", 4, 4, bias=True, residual=False, epilogue="none", rows_hint=4096)
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.7.1")  # the last one whose products of int8 keep sums in registers there
    assert not any(suited(launch, c).constants["SEPARATE"] for c in CAPABILITIES)
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    assert not any(suited(launch, c).constants["SEPARATE"] for c in CAPABILITIES if c != 100)
    assert suited(launch, 100).constants == {**launch.constants, "SEPARATE": True}
    norm = plan_norm_linear("rms", 768, 768, "fp16", bias=True, eps=EPS, epilogue="silu", rows_hint=1000)
    narrow = plan_product(768, 768, "fp16", 3, 8, bias=True, residual=False, epilogue="none", rows_hint=4096)
    assert int(narrow.constants["BLOCK"] or 0) < TENSOR_MEMORY_FROM
    for other in (norm, narrow):
        assert suited(other, 100) is other


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (16, 1), (100, 4), (1000, 8), (4096, 8)])
def test_many_rows_share_the_weights_of_a_wave(rows: int, expected: int) -> None:
    launch = plan_product(4096, 4096, "fp16", 4, 1, bias=False, residual=False, epilogue="none", rows_hint=rows)
    assert launch.constants["TOGETHER"] == expected


def test_rows_hint_is_only_a_hint() -> None:
    how: dict[str, Any] = {"bias": True, "residual": False, "epilogue": "none"}
    assert plan_product(64, 64, "fp16", 4, 1, rows_hint=3, **how) is plan_product(64, 64, "fp16", 4, 1, rows_hint=9, **how)
    assert plan_product(64, 64, "fp16", 4, 1, rows_hint=3, **how) != plan_product(64, 64, "fp16", 4, 1, rows_hint=999, **how)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"bits": 9}, "9 bits", id="bits"),
        pytest.param({"groups": 9}, "9 groups", id="groups"),
        pytest.param({"k": LARGEST_K + 1}, str(LARGEST_K), id="k"),
        pytest.param({"n": 0}, "at least one output", id="n"),
        pytest.param({"dtype": "fp64"}, "'fp64'", id="dtype"),
        pytest.param({"epilogue": "tanh"}, "'tanh'", id="epilogue"),
    ],
)
def test_product_refuses(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"k": 64, "n": 64, "dtype": "fp16", "bits": 4, "groups": 4, "epilogue": "none"} | changed
    with pytest.raises(UsageError, match=message):
        plan_product(**given, bias=False, residual=False, rows_hint=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"kind": "layer"}, "'layer'", id="kind"),
        pytest.param({"k": 0}, "at least one input", id="k"),
        pytest.param({"dtype": "i8"}, "'i8'", id="dtype"),
        pytest.param({"epilogue": "tanh"}, "'tanh'", id="epilogue"),
    ],
)
def test_norm_and_linear_refuses(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"kind": "rms", "k": 64, "n": 64, "dtype": "fp16", "epilogue": "none"} | changed
    with pytest.raises(UsageError, match=message):
        plan_norm_linear(**given, bias=False, eps=EPS, rows_hint=1)


# -- images ------------------------------------------------------------------------------------------------------------


def _images() -> Iterator[Any]:
    few = plan_product(768, 768, "fp16", 4, 4, bias=True, residual=True, epilogue="gelu", rows_hint=1)
    many = plan_product(768, 768, "bf16", 6, 3, bias=False, residual=False, epilogue="none", rows_hint=1000)
    bytes_ = plan_product(768, 768, "fp16", 8, 1, bias=False, residual=False, epilogue="none", rows_hint=4096)
    two = plan_product(90, 33, "fp32", 8, 4, bias=True, residual=False, epilogue="silu", rows_hint=100)
    norm = plan_norm_linear("rms", 768, 768, "fp16", bias=True, eps=EPS, epilogue="silu", rows_hint=1000)
    for name, launch, capabilities in (
        ("few", few, CAPABILITIES),
        ("many", many, (100,)),
        ("bytes", bytes_, (80, 89, 90, 100)),
        ("two", two, (86,)),
        ("norm", norm, (90, 100)),
    ):
        for capability in capabilities:
            yield pytest.param(launch, capability, id=f"{name}-sm{capability}")


@pytest.mark.parametrize(("launch", "capability"), list(_images()))
def test_images_multiply_on_tensor_cores(launch: Launch, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    image = compiled(launch, capability)
    kind = "s8|i8" if launch.kernel == "product.product" else "f16"
    assert re.search(rf"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*({kind})", image.ptx)
    assert "trap;" not in image.ptx
    assert image.shared <= 99 << 10
    if launch.kernel == "product.product":  # codes stay packed in registers: no byte is taken out of one
        assert image.ptx.count("prmt") <= 64


# -- ONNX --------------------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    def __init__(self, bias: bool, epilogue: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.weight = nn.Parameter(torch.randn(9, 14, generator=generator))
        self.bias = nn.Parameter(torch.randn(9, generator=generator)) if bias else None
        self.epilogue = epilogue

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = op.rms_norm_linear(x, self.weight, self.bias, EPS, self.epilogue)
        return y


@pytest.mark.parametrize("epilogue", [pytest.param(e, id=e) for e in EPILOGUES])
def test_onnx_body_is_the_operator(epilogue: str) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from normfuse.export.ops import DOMAIN, OPS, FunctionBody

    ir = pytest.importorskip("onnx_ir")
    layer, x = _Layer(epilogue != "relu", epilogue), torch.randn(2, 3, 14)
    facts: dict[str, Any] = {"eps": EPS, "epilogue": epilogue}
    present = (True, True, layer.bias is not None)
    function = FunctionBody(OPS["RmsNormLinear"], present, 21).function("", facts, 1)
    given = {"x": x, "weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("RmsNormLinear", list(given), ["y"], domain=DOMAIN, **facts)],
        "one",
        [helper.make_tensor_value_info(name, 1, list(v.shape)) for name, v in given.items()],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[ir.to_proto(function)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: v.detach().numpy() for name, v in given.items()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_onnx_file_holds_standard_ops(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from normfuse.export import to_onnx
    from normfuse.export.onnx.inspect import op_counts

    layer, x = _Layer(True, "gelu").eval(), torch.randn(2, 3, 14)
    exported = torch.export.export(layer, (x,)).module()
    path = tmp_path / "layer.onnx"
    to_onnx(exported, path, example_inputs=(x,), target="portable", measure_seconds=0.0, progress=False)
    assert not [name for name in op_counts(path) if name.startswith("normfuse")]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x).detach(), rtol=1e-5, atol=1e-5)
