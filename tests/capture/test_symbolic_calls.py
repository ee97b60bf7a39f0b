"""Every spelling of a call means without example inputs what it means in PyTorch, or the trace refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.capture.symbolic.symbolic import symbolic
from normfuse.errors import CaptureError
from normfuse.ir.dtypes import possible
from tests.capture.symbolic_calls import CALLS, Expression, inputs

DTYPES = [torch.float32, torch.int64, torch.float16, torch.bfloat16]

# arithmetic on sizes, tuples as a whole, and what needs shapes for its ATen form: recorded as it is
STAYS = {
    *("add", "arange", "chunk", "dim", "embedding", "embedding_bag", "floordiv", "getattr", "getitem", "interpolate", "item"),
    *(
        "local_response_norm",
        "meshgrid",
        "min",
        "mod",
        "numel",
        "pow",
        "split",
        "tensordot",
        "to",
        "tolist",
        "unbind",
        "unique",
        "zeros",
    ),
}


def eager(model: torch.nn.Module, args: tuple[Tensor, ...]) -> Any:
    """What the model returns, None where PyTorch does not take these dtypes."""
    try:
        with torch.no_grad():
            return model(*(a.clone() for a in args))
    except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError):
        return None


def assert_same(found: Any, expected: Any) -> None:
    a, b = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert type(found) is type(expected)
    assert [(type(v), getattr(v, "dtype", None)) for v in a] == [(type(v), getattr(v, "dtype", None)) for v in b]
    torch.testing.assert_close(a, b, equal_nan=True)


class Checked(fx.Interpreter):
    """Runs a graph and looks whether what it says about ranks and dtypes holds."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            assert value.dtype in possible(n), f"{n.format_node()}: {value.dtype}"
            assert n.meta.get("rank", value.ndim) == value.ndim, n.format_node()
        return value


def checked(gm: fx.GraphModule, args: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return Checked(gm).run(*(a.clone() for a in args))


@pytest.mark.parametrize("text", CALLS)
def test_call_is_that_of_pytorch(text: str) -> None:
    model = Expression(text)
    expected = [(inputs(d), e) for d in DTYPES if (e := eager(model, inputs(d))) is not None]
    assert expected, "PyTorch takes none of these dtypes"
    gm = symbolic(model)
    for args, value in expected:
        assert_same(gm(*(a.clone() for a in args)), value)
        checked(gm, args)
    left = [
        n for n in gm.graph.nodes if n.op == "call_method" or (n.op == "call_function" and type(n.target).__name__ != "OpOverload")
    ]
    assert not {str(getattr(n.target, "__name__", n.target)) for n in left} - STAYS


@pytest.mark.parametrize("seed", range(30))
def test_random_chain_is_that_of_pytorch(seed: int) -> None:
    chosen = random.Random(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    args, texts = inputs(dtype), list[str]()
    while len(texts) < 4 + seed % 5:
        text = chosen.choice(CALLS)
        value = eager(Expression(*texts, text), args)
        if isinstance(value, Tensor) and 0 < value.numel() < 10_000 and "empty" not in text:
            texts.append(text)
    model = Expression(*texts)
    try:
        gm = symbolic(model)
    except CaptureError as e:
        assert "pass example_inputs" in str(e)  # noqa: PT017 - a refusal is right as well
        return
    for other in [dtype, *DTYPES]:
        if (expected := eager(model, inputs(other))) is not None:
            assert_same(gm(*(a.clone() for a in inputs(other))), expected)
            checked(gm, inputs(other))
