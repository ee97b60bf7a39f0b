"""The native kernels as operators of ONNX Runtime: the same integers, every layout, and a clear refusal of everything else."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from normfuse import native, words
from normfuse.ops._epilogue import finish
from normfuse.quant.integers import integer_matmul, quantize_rows, quantize_static
from normfuse.quant.packing import pack
from normfuse.quant.weight import QuantizedWeight
from tests.ops.quantized import in_blocks

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")

F, U8, I8 = 1, 2, 3
EPILOGUES = words.EPILOGUES


def _model(
    op: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[int],
    *,
    constants: Sequence[int] = (),
    functions: Sequence[Any] = (),
    **attributes: Any,
) -> Any:
    """One node; inputs that are None are absent, those in `constants` are initializers."""
    names = ["" if t is None else f"in{i}" for i, t in enumerate(inputs)]
    codes = {torch.float32: F, torch.uint8: U8, torch.int8: I8, torch.float64: 11}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                op, names, [f"out{i}" if t else "" for i, t in enumerate(outputs)], domain="normfuse", **attributes
            )
        ],
        "one",
        [
            onnx.helper.make_tensor_value_info(names[i], codes[t.dtype], [f"d{i}_{a}" for a in range(t.ndim)])
            for i, t in enumerate(inputs)
            if t is not None and i not in constants
        ],
        [onnx.helper.make_tensor_value_info(f"out{i}", t, None) for i, t in enumerate(outputs) if t],
        [onnx.numpy_helper.from_array(t.numpy(), names[i]) for i, t in enumerate(inputs) if t is not None and i in constants],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("normfuse", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)


def _session(model: Any, *, kernels: bool = True, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if kernels:
        options.register_custom_ops_library(str(native.path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(op: str, inputs: Sequence[Tensor | None], outputs: Sequence[int], *, threads: int = 1, **how: Any) -> list[Tensor]:
    constants = how.pop("constants", ())
    session = _session(_model(op, inputs, outputs, constants=constants, **how), threads=threads)
    feeds = {f"in{i}": t.numpy() for i, t in enumerate(inputs) if t is not None and i not in constants}
    return [torch.from_numpy(v) for v in session.run(None, feeds)]


def _weight(n: int, k: int, bits: int, groups: int) -> QuantizedWeight:
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (n, k), dtype=torch.int8)
    exponents = torch.randint(0, groups, (k,), dtype=torch.uint8)
    exponents[0] = groups - 1
    return QuantizedWeight(codes, exponents, torch.rand(n) * 0.02 + 0.001, bits)


# -- linear ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constants", [pytest.param((1, 2, 3, 4), id="constant"), pytest.param((), id="given")])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_linear_is_its_definition(epilogue: str, constants: tuple[int, ...]) -> None:
    w, x, bias, residual = _weight(21, 37, 4, 3), torch.randn(2, 5, 37), torch.randn(21), torch.randn(2, 5, 21)
    how: dict[str, Any] = {"bits": 4, "activation_bits": 8, "epilogue": epilogue}
    (found,) = _run("ShiftQuantLinear", [x, pack(w), w.exponents, w.scale, bias, residual], [F], constants=constants, **how)
    q, s = quantize_rows(x, 8)
    expected = finish(integer_matmul(q, w.operand()), s, w.scale, bias, epilogue, residual, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constants", [pytest.param((1, 2, 3, 6), id="constant"), pytest.param((), id="given")])
@pytest.mark.parametrize("residual", [pytest.param(None, id="none"), pytest.param(torch.zeros(1), id="zero")])
def test_blocks_are_their_definition(residual: Tensor | None, constants: tuple[int, ...]) -> None:
    """One 0 stands for a residual that is not there."""
    w = in_blocks(21, 70)
    x = torch.randn(2, 5, 70)
    inputs = [x, w.weight, w.exponents, w.scale, w.bias, residual, w.multipliers]
    (found,) = _run("ShiftQuantLinear", inputs, [F], constants=constants, bits=4, activation_bits=8)
    q, s = quantize_rows(x, 8)
    expected = finish(integer_matmul(q, w.operand.int()), s, w.scale, w.bias, "none", None, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_products_are_exact(bits: int) -> None:
    """Scales that are powers of two: the floats are the integers."""
    w = _weight(19, 50, bits, 4)
    w = QuantizedWeight(w.codes, w.exponents, torch.full((19,), 0.5), bits)
    q, row = torch.randint(-127, 128, (3, 50), dtype=torch.int8), torch.tensor([[1.0], [2.0], [0.25]])
    (found,) = _run("ShiftQuantMatMul", [q, row, pack(w), w.exponents, w.scale], [F], constants=(2, 3, 4), bits=bits)
    assert torch.equal(found, integer_matmul(q, w.operand()).float() * row * 0.5)


def test_static_scale_is_an_attribute() -> None:
    w, x = _weight(16, 32, 8, 1), torch.randn(4, 32)
    (found,) = _run("ShiftQuantLinear", [x, pack(w), w.exponents, w.scale], [F], constants=(1, 2, 3), bits=8, input_scale=0.03125)
    q = quantize_static(x, 0.03125, 8)
    expected = finish(integer_matmul(q, w.operand()), torch.tensor(0.03125), w.scale, None, "none", None, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_linear_is_rows_and_matmul() -> None:
    w, x, bias = _weight(40, 64, 4, 4), torch.randn(7, 64), torch.randn(40)
    tail = [pack(w), w.exponents, w.scale, bias]
    q, s = _run("QuantizeRows", [x], [I8, F], bits=8)
    (whole,) = _run("ShiftQuantLinear", [x, *tail], [F], constants=(1, 2, 3, 4), bits=4, epilogue="gelu")
    (parts,) = _run("ShiftQuantMatMul", [q, s, *tail], [F], constants=(2, 3, 4, 5), bits=4, epilogue="gelu")
    again = _run("ShiftQuantMatMulQuantize", [q, s, *tail], [I8, F], constants=(2, 3, 4, 5), bits=4, epilogue="gelu", out_bits=8)
    assert torch.equal(whole, parts)
    codes, scale = quantize_rows(parts, 8)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)


def test_rows_are_the_integers_of_the_definition() -> None:
    x = torch.randn(3, 4, 70) * torch.logspace(-6, 6, 12).reshape(3, 4, 1)
    x[1, 2] = 0
    for bits in (2, 5, 8):
        q, s = _run("QuantizeRows", [x], [I8, F], bits=bits)
        expected_q, expected_s = quantize_rows(x, bits)
        assert torch.equal(q, expected_q)
        assert torch.equal(s, expected_s)


def test_one_scale_for_all_rows() -> None:
    w, q = _weight(16, 24, 4, 2), torch.randint(-127, 128, (5, 24), dtype=torch.int8)
    tail = [pack(w), w.exponents, w.scale]
    (one,) = _run("ShiftQuantMatMul", [q, torch.tensor(0.5), *tail], [F], bits=4)
    (each,) = _run("ShiftQuantMatMul", [q, torch.full((5, 1), 0.5), *tail], [F], bits=4)
    assert torch.equal(one, each)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 32), (32,), (1, 1, 1, 1, 1, 1, 2, 32)], ids=str)
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    w, x = _weight(17, 32, 4, 2), torch.randn(shape)
    (found,) = _run("ShiftQuantLinear", [x, pack(w), w.exponents, w.scale], [F], constants=(1, 2, 3), bits=4)
    assert found.shape == (*shape[:-1], 17)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_threads_change_nothing(rows: int) -> None:
    w, x = _weight(300, 256, 4, 4), torch.randn(rows, 256)
    inputs = [x, pack(w), w.exponents, w.scale]
    one, two = (_run("ShiftQuantLinear", inputs, [F], constants=(1, 2, 3), bits=4, threads=t)[0] for t in (1, 2))
    assert torch.equal(one, two)


def test_absent_inputs_in_the_middle() -> None:
    w, x, residual = _weight(8, 16, 4, 2), torch.randn(3, 16), torch.randn(3, 8)
    tail = [pack(w), w.exponents, w.scale]
    (plain,) = _run("ShiftQuantLinear", [x, *tail], [F], constants=(1, 2, 3), bits=4)
    (added,) = _run("ShiftQuantLinear", [x, *tail, None, residual], [F], constants=(1, 2, 3), bits=4)
    assert torch.equal(added, plain + residual)


# -- norms -------------------------------------------------------------------------------------------------------------


def _norm(kind: str, s: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, c: float) -> Tensor:
    s = s.double()
    match kind:
        case "rms":
            y = s / (s.square().mean(-1, keepdim=True) + eps).sqrt()
        case "crms":
            y = s / ((s.square().sum(-1, keepdim=True) + s.sum(-1, keepdim=True).square()) / (s.shape[-1] + 1) + eps).sqrt()
        case "l1":
            s = s - s.mean(-1, keepdim=True)
            y = s / (c * s.abs().mean(-1, keepdim=True) + eps)
        case _:
            s = s - s.mean(-1, keepdim=True)
            y = s / (s.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if gain is None else y * gain
    return (y if shift is None else y + shift).float()


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("op", ["RmsNorm", "CrmsNorm", "L1Norm"])
def test_norms_are_their_definition(op: str, residual: bool) -> None:
    x, gain, shift = torch.randn(3, 5, 67) + 0.3, torch.randn(67), torch.randn(67)
    add = torch.randn(3, 5, 67) if residual else None
    l1 = op == "L1Norm"
    inputs = [x, gain, shift, add] if l1 else [x, gain, add]
    how = {"eps": 1e-4, "scale_const": 1.25} if l1 else {"eps": 1e-4}
    y, total = _run(op, inputs, [F, F], **how)
    s = x if add is None else x + add
    assert torch.equal(total, s)
    expected = _norm(op.removesuffix("Norm").lower(), s, gain, shift if l1 else None, 1e-4, 1.25)
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
    (alone,) = _run(op, inputs, [F], **how)
    assert torch.equal(alone, y)


@pytest.mark.parametrize("kind", ["layer", "rms", "crms", "l1"])
def test_norm_quantize_is_both(kind: str) -> None:
    x, residual, gain, shift = torch.randn(6, 48), torch.randn(6, 48), torch.randn(48), torch.randn(48)
    q, scale, total = _run("NormQuantize", [x, gain, shift, residual], [I8, F, F], kind=kind, eps=1e-5, scale_const=1.0, bits=8)
    assert scale.shape == (6, 1)
    assert torch.equal(total, x + residual)
    y = _norm(kind, x + residual, gain, shift, 1e-5, 1.0)
    expected, expected_scale = quantize_rows(y, 8)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    assert (q.int() - expected.int()).abs().max() <= 1  # y itself is rounded differently
    bare = _run("NormQuantize", [x, gain, shift, residual], [I8, F], kind=kind, eps=1e-5, scale_const=1.0, bits=8)
    assert torch.equal(bare[0], q)
    assert torch.equal(bare[1], scale)


def test_softmax() -> None:
    x = torch.randn(2, 3, 45) * 20
    (y,) = _run("TwoPassSoftmax", [x], [F])
    torch.testing.assert_close(y, x.softmax(-1), rtol=1e-5, atol=1e-7)


# -- convolution -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 6])
def test_convolution_is_its_definition(group: int) -> None:
    channels, outputs, kernel = 6, 12, (3, 2)
    parts = [_weight(outputs // group, channels // group * 6, 4, 1).codes for _ in range(group)]
    exponents = torch.randint(0, 3, (channels,), dtype=torch.uint8)
    scale, bias, x = torch.rand(outputs) * 0.02, torch.randn(outputs), torch.randn(2, channels, 9, 8)
    columns = [e.repeat(6) for e in exponents.chunk(group)]  # taps are slow, channels fast
    scales = scale.chunk(group)
    quantized = [QuantizedWeight(c, e, s, 4) for c, e, s in zip(parts, columns, scales, strict=True)]
    packed = torch.cat([pack(w) for w in quantized])
    geometry = {"kernel": list(kernel), "strides": [2, 1], "pads": [1, 0, 1, 1], "dilations": [1, 2], "group": group}
    inputs = [x, packed, exponents, scale, bias]
    (found,) = _run("ShiftQuantConv2d", inputs, [F], constants=(1, 2, 3, 4), bits=4, epilogue="relu", **geometry)
    absmax = x.abs().amax((1, 2, 3), keepdim=True)
    q = (x * (127 / absmax)).round().clamp(-127, 127)
    full = [w.operand().double().reshape(outputs // group, 3, 2, channels // group).permute(0, 3, 1, 2) for w in quantized]
    padded = torch.nn.functional.pad(q.double(), (0, 1, 1, 1))
    acc = torch.nn.functional.conv2d(padded, torch.cat(full), None, (2, 1), 0, (1, 2), group)
    expected = (acc.float() * (absmax / 127 * scale[:, None, None]) + bias[:, None, None]).relu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- attention ---------------------------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        queries, keys = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(queries, keys).triu(1 + keys - queries).bool(), -torch.inf)
    return (scores.softmax(-1) @ v.double()).float()


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [None, (7,), (5, 7), (2, 1, 1, 7), (1, 4, 5, 7)], ids=str)
def test_attention_with_heads_first(mask: tuple[int, ...] | None, causal: int) -> None:
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    bias = None if mask is None else torch.randn(mask)
    (found,) = _run("Attention", [q, k, v, bias], [F], causal=causal, scale=0.25)
    expected = _attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), bias, bool(causal))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_with_tokens_first_and_packed() -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    expected = _attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None, True).transpose(1, 2).flatten(2)
    rows = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    (apart,) = _run("Attention", rows, [F], causal=1, heads=4, kv_heads=2, layout="bthd")
    (packed,) = _run("Attention", [torch.cat(rows, -1)], [F], causal=1, heads=4, kv_heads=2, layout="packed")
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(apart, packed)


# -- files that run everywhere -----------------------------------------------------------------------------------------


def _negated_rms() -> Any:
    """A body that is wrong on purpose, so that one sees which of the two ran."""
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    return onnx.helper.make_function(
        "normfuse", "RmsNorm", ["x", "gain"], ["y"], [node], [onnx.helper.make_opsetid("", 20)], attributes=["eps"]
    )


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_a_kernel_comes_before_the_body_of_the_same_name(level: str) -> None:
    x, gain = torch.randn(3, 8), torch.ones(8)
    model = _model("RmsNorm", [x, gain], [F], constants=(1,), functions=[_negated_rms()], eps=0.0)
    found = {}
    for kernels in (False, True):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        if kernels:
            options.register_custom_ops_library(str(native.path()))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[kernels] = torch.from_numpy(session.run(None, {"in0": x.numpy()})[0])
    assert torch.equal(found[False], -x)
    torch.testing.assert_close(found[True], _norm("rms", x, gain, None, 0.0, 1.0), rtol=2e-6, atol=2e-6)


def test_constant_inputs_are_folded_by_the_kernel() -> None:
    """ONNX Runtime runs a node of constants when it loads, with weights that do not outlive it."""
    w, x = _weight(8, 16, 4, 2), torch.randn(3, 16)
    inputs = [x, pack(w), w.exponents, w.scale]
    (given,) = _run("ShiftQuantLinear", inputs, [F], constants=(1, 2, 3), bits=4)
    (folded,) = _run("ShiftQuantLinear", inputs, [F], constants=(0, 1, 2, 3), bits=4)
    assert torch.equal(given, folded)


def test_a_session_outlives_its_options() -> None:
    x = torch.randn(2, 8)
    session = _session(_model("TwoPassSoftmax", [x], [F]))
    again = _session(_model("TwoPassSoftmax", [x], [F]))
    del session
    assert np.isfinite(again.run(None, {"in0": x.numpy()})[0]).all()


# -- refusals ----------------------------------------------------------------------------------------------------------


def _linear(**changes: Any) -> tuple[str, list[Tensor | None], list[int], dict[str, Any]]:
    w = _weight(8, 16, 4, 2)
    inputs = {
        "x": torch.randn(3, 16),
        "weight": pack(w),
        "exponents": w.exponents,
        "scale": w.scale,
        "bias": None,
        "residual": None,
        "multipliers": None,
    }
    attributes: dict[str, Any] = {"bits": 4}
    for name, value in changes.items():
        if name in inputs:
            inputs[name] = value
        else:
            attributes[name] = value
    return "ShiftQuantLinear", list(inputs.values()), [F], attributes


def _in_blocks(multipliers: Tensor) -> tuple[str, list[Tensor | None], list[int], dict[str, Any]]:
    w = _weight(8, 16, 4, 1)
    return _linear(weight=pack(w), exponents=w.exponents, multipliers=multipliers)


def _conv(**changes: Any) -> tuple[str, list[Tensor | None], list[int], dict[str, Any]]:
    w = _weight(4, 18, 4, 1)
    x = changes.pop("x", torch.randn(1, 2, 5, 5))
    return "ShiftQuantConv2d", [x, pack(w), w.exponents[:2], w.scale], [F], {"bits": 4, "kernel": [3, 3], **changes}


HOSTILE = {
    "bits": (_linear(bits=9), "bits: found 9, expected 2 to 8"),
    "other bits": (_linear(bits=5), "bytes"),
    "activation_bits": (_linear(activation_bits=1), "activation_bits: found 1"),
    "epilogue": (_linear(epilogue="tanh"), 'epilogue: found "tanh"'),
    "long epilogue": (_linear(epilogue="x" * 1000), "too long"),
    "input_scale": (_linear(input_scale=-1.0), "input_scale"),
    "input_scale nan": (_linear(input_scale=float("nan")), "finite"),
    "x channels": (_linear(x=torch.randn(3, 15)), "expected 16 channels"),
    "x scalar": (_linear(x=torch.tensor(1.0)), "expected 16 channels"),
    "x rank": (_linear(x=torch.randn(1, 1, 1, 1, 1, 1, 1, 1, 16)), "at most 8"),
    "weight short": (_linear(weight=torch.zeros(7, dtype=torch.uint8)), "too few"),
    "weight long": (_linear(weight=torch.zeros(7000, dtype=torch.uint8)), "expected"),
    "weight empty": (_linear(weight=torch.zeros(0, dtype=torch.uint8)), "too few"),
    "weight rank": (_linear(weight=torch.zeros(2, 64, dtype=torch.uint8)), "one dimension"),
    "exponents large": (_linear(exponents=torch.full((16,), 16, dtype=torch.uint8)), "expected 0 to 15"),
    "exponents empty": (_linear(exponents=torch.zeros(0, dtype=torch.uint8)), "one for each input"),
    "scale empty": (_linear(scale=torch.zeros(0)), "one for each output"),
    "scale rank": (_linear(scale=torch.zeros(8, 1)), "one for each output"),
    "bias": (_linear(bias=torch.zeros(9)), "bias: found"),
    "residual": (_linear(residual=torch.zeros(3, 9)), "residual: found"),
    "multipliers rank": (_in_blocks(torch.ones(1, 16, dtype=torch.int8)), "multipliers: found [1, 16]"),
    "multipliers panels": (_in_blocks(torch.ones(2, 1, 16, dtype=torch.int8)), "expected [1, blocks, 16]"),
    "multipliers blocks": (_in_blocks(torch.ones(1, 2, 16, dtype=torch.int8)), "2 blocks of 16 inputs"),
    "multipliers large": (_in_blocks(torch.full((1, 1, 16), -16, dtype=torch.int8)), "expected 1 to 15 and their negatives"),
    "multipliers zero": (_in_blocks(torch.zeros(1, 1, 16, dtype=torch.int8)), "expected 1 to 15 and their negatives"),
    "multipliers and exponents": (_linear(multipliers=torch.ones(1, 1, 16, dtype=torch.int8)), "exponents of 0"),
    "row_scale": (
        ("ShiftQuantMatMul", [torch.zeros(3, 16, dtype=torch.int8), torch.ones(2, 1), *_linear()[1][1:4]], [F], {"bits": 4}),
        "row_scale",
    ),
    "norm gain": (("RmsNorm", [torch.randn(3, 8), torch.ones(7)], [F], {}), "gain: found"),
    "norm residual": (("RmsNorm", [torch.randn(3, 8), None, torch.ones(3, 1)], [F], {}), "residual: found"),
    "norm empty": (("RmsNorm", [torch.randn(3, 0)], [F], {}), "expected features"),
    "norm scalar": (("RmsNorm", [torch.tensor(1.0)], [F], {}), "expected features"),
    "norm kind": (("NormQuantize", [torch.randn(3, 8)], [I8, F], {"kind": "l2"}), 'found "l2"'),
    "no kind": (("NormQuantize", [torch.randn(3, 8)], [I8, F], {}), 'found ""'),
    "softmax scalar": (("TwoPassSoftmax", [torch.tensor(1.0)], [F], {}), "at least one dimension"),
    "rows scalar": (("QuantizeRows", [torch.tensor(1.0)], [I8, F], {}), "at least one dimension"),
    "no kernel": (_conv(kernel=[]), "kernel: found 0 integers"),
    "kernel of one": (_conv(kernel=[3]), "found 1 integers"),
    "huge kernel": (_conv(kernel=[1 << 40, 3]), "kernel: found"),
    "stride zero": (_conv(strides=[0, 1]), "strides: found 0"),
    "pads": (_conv(pads=[-1, 0, 0, 0]), "pads: found -1"),
    "groups": (_conv(group=3), "not divisible by 3"),
    "many groups": (_conv(group=1 << 31), "group: found"),
    "small image": (_conv(x=torch.randn(1, 2, 2, 5)), "smaller than the kernel"),
    "dilated": (_conv(dilations=[1 << 24, 1]), "smaller than the kernel"),
    "image channels": (_conv(x=torch.randn(1, 3, 5, 5)), "expected [batch, 2"),
    "image rank": (_conv(x=torch.randn(2, 5, 5)), "expected [batch, 2"),
    "layout": (("Attention", [torch.randn(1, 2, 3, 4)] * 3, [F], {"layout": "thbd"}), 'found "thbd"'),
    "no heads": (("Attention", [torch.randn(1, 2, 8)] * 3, [F], {"layout": "bthd"}), "heads: the attribute is missing"),
    "heads": (("Attention", [torch.randn(1, 2, 9)] * 3, [F], {"layout": "bthd", "heads": 2}), "features of 2 heads"),
    "kv_heads": (("Attention", [torch.randn(1, 2, 9)] * 3, [F], {"layout": "bthd", "heads": 3, "kv_heads": 2}), "cannot share"),
    "no keys": (("Attention", [torch.randn(1, 2, 3, 4)], [F], {}), "inputs are missing"),
    "packed keys": (("Attention", [torch.randn(1, 2, 6) for _ in "qkv"], [F], {"layout": "packed", "heads": 1}), "has none"),
    "values": (("Attention", [torch.randn(1, 2, 3, 4)] * 2 + [torch.randn(1, 2, 3, 5)], [F], {}), "v: found"),
    "query rank": (("Attention", [torch.randn(2, 3, 4)] * 3, [F], {}), "q: found"),
    "mask": (("Attention", [*[torch.randn(1, 2, 3, 4)] * 3, torch.zeros(3, 1)], [F], {}), "mask: found"),
    "mask rank": (("Attention", [*[torch.randn(1, 2, 3, 4)] * 3, torch.zeros(1, 1, 1, 1, 3)], [F], {}), "mask: found"),
    "mask heads": (("Attention", [*[torch.randn(1, 2, 3, 4)] * 3, torch.zeros(4, 3, 3)], [F], {}), "mask: found"),
}


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "given"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_wrong_node_is_refused(case: str, constant: bool) -> None:
    (op, inputs, outputs, attributes), message = HOSTILE[case]
    constants = range(1, len(inputs)) if constant else ()
    if "kernel" in attributes and not attributes["kernel"]:
        attributes = {k: v for k, v in attributes.items() if k != "kernel"}
        message = "kernel: the attribute is missing"
    with pytest.raises(Exception, match="normfuse") as raised:
        _run(op, inputs, outputs, constants=constants, **attributes)
    assert f"normfuse.{op}" in str(raised.value)
    assert message in str(raised.value)


def test_types_are_those_of_the_schema() -> None:
    op, inputs, outputs, attributes = _linear(x=torch.randn(3, 16, dtype=torch.float64))
    with pytest.raises(Exception, match="double"):
        _run(op, inputs, outputs, **attributes)


def test_an_old_runtime_is_told_apart() -> None:
    """A table without version 17, as in ONNX Runtime 1.16: a status that says so, not a crash."""
    messages: list[bytes] = []
    make = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)

    def create(code: int, text: bytes) -> int:
        messages.append(text)
        return 4711

    status = make(create)
    table = (ctypes.c_void_p * 276)(ctypes.cast(status, ctypes.c_void_p))
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(table) if version <= 16 else None)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get, ctypes.c_void_p), None)
    register = ctypes.CDLL(str(native.path())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 4711
    assert b"1.17" in messages[0]
