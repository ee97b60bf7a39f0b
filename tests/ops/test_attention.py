"""Attention against PyTorch's, and the integers of its quantized form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse import native, ops
from normfuse.errors import UsageError

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
    assert not more[:, :, :3].any()
    assert more[:, :, 3:].ne(0).all()


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


# 1, 3: streamed in floats; 40: packed; 700 keys are more than a tile
SIZES = [pytest.param(t, s, id=f"{t} of {s}") for t, s in ((1, 1), (1, 3), (3, 700), (40, 700), (40, 2))]


def _functions(bits: int) -> list[Any]:
    """The operator and its definition as functions of (q, k, v, mask, scale, causal)."""
    if not bits:
        return [op.attention, ops.attention]
    return [lambda *a, f=f: f(*a, bits) for f in (op.shiftquant_attention, ops.shiftquant_attention)]


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize(("t", "s"), SIZES)
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_query_that_sees_nothing_is_zero_as_in_pytorch(t: int, s: int, mask: str, bits: int) -> None:
    q, k, v = _heads(1, 2, 2, 1, t, s, 24)
    seen = torch.ones(2, 1, t, s, dtype=torch.bool)
    seen[1, :, t // 2] = False
    seen[0, :, :, : s // 2] = False  # the first tile of some queries is hidden altogether
    given = seen if mask == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    for function in _functions(bits):
        y = function(q, k, v, given, 0.2, False)
        assert not y[1, :, t // 2].any()
        expected = F.scaled_dot_product_attention(q, k, v, given, scale=0.2, enable_gqa=True)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=0.05 if bits else 1e-5)


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize(("t", "s"), SIZES)
@pytest.mark.parametrize("where", ["q", "k", "v", "mask"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_those_that_see_it(t: int, s: int, where: str, value: float, bits: int) -> None:
    q, k, v = (x.clone() for x in _heads(2, 1, 2, 2, t, s, 20))
    mask = torch.zeros(1, 2, t, s)
    {"q": q, "k": k, "v": v, "mask": mask}[where][0, 1, -1, -1] = value
    kernel, definition = (function(q, k, v, mask, 0.2, False) for function in _functions(bits))
    torch.testing.assert_close(kernel, definition, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert kernel[0, 0].isfinite().all()
    bad = ~kernel[0, 1].isfinite()
    if where == "v":
        assert bad[:, -1].all()
        assert not bad[:, :-1].any()
    elif value != value or bits or where == "mask":  # floats times Inf may be -Inf, which hides
        rows = torch.arange(t) >= (0 if where == "k" else t - 1)
        assert torch.equal(bad, rows[:, None].expand_as(bad))


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("d", [pytest.param(d, id=str(d)) for d in (1, 2, 7, 9, 17, 31, 65, 130)])
def test_head_sizes(d: int, bits: int) -> None:
    for t in (1, 2, 20):
        q, k, v = _heads(d, 1, 2, 1, t, 37, d)
        kernel, definition = (function(q, k, v, None, d**-0.5, False) for function in _functions(bits))
        torch.testing.assert_close(kernel, definition, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("bits", [0, 5])
@pytest.mark.parametrize(("heads", "t"), [pytest.param(1, 1100, id="one head"), pytest.param(3, 2, id="heads")])
def test_threads_change_nothing(heads: int, t: int, bits: int) -> None:
    q, k, v = _heads(3, 1, heads, 1, t, 90, 12)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_functions(bits)[0](q, k, v, None, 0.3, t == 2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], _functions(bits)[1](q, k, v, None, 0.3, t == 2), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("isa", native.isas() if native.available() else [])
def test_every_instruction_set(isa: str) -> None:
    q, k, v = _heads(4, 2, 4, 2, 21, 33, 19)
    mask = _mask("keys", 0, 2, 4, 21, 33)
    try:
        native.force_isa(isa)
        for bits in (0, 2, 8):
            kernel, definition = (function(q, k, v, mask, 0.3, True) for function in _functions(bits))
            torch.testing.assert_close(kernel, definition, rtol=1e-5, atol=1e-5)
    finally:
        native.force_isa(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in _heads(5, 1, 2, 2, 6, 9, 16))
    for bits in (0, 8):
        kernel, definition = (function(q, k, v, None, 0.3, False) for function in _functions(bits))
        assert kernel.dtype is dtype
        torch.testing.assert_close(kernel, definition)


@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_nothing_to_do(empty: str) -> None:
    q, k, v = _heads(0, 1, 2, 2, 3, 4, 8)
    q, k, v = (x[:0] for x in (q, k, v)) if empty == "batch" else (q[:, :, :0], k, v)
    for bits in (0, 8):
        for function in _functions(bits):
            assert function(q, k, v, None, 1.0, False).shape == q.shape


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
