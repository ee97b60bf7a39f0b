"""Attention against PyTorch's, and the integers of its quantized form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse import native, ops
from normfuse.errors import UsageError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TensorProto, helper = onnx.TensorProto, onnx.helper
op = torch.ops.normfuse
Heads = tuple[Tensor, Tensor, Tensor]


def _heads(seed: int, b: int, heads: int, kv: int, t: int, s: int, d: int) -> Heads:
    """q as a packed projection leaves it, keys and values as a cache does."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, t, heads + 3, d, generator=g)[:, :, 1 : heads + 1].transpose(1, 2)
    return q, torch.randn(b, kv, s, d, generator=g), torch.randn(b, kv, s, d, generator=g)


def _mask(kind: str, seed: int, b: int, heads: int, t: int, s: int) -> Tensor | None:
    g = torch.Generator().manual_seed(seed)
    sizes = {"none": None, "keys": (b, 1, 1, s), "all": (b, heads, t, s), "queries": (1, heads, t, 1), "bool": (t, s)}[kind]
    if sizes is None:
        return None
    if kind == "bool":
        seen = torch.rand(sizes, generator=g) > 0.3
        return seen.index_fill(1, torch.tensor([0]), True)
    return torch.randn(sizes, generator=g)


@given(
    st.integers(0, 999), st.integers(1, 2), st.sampled_from([(1, 1), (3, 1), (4, 2)]), st.integers(1, 60), st.integers(1, 60),
    st.sampled_from([1, 5, 16, 33, 64]), st.sampled_from(["none", "keys", "all", "queries", "bool"]),
)  # fmt: skip
def test_it_is_pytorchs_attention(seed: int, b: int, shared: tuple[int, int], t: int, s: int, d: int, kind: str) -> None:
    q, k, v = _heads(seed, b, *shared, t, s, d)
    mask = _mask(kind, seed, b, shared[0], t, s)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), wide, scale=0.2, enable_gqa=True)
    for function in (op.attention, ops.attention):
        y = function(q, k, v, mask, 0.2, False)
        torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=1e-5)
        assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kernel", [pytest.param(True, id="kernel"), pytest.param(False, id="definition")])
def test_causal_queries_are_the_last_ones(kernel: bool) -> None:
    q, k, v = _heads(0, 1, 2, 2, 5, 12, 8)
    y = (op if kernel else ops).attention(q, k, v, None, 0.3, True)
    for i in range(5):
        seen = slice(0, 12 - 5 + i + 1)
        alone = F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen], scale=0.3)
        torch.testing.assert_close(y[:, :, i : i + 1], alone, rtol=1e-5, atol=1e-6)
    more = (op if kernel else ops).attention(torch.cat([q, q, q], 2), k, v, None, 0.3, True)
    assert more[:, :, :3].isnan().all()
    assert not more[:, :, 3:].isnan().any()


@given(st.integers(0, 999), st.sampled_from([2, 5, 8]), st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 16, 40, 64]))
def test_scores_of_integers(seed: int, bits: int, t: int, s: int, d: int) -> None:
    q, k, v = _heads(seed, 2, 4, 2, t, s, d)
    (a, x), (c, y) = ops.quantize_rows(q, bits), ops.quantize_rows(k, bits)
    c, y, values = (z.repeat_interleave(2, 1) for z in (c, y, v))
    sums = torch.einsum("bhid,bhjd->bhij", a.long(), c.long())
    expected = torch.softmax(0.3 * x.double() * y.double().transpose(2, 3) * sums, -1) @ values.double()
    for function in (op.shiftquant_attention, ops.shiftquant_attention):
        torch.testing.assert_close(function(q, k, v, None, 0.3, False, bits).double(), expected, rtol=2e-5, atol=1e-5)
    exact = op.shiftquant_attention(q.double(), k.double(), v.double(), None, 0.3, False, bits)
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)


def test_a_key_that_is_not_finite_shows() -> None:
    q, k, v = _heads(0, 1, 1, 1, 9, 9, 8)
    k[0, 0, 4, 2] = torch.inf
    for function in (op.shiftquant_attention, ops.shiftquant_attention):
        y = function(q, k, v, None, 1.0, True, 8)
        assert y[0, 0, 4:].isnan().all()
        assert not y[0, 0, :4].isnan().any()


