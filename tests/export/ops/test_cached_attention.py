"""The operator CachedAttention in ONNX Runtime: keys and values are appended to buffers that stay where they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse import native

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TensorProto, helper = onnx.TensorProto, onnx.helper
pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")


@dataclass(frozen=True)
class Sizes:
    batch: int = 1
    heads: int = 4
    kv: int = 2
    room: int = 20
    dim: int = 8
    scale: float = 0.0

    @property
    def cache(self) -> tuple[int, int, int, int]:
        return self.batch, self.kv, self.room, self.dim


SIZES = [
    pytest.param(Sizes(), id="grouped"),
    pytest.param(Sizes(batch=3, heads=2, kv=2, dim=5), id="batch, odd features"),
    pytest.param(Sizes(heads=6, kv=1, dim=33), id="one for all"),
    pytest.param(Sizes(heads=1, kv=1, dim=1), id="smallest"),
    pytest.param(Sizes(room=1500, heads=2, kv=1, dim=16), id="several tiles"),
    pytest.param(Sizes(scale=0.5), id="scale"),
]


def _session(size: Sizes, threads: int = 1, **attributes: Any) -> Any:
    facts = {"heads": size.heads, "kv_heads": size.kv, "scale": size.scale} | attributes
    names = ["qkv", "past_key", "past_value", "position"], ["y", "present_key", "present_value"]
    node = helper.make_node("CachedAttention", *names, domain="normfuse", **facts)
    cache = ["b", "kv", "room", "dim"]

    def value(name: str, shape: Sequence[str | int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node], "cached",
        [value("qkv", ["n", "t", "f"]), value("past_key", cache), value("past_value", cache),
         helper.make_tensor_value_info("position", TensorProto.INT64, ["p"])],
        [value("y", ["n", "t", "g"]), value("present_key", cache), value("present_value", cache)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("normfuse", 1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rows(size: Sizes, tokens: int) -> Tensor:
    """[batch, tokens, features of queries, keys and values]"""
    return torch.randn(size.batch, tokens, (size.heads + 2 * size.kv) * size.dim, generator=torch.Generator().manual_seed(tokens))


def _parts(size: Sizes, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rows.unflatten(-1, (-1, size.dim)).transpose(1, 2).split([size.heads, size.kv, size.kv], 1)
    return q, k, v


def _expected(size: Sizes, rows: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(*_parts(size, rows), is_causal=True, enable_gqa=True, scale=size.scale or None)
    return y.transpose(1, 2).flatten(2)


class _Decoding:
    """A session with its buffers: bound as past and present at once, or handed on from call to call."""

    def __init__(self, size: Sizes, bound: bool, threads: int = 1, fill: float = 0.0) -> None:
        self.session, self.bound = _session(size, threads), bound
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        self.caches = {n: make(np.full(size.cache, fill, np.float32)) for n in ("key", "value")}

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        binding = self.session.io_binding()
        binding.bind_cpu_input("qkv", np.ascontiguousarray(rows.numpy()))
        binding.bind_cpu_input("position", np.array([first]))
        binding.bind_output("y")
        for n, value in self.caches.items():
            binding.bind_ortvalue_input(f"past_{n}", value)
            if self.bound:
                binding.bind_ortvalue_output(f"present_{n}", value)
            else:
                binding.bind_output(f"present_{n}")
        self.session.run_with_iobinding(binding)
        y, key, value = binding.get_outputs()
        if not self.bound:
            self.caches = {"key": key, "value": value}
        return torch.from_numpy(y.numpy())


def _stretches(room: int) -> Iterator[tuple[int, int]]:
    """A prompt, single tokens, then many at once, to the end of the buffers."""
    cuts = sorted({0, 7, 8, 9, max(9, room - 3), room})
    return itertools.pairwise(cuts)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bound", [pytest.param(True, id="one buffer"), pytest.param(False, id="two buffers")])
def test_tokens_are_appended(size: Sizes, bound: bool) -> None:
    rows = _rows(size, size.room)
    decode = _Decoding(size, bound)
    found = torch.cat([decode(rows[:, first:after], first) for first, after in _stretches(size.room)], 1)
    torch.testing.assert_close(found, _expected(size, rows), rtol=1e-5, atol=1e-5)
    for n, expected in zip(("key", "value"), _parts(size, rows)[1:], strict=True):
        assert torch.equal(torch.from_numpy(decode.caches[n].numpy()), expected)


def test_what_lies_behind_the_tokens_is_not_read() -> None:
    size = Sizes()
    rows = _rows(size, 9)
    decode = _Decoding(size, True, fill=float("nan"))
    found = torch.cat([decode(rows[:, :8], 0), decode(rows[:, 8:], 8)], 1)
    torch.testing.assert_close(found, _expected(size, rows), rtol=1e-5, atol=1e-5)
    assert np.isnan(decode.caches["key"].numpy()[:, :, 9:]).all()


def test_a_token_may_be_taken_back() -> None:
    """Writing at an earlier position forgets what was there and after it."""
    size = Sizes()
    rows, other = _rows(size, 6), _rows(size, 2)
    decode = _Decoding(size, True)
    decode(rows, 0)
    again = decode(other, 3)
    torch.testing.assert_close(again, _expected(size, torch.cat([rows[:, :3], other], 1))[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [pytest.param(1, id="one token"), pytest.param(13, id="prompt")])
def test_threads_change_nothing(tokens: int) -> None:
    size = Sizes(heads=6, kv=3, dim=16)
    rows = _rows(size, 5 + tokens)
    found = []
    for threads in (1, 2, 3):
        decode = _Decoding(size, True, threads)
        decode(rows[:, :5], 0)
        found.append(decode(rows[:, 5:], 5))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nan_reaches_the_tokens_behind_it() -> None:
    size = Sizes(heads=2, kv=2)
    rows = _rows(size, 6)
    rows[0, 3, 2 * size.dim] = torch.nan  # in the first head's key
    decode = _Decoding(size, True)
    y = torch.cat([decode(rows[:, t : t + 1], t) for t in range(6)], 1).unflatten(-1, (2, size.dim))
    assert y[0, 3:, 0].isnan().all()
    assert y[0, :3, 0].isfinite().all()
    assert y[0, :, 1].isfinite().all()


@pytest.mark.parametrize("position", [pytest.param(p, id=str(p)) for p in (-1, 19, 2**62)])
def test_tokens_beyond_the_buffer_are_refused(position: int) -> None:
    size = Sizes()
    with pytest.raises(Exception, match="do not fit into a buffer of 20"):
        _Decoding(size, False)(_rows(size, 2), position)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        pytest.param({"qkv": (1, 2, 65)}, "features of 8 heads", id="features"),
        pytest.param({"past_key": (1, 2, 20, 9)}, "past_key", id="features of the keys"),
        pytest.param({"past_key": (2, 2, 20, 8)}, "past_key", id="batch"),
        pytest.param({"past_key": (1, 4, 20, 8)}, "past_key", id="heads"),
        pytest.param({"past_value": (1, 2, 19, 8)}, "past_value", id="values"),
        pytest.param({"position": (2,)}, "expected one number", id="positions"),
    ],
)
def test_wrong_shapes_are_refused(wrong: dict[str, tuple[int, ...]], word: str) -> None:
    size = Sizes()
    shapes: dict[str, tuple[int, ...]] = {"qkv": (1, 2, 64), "past_key": size.cache, "past_value": size.cache, "position": (1,)}
    given = {n: np.zeros(s, np.int64 if n == "position" else np.float32) for n, s in (shapes | wrong).items()}
    with pytest.raises(Exception, match=word):
        _session(size).run(None, given)


@pytest.mark.parametrize("facts", [pytest.param({"kv_heads": 3}, id="3 of 4"), pytest.param({"heads": 0}, id="none")])
def test_wrong_heads_are_refused_when_the_model_is_loaded(facts: dict[str, int]) -> None:
    with pytest.raises(Exception, match="heads"):
        _session(Sizes(), **facts)
