"""The operator Attention in ONNX Runtime: the kernel, and the body for runtimes without it, are the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normfuse import native, ops
from normfuse.export.ops import OPS, FunctionBody

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
helper = onnx.helper

KINDS = [
    pytest.param(True, id="kernel", marks=pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")),
    pytest.param(False, id="body"),
]
NAMES = ("q", "k", "v", "mask")


def _run(kernel: bool, operands: list[Tensor | None], **facts: Any) -> Tensor:
    facts = {"scale": 0.3, "causal": 0, "heads": 4, "kv_heads": 2, "layout": "bhtd", "bits": 0} | facts
    op = OPS["Attention"]
    operands += [None] * (4 - len(operands))
    present = tuple(x is not None for x in operands)
    names = [n if there else "" for n, there in zip(NAMES, present, strict=True)]
    while not names[-1]:
        names.pop()
    node = helper.make_node("Attention", names, ["y"], domain="normfuse", **facts)
    given = {n: x for n, x in zip(NAMES, operands, strict=True) if x is not None}
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(n, 1, [f"{n}{a}" for a in range(x.ndim)]) for n, x in given.items()],
        [helper.make_tensor_value_info("y", 1, None)],
    )  # fmt: skip
    bodies = [] if kernel else [ir.serde.serialize_function(FunctionBody(op, present, 20).function("", facts, 1))]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("normfuse", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if kernel:
        options.register_custom_ops_library(str(native.path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in given.items()})[0])


def _heads(t: int = 5, s: int = 5, d: int = 9) -> list[Tensor]:
    g = torch.Generator().manual_seed(t)
    return [torch.randn(2, n, size, d, generator=g) for n, size in ((4, t), (2, s), (2, s))]


def _defined(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: int, bits: int) -> Tensor:
    if bits:
        return ops.shiftquant_attention(q, k, v, mask, 0.3, bool(causal), bits)
    return ops.attention(q, k, v, mask, 0.3, bool(causal))


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("bits", [0, 8, 3])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed"])
def test_it_is_the_definition(kernel: bool, bits: int, causal: int, layout: str) -> None:
    q, k, v = _heads()
    expected = _defined(q, k, v, None, causal, bits)
    operands: list[Tensor | None] = [q, k, v]
    if layout != "bhtd":
        rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        operands, expected = [*rows] if layout == "bthd" else [torch.cat(rows, -1)], expected.transpose(1, 2).flatten(2)
    found = _run(kernel, operands, causal=causal, bits=bits, layout=layout)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("t", [1, 5, 30])
def test_a_query_that_sees_nothing_is_zero_and_nan_stays(kernel: bool, bits: int, t: int) -> None:
    q, k, v = _heads(t, 7)
    mask = torch.zeros(2, 1, t, 7)
    mask[0, :, t // 2] = -torch.inf
    found = _run(kernel, [q, k, v, mask], bits=bits)
    assert not found[0, :, t // 2].any()
    torch.testing.assert_close(found, _defined(q, k, v, mask, 0, bits), rtol=1e-5, atol=1e-5)
    k[0, 0, 3, 1] = torch.nan  # heads 0 and 1 read it, though the mask hides it
    found = _run(kernel, [q, k, v, mask], bits=bits)
    assert found[0, :2].isnan().all()
    assert not found[0, 2:].isnan().any()
    assert not found[1].isnan().any()


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("bits", [0, 8])
def test_causal_with_more_queries_than_keys(kernel: bool, bits: int) -> None:
    q, k, v = _heads(6, 4)
    found = _run(kernel, [q, k, v], causal=1, bits=bits)
    assert not found[:, :, :2].any()
    torch.testing.assert_close(found, _defined(q, k, v, None, 1, bits), rtol=1e-5, atol=1e-5)
