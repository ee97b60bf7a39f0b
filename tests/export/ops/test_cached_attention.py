"""CachedAttention in ONNX Runtime: buffers that are bound to past and present, and the body where there is no library."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from normfuse import native
from normfuse.export.ops import OPS, FunctionBody
from tests.ops.test_cached_attention import ATTEND, CASES, Case

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
TensorProto, helper = onnx.TensorProto, onnx.helper
compiled = pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
NAMES = ["query", "key", "value", "past_key", "past_value", "attention_mask", "cosines", "sines"]
RESULTS = ["y", "present_key", "present_value"]


def _model(case: Case, *, packed: bool = False, rotated: bool | None = None, **attributes: Any) -> Any:
    """A graph of one node, with its body beside it."""
    op, rotated = OPS["CachedAttention"], case.pairs > 0 if rotated is None else rotated
    facts = {"scale": 0.4, "window": case.window, "softcap": case.softcap, "interleaved": int(case.interleaved)}
    facts = {**facts, "packed": int(packed), **attributes}
    names = NAMES if rotated else NAMES[:6]
    given = ["query"] * 3 + names[3:] if packed else names
    ranks = {"query": 3, "key": 3, "value": 3, "attention_mask": 2, "cosines": 2, "sines": 2}

    def value(name: str, rank: int) -> Any:
        kind = TensorProto.INT64 if name == "attention_mask" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, [f"{name}{i}" for i in range(rank)])

    node = helper.make_node(op.name, given, RESULTS, domain="normfuse", **facts)
    inputs = [value(name, ranks.get(name, 4)) for name in dict.fromkeys(given)]
    graph = helper.make_graph([node], "cached", inputs, [value("y", 3), value("present_key", 4), value("present_value", 4)])
    body = FunctionBody(op, (True,) * len(names) + (False,) * (8 - len(names)), 20).function("", facts, 3)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("normfuse", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.functions.append(onnx_ir.serde.serialize_function(body))
    return model


def _session(model: Any, *, kernel: bool, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if kernel:
        options.register_custom_ops_library(str(native.path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _feeds(arguments: tuple[Any, ...], packed: bool = False) -> dict[str, Any]:
    given = {name: x.numpy() for name, x in zip(NAMES, arguments, strict=False) if isinstance(x, Tensor)}
    if packed:
        given["query"] = np.concatenate([given.pop(name) for name in ("query", "key", "value")], 2)
    return given


@pytest.mark.parametrize("kernel", [pytest.param(True, id="kernel", marks=compiled), pytest.param(False, id="body")])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_node_computes_the_definition(case: Case, packed: bool, kernel: bool) -> None:
    given = case.arguments()
    found = _session(_model(case, packed=packed), kernel=kernel).run(RESULTS, _feeds(given, packed))
    for a, b in zip(found, ATTEND(*given), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", [pytest.param(True, id="kernel", marks=compiled), pytest.param(False, id="body")])
def test_a_token_that_sees_nothing_gives_zero(kernel: bool) -> None:
    case = Case(past=0, new=4, pads=(2,))
    y = _session(_model(case), kernel=kernel).run(["y"], _feeds(case.arguments()))[0]
    assert not y[:, :2].any()
    assert y[:, 2:].any()


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bound", [pytest.param(True, id="one buffer"), pytest.param(False, id="handed on")])
def test_text_grows_token_by_token(bound: bool, threads: int) -> None:
    """A prompt, tokens, a chunk, more tokens: with one buffer for past and present, and with caches that grow."""
    case, room, cuts = Case(heads=6, kv=3, width=16, past=0, new=300, pairs=8), 310, [0, 120, 121, 122, 200, 201, 300]
    given = case.arguments()
    whole = ATTEND(*given)
    session = _session(_model(case), kernel=True, threads=threads)
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    empty = np.full((1, 3, room if bound else 0, 16), np.nan, np.float32)
    caches = {name: make(empty.copy()) for name in ("key", "value")}
    found = []
    for first, last in itertools.pairwise(cuts):
        binding = session.io_binding()
        feeds = _feeds(given) | {name: x[:, first:last].numpy() for name, x in zip(NAMES, given[:3], strict=False)}
        held = {name: np.ascontiguousarray(x) for name, x in feeds.items() if not name.startswith("past")}
        held["attention_mask"] = np.ones((1, last), np.int64)
        for name, x in held.items():
            binding.bind_cpu_input(name, x)
        for name, x in caches.items():
            binding.bind_ortvalue_input(f"past_{name}", x)
        binding.bind_output("y")
        for name, x in caches.items():
            if bound:
                binding.bind_ortvalue_output(f"present_{name}", x)
            else:
                binding.bind_output(f"present_{name}")
        session.run_with_iobinding(binding)
        y, *presents = binding.get_outputs()
        found.append(torch.from_numpy(y.numpy()))
        caches = caches if bound else dict(zip(caches, presents, strict=True))
    torch.testing.assert_close(torch.cat(found, 1), whole[0], rtol=1e-4, atol=1e-5)
    for cache, wanted in zip(caches.values(), whole[1:], strict=True):
        torch.testing.assert_close(torch.from_numpy(cache.numpy())[:, :, :300], wanted, rtol=1e-6, atol=1e-6)
        assert np.isnan(cache.numpy()[:, :, 300:]).all()  # what is behind stays as it was


@compiled
@pytest.mark.parametrize("new", [1, 40])
def test_threads_change_nothing(new: int) -> None:
    case = Case(heads=6, kv=3, width=16, past=900, new=new, pads=(0, 100))
    feeds = _feeds(case.arguments())
    one, *others = (_session(_model(case), kernel=True, threads=n).run(["y"], feeds)[0] for n in (1, 2, 3))
    for other in others:
        assert np.array_equal(one, other)


@compiled
@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        pytest.param({"query": (1, 3, 33)}, "query", id="features"),
        pytest.param({"query": (1, 3, 24)}, "3 heads", id="heads"),
        pytest.param({"key": (1, 2, 16)}, "key", id="tokens of the keys"),
        pytest.param({"value": (1, 3, 8)}, "value", id="features of the values"),
        pytest.param({"past_key": (2, 2, 5, 8), "past_value": (2, 2, 5, 8)}, "query", id="batch"),
        pytest.param({"past_value": (1, 2, 4, 8)}, "past_value", id="slots"),
        pytest.param({"attention_mask": (1, 2)}, "attention_mask", id="a short mask"),
        pytest.param({"attention_mask": (2, 8)}, "attention_mask", id="rows of the mask"),
        pytest.param({"cosines": (7, 4), "sines": (7, 4)}, "8 positions or more", id="a short table"),
        pytest.param({"cosines": (8, 5), "sines": (8, 5)}, "half of 8", id="a wide table"),
        pytest.param({"sines": (8, 3)}, "sines", id="tables"),
    ],
)
def test_wrong_shapes_are_refused(wrong: dict[str, tuple[int, ...]], word: str) -> None:
    case = Case(pairs=4)
    sizes = {name: x.shape for name, x in _feeds(case.arguments()).items()} | wrong
    feeds = {name: np.ones(size, np.int64 if name == "attention_mask" else np.float32) for name, size in sizes.items()}
    with pytest.raises(Exception, match=word):
        _session(_model(case), kernel=True).run(None, feeds)


@compiled
@pytest.mark.parametrize("wrong", [{"window": -1}, {"softcap": -1.0}, {"packed": 2}])
def test_wrong_attributes_are_refused_when_the_model_is_loaded(wrong: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(wrong))):
        _session(_model(Case(), **wrong), kernel=True)