def test_wrong_arguments_are_refused() -> None:
    q, k, v = _heads(0, 1, 4, 2, 3, 5, 8)
    for arguments, word in (
        ((q, k[:, :1].expand(1, 3, 5, 8), v[:, :1].expand(1, 3, 5, 8), None), "KV heads"),
        ((q, k, v[:, :, :4], None), "expected"),
        ((q, k.double(), v, None), "dtype"),
        ((q, k, v, torch.zeros(2, 5)), "mask"),
        ((q, k, v, torch.zeros(3, 5, dtype=torch.int64)), "mask"),
    ):
        with pytest.raises(UsageError, match=word):
            op.attention(*arguments, 0.3, False)
    with pytest.raises(UsageError, match="9 bits"):
        op.shiftquant_attention(q, k, v, None, 0.3, False, 9)


# -- with a cache, in ONNX Runtime --------------------------------------------------------------------------------------------

HEADS, KV, ROOM, DIM = 4, 2, 20, 8


def _cached() -> Any:
    cache: list[str | int | None] = [1, KV, ROOM, DIM]
    node = helper.make_node(
        "CachedAttention", ["qkv", "past_key", "past_value", "position"], ["y", "present_key", "present_value"],
        domain="normfuse", heads=HEADS, kv_heads=KV,
    )  # fmt: skip
    given: list[tuple[str, list[str | int | None]]] = [
        ("qkv", [1, None, (HEADS + 2 * KV) * DIM]), ("past_key", cache), ("past_value", cache)
    ]  # fmt: skip
    made: list[tuple[str, list[str | int | None]]] = [
        ("y", [1, None, HEADS * DIM]), ("present_key", cache), ("present_value", cache)
    ]  # fmt: skip
    graph = helper.make_graph(
        [node], "cached",
        [*(helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in given),
         helper.make_tensor_value_info("position", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in made],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("normfuse", 1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(native.path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rows(tokens: int) -> Tensor:
    return torch.randn(1, tokens, (HEADS + 2 * KV) * DIM, generator=torch.Generator().manual_seed(tokens))


def _expected(rows: Tensor) -> Tensor:
    q, k, v = rows.unflatten(-1, (-1, DIM)).transpose(1, 2).split([HEADS, KV, KV], 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("bound", [pytest.param(True, id="one buffer"), pytest.param(False, id="two buffers")])
def test_tokens_are_appended(bound: bool) -> None:
    session, rows = _cached(), _rows(ROOM)
    caches = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, KV, ROOM, DIM), np.float32)) for n in ("key", "value")}
    parts = []
    for first, after in ((0, 7), (7, 8), (8, 9), (9, ROOM)):
        binding = session.io_binding()
        binding.bind_cpu_input("qkv", np.ascontiguousarray(rows[:, first:after].numpy()))
        binding.bind_cpu_input("position", np.array([first]))
        for n, value in caches.items():
            binding.bind_ortvalue_input(f"past_{n}", value)
        binding.bind_output("y")
        for n, value in caches.items():
            if bound:
                binding.bind_ortvalue_output(f"present_{n}", value)
            else:
                binding.bind_output(f"present_{n}")
        session.run_with_iobinding(binding)
        y, key, value = binding.get_outputs()
        parts.append(torch.from_numpy(y.numpy()))
        if not bound:
            caches = {"key": key, "value": value}
    torch.testing.assert_close(torch.cat(parts, 1), _expected(rows), rtol=1e-5, atol=1e-5)
    kept = torch.from_numpy(caches["key"].numpy())
    assert torch.equal(kept, rows.unflatten(-1, (-1, DIM)).transpose(1, 2)[:, HEADS : HEADS + KV])


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("position", [pytest.param(p, id=str(p)) for p in (-1, ROOM - 1, 2**62)])
def test_tokens_beyond_the_buffer_are_refused(position: int) -> None:
    cache = np.zeros((1, KV, ROOM, DIM), np.float32)
    feed = {"qkv": _rows(2).numpy(), "past_key": cache, "past_value": cache, "position": np.array([position])}
    with pytest.raises(Exception, match="do not fit into a buffer of 20"):
        _cached().run(None, feed)
