"""Python code without example inputs: what a model asks about its values is answered rightly, or is one clear refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import normfuse
from normfuse.errors import CaptureError

Function = Callable[[Any, Any], Any]


class Model(nn.Module):
    """A function of a module with a layer, a buffer and a counter, and of one value (2, 5, 8)."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.layer, self.norm, self.calls = nn.Linear(8, 8), nn.LayerNorm(8), 0
        self.register_buffer("state", torch.ones(8))

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.function(self, x)


def _write(write: Callable[[Any], Any]) -> Function:
    """`write` is done to the output of a layer, which is then returned."""

    def function(m: Any, x: Any) -> Any:
        y = m.layer(x)
        write(y)
        return y

    return function


def _augmented(m: Any, x: Any) -> Any:
    y = m.layer(x)
    y += 1
    y *= m.state
    n = x.shape[0]
    n += 1
    return y * n


def _unpacked(m: Any, x: Any) -> Any:
    b, t, c = x.shape
    values, indices = m.norm(x).max(1)
    return m.layer(x).view(b, t, 2, c // 2).transpose(1, 2).reshape(b, -1), values, indices


def _no_grad(m: Any, x: Any) -> Any:
    with torch.no_grad():
        return m.layer(x)


def _kept(m: Any, x: Any) -> Any:
    m.last = m.layer(x)
    return m.last * 2


RIGHT: dict[str, Function] = {
    "isinstance": lambda m, x: x * 2 if isinstance(x, Tensor) and not isinstance(x, list | tuple) else x,
    "is_tensor": lambda m, x: x * 2 if torch.is_tensor(x) else x,
    "isinstance of a size": lambda m, x: m.layer(x) * (2 if isinstance(x.shape[0], int) else 1),
    "isinstance of a parameter": lambda m, x: x if isinstance(m.layer.weight, nn.Parameter) else x * 2,
    "hasattr": lambda m, x: m.layer(x) if hasattr(x, "tensors") else x * 3,
    "getattr with a default": lambda m, x: m.layer(x) if getattr(x, "tensors", None) is None else x * 3,
    "dtype of a weight": lambda m, x: m.layer(x) if m.layer.weight.dtype in {torch.float32} else x,
    "none": lambda m, x: m.layer(x) if x is not None and m.training is False else x,
    "sizes": lambda m, x: m.layer(x).reshape(x.size(0) * x.size(1), -1) / math.sqrt(x.shape[-1]),
    "tuples of sizes": lambda m, x: m.layer(x).view(x.shape[:-1] + (2, 4)) / x.shape[-1] ** 0.5,  # noqa: RUF005
    "numbers of dimensions": lambda m, x: m.layer(x) * x.dim() + x.ndim,
    "new values": lambda m, x: m.layer(x) + torch.arange(x.shape[1])[:, None] + x.new_zeros(x.shape) + torch.zeros(x.shape),
    "casts": lambda m, x: m.layer(x.to(m.state)) + m.layer(x.to(m.state.dtype)) + m.layer(x.type_as(m.state)),
    "checks": lambda m, x: (torch._assert(x.dim() == 3, "three dimensions"), m.layer(x))[1],
    "structures": lambda m, x: {"a": m.layer(x), "b": [x, (x, None)], "c": 3},
    "named tuple": lambda m, x: m.layer(x).max(1),
    "tuple of parts": lambda m, x: m.layer(x).chunk(2, -1),
    "sum of tuples": lambda m, x: (x.chunk(2, -1) + x.chunk(2, -1))[3],
    "parts in a call": lambda m, x: torch.cat(m.layer(x).chunk(2, -1), 0),
    "output that is a parameter": lambda m, x: m.layer.weight,
    "value": lambda m, x: m.layer(x) * x.sum().item(),
    "mask": lambda m, x: m.layer(x)[x > 0],
    "unpacked": _unpacked,
    "no_grad": _no_grad,
    "kept on the module": _kept,
    "augmented": _augmented,
    "written: methods": _write(lambda y: y.relu_().clamp_(max=2).masked_fill_(y > 1, 0.0)),
    "written: inplace=True": _write(lambda y: F.relu(y, inplace=True)),
    "written: init": _write(nn.init.zeros_),
}

REFUSED: dict[str, Function] = {
    "text": lambda m, x: x if f"{x.shape[0]}" == "3" else x * 3,
    "str": lambda m, x: x if str(x.shape[0]) == "3" else x * 3,
    "set": lambda m, x: x if x.dtype in {torch.float16} else x * 3,
    "tuple": lambda m, x: x if x.dtype in (torch.float16,) else x * 3,
    "dictionary": lambda m, x: {2: x}.get(x.shape[0], x * 3),
    "len": lambda m, x: x * len(x),
    "branch on the rank": lambda m, x: x * 2 if x.ndim == 3 else x * 3,
    "branch on a value": lambda m, x: x * 2 if x.sum() > 0 else x,
    "branch on the dtype": lambda m, x: x * 2 if x.is_floating_point() else x * 3,
    "equal shapes": lambda m, x: x * 2 if x.shape == (2, 5, 8) else x,
    "in a shape": lambda m, x: x * 2 if 2 in x.shape else x,
    "maximum of sizes": lambda m, x: x * max(x.shape[0], 3),
    "range": lambda m, x: [m.layer(x) for _ in range(x.shape[0])],
    "loop": lambda m, x: torch.stack([m.layer(v) for v in x]),
    "loop over parts": lambda m, x: [m.layer(v) for v in x.unbind(1)],
    "starred shape": lambda m, x: m.layer(x).view(*x.shape[:-1], 2, 4),
    "number of a value": lambda m, x: m.layer(x) * float(x.sum()),
    "cond": lambda m, x: torch.cond(x.sum() > 0, lambda a: a * 2, lambda a: a, (x,)),
    "vmap": lambda m, x: torch.vmap(m.layer)(x),
    "numpy": lambda m, x: torch.from_numpy(x.numpy()),
    "counter": lambda m, x: (setattr(m, "calls", m.calls + 1), m.layer(x) * m.calls)[1],
    "buffer replaced": lambda m, x: (setattr(m, "state", x.mean((0, 1))), m.layer(x) + m.state)[1],
    "buffer copied into": lambda m, x: (m.state.copy_(x.mean((0, 1))), m.layer(x) + m.state)[1],
    "buffer through its data": lambda m, x: (m.state.data.add_(1), m.layer(x) + m.state)[1],
    "buffer through a view": lambda m, x: (m.state.view(-1).add_(1), m.layer(x) + m.state)[1],
    "input": lambda m, x: (x.add_(1), m.layer(x))[1],
    "out=": lambda m, x: (torch.add(x, 1, out=(o := torch.empty(2, 5, 8))), m.layer(o))[1],
    "items": _write(lambda y: y.__setitem__((slice(None), 0), 0)),
    "view": _write(lambda y: y[:, 0].zero_()),
    "view by attribute": _write(lambda y: y.mT.add_(1)),
    "part": _write(lambda y: y.chunk(2, -1)[0].mul_(2)),
    "data": _write(lambda y: y.data.add_(1)),
    "data replaced": _write(lambda y: setattr(y, "data", y * 2)),
    "list of tensors": _write(lambda y: torch._foreach_add_([y], 1.0)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_code_is_traced_rightly(name: str) -> None:
    model, x = Model(RIGHT[name]).eval(), torch.randn(2, 5, 8)
    found, expected = normfuse.optimize(model)(x.clone()), model(x.clone())
    assert type(found) is type(expected)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))


@pytest.mark.parametrize("name", REFUSED)
def test_code_that_needs_values_is_refused(name: str) -> None:
    model = Model(REFUSED[name]).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CaptureError, match=r"pass example_inputs$"):
        normfuse.optimize(model)
    assert model.calls == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- layers that stay whole -----------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A norm in front of a layer, and what is taken from the layer's result."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.norm, self.layer, self.call = nn.LayerNorm(8), layer, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.layer, self.norm(x))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Around(nn.MultiheadAttention(8, 2), lambda m, x: m(x, x, x)[0]),
    "attention of a transposed value": lambda: Around(nn.MultiheadAttention(5, 1), lambda m, x: m(x.mT, x.mT, x.mT)[0]),
    "attention and its weight": lambda: Around(nn.MultiheadAttention(8, 2), lambda m, x: m(x, x, x)[0] @ m.out_proj.weight),
    "attention called twice": lambda: Around(nn.MultiheadAttention(8, 2), lambda m, x: m(m(x, x, x)[0], x, x)[0]),
    "LSTM": lambda: Around(nn.LSTM(8, 4), lambda m, x: m(x)[0]),
    "GRU, its state": lambda: Around(nn.GRU(8, 4, bidirectional=True), lambda m, x: m(x)[1]),
    "RNN cell": lambda: Around(nn.RNNCell(8, 8), lambda m, x: m(x[:, 0])),
    "decoder layer": lambda: Around(nn.TransformerDecoderLayer(8, 2, 16), lambda m, x: m(x, x)),
    "circular padding": lambda: Around(nn.Conv1d(5, 4, 3, padding=1, padding_mode="circular"), lambda m, x: m(x)),
    "instance norm with statistics": lambda: Around(nn.InstanceNorm1d(5, track_running_stats=True), lambda m, x: m(x)),
    "SyncBatchNorm": lambda: nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(5)),
    "spectral norm": lambda: Around(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)), lambda m, x: m(x)),
    "orthogonal weight": lambda: Around(nn.utils.parametrizations.orthogonal(nn.Linear(8, 4)), lambda m, x: m(x)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_traced_or_stays_whole(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = LAYERS[name]().eval(), torch.randn(2, 5, 8)
        for p in model.parameters():
            p.requires_grad_(False).add_(0.1)
    gm = normfuse.optimize(model)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not any(t.data_ptr() in own for t in (*gm.parameters(), *gm.buffers()))


# -- names ----------------------------------------------------------------------------------------------------------------------

NAMES = [
    "graph",
    "code",
    "meta",
    "recompile",
    "forward_",
    "class",
    "in",
    "lambda",
    "None",
    "getattr",
    "torch",
    "ü",
    "3 d",
    'a"b',
    "a'b",
    "\\",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: nn.MultiheadAttention(8, 2)], ids=["traced", "whole"])
def test_names_of_submodules_do_not_matter(name: str, layer: Callable[[], nn.Module]) -> None:
    model = Model(lambda m, x: m._modules[name](m.norm(x)) if "traced" in m._modules else m._modules[name](x, x, m.norm(x))[0])
    model.add_module(name, layer())
    if isinstance(model._modules[name], nn.Linear):
        model.add_module("traced", nn.Identity())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(normfuse.optimize(model.eval())(x), model(x))


def test_values_may_be_called_like_parameters() -> None:
    def function(m: Any, x: Any) -> Any:
        pos = m.norm(x) + m.pos
        return {"pos": m.layer(pos), "state": m.state * m.code}

    model = Model(function).eval()
    model.pos, model.code = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(normfuse.optimize(model)(x), model(x))


class Told(nn.Module):
    """Names a size in a message, as many models do."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        torch._assert(x.ndim == 2, f"expected two axes, got {x.ndim}")
        assert x.shape is not None, f"{x.shape}"
        return self.a(x)


def test_text_of_a_value_in_a_message_decides_nothing():
    model, x = Told().eval(), torch.randn(3, 4)
    torch.testing.assert_close(normfuse.optimize(model)(x), model(x))
