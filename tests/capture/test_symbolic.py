"""The front end without example inputs gives what `torch.export` gives with them."""

from __future__ import annotations

import dataclasses
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normfuse.capture.symbolic.symbolic import symbolic
from normfuse.errors import CaptureError
from tests.zoo import ZOO, randomise_norms

aten = torch.ops.aten

# arithmetic on sizes: with example inputs the sizes are numbers, and so is what is computed from them
_ON_SIZES = {operator.floordiv, operator.mul, operator.pow, operator.add, operator.sub, aten.sym_size.int}
# Both front ends give the same function here, not the same operators: without shapes the dtype in `.to(y.dtype)` is looked
# up at run time, and torch.export inlines a parametrization that is computed from attributes.
OTHER_SPELLING = {"HandWritten", "Reparametrized"}
TRACEABLE = [pytest.param(entry, id=name) for name, entry in ZOO.items() if entry.traceable]


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of a graph in order, without arithmetic on sizes and without export's checks of its inputs."""
    gm.graph.eliminate_dead_code()
    nodes = [n for n in gm.graph.nodes if n.op.startswith("call_") and n.name != "_guards_fn"]
    return [n for n in nodes if n.target not in _ON_SIZES and n.target is not aten._assert_tensor_metadata.default]


def out_of_place(target: Any) -> str:
    """Export leaves in-place calls in place; both spellings are one op."""
    name, _, overload = str(target).rpartition(".")
    return f"{name.removesuffix('_')}.{overload}" if name.startswith("aten.") else str(target)


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.GraphModule:
    return torch.export.export(model, args, kwargs or {}).module()  # type: ignore[return-value]


def same_arguments(ours: list[fx.Node], theirs: list[fx.Node]) -> None:
    """Every literal, constant and operand is the same; a computed size or a free argument stands for any number."""
    index = {n: i for i, n in enumerate(ours)}
    other = {n: i for i, n in enumerate(theirs)}

    def check(a: Any, b: Any, where: str) -> None:
        if isinstance(a, fx.Node) and (a.target in _ON_SIZES or (a.op == "placeholder" and not isinstance(b, fx.Node))):
            assert isinstance(b, int | float), where
        elif isinstance(a, fx.Node):
            assert isinstance(b, fx.Node), where
            assert a.op == b.op, where
            assert a.op == "get_attr" or index.get(a) == other.get(b), where
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for x, y in zip(a, b, strict=True):
                check(x, y, where)
        elif isinstance(a, int) and a < 0:
            # behind an ellipsis dimensions are counted from the end
            assert isinstance(b, int), where
        else:
            assert type(a) is type(b), where
            assert a == b, where

    for a, b in zip(ours, theirs, strict=True):
        check(a.args, b.args, f"{a.format_node()}  |  {b.format_node()}")
        check(given(a), given(b), f"{a.format_node()}  |  {b.format_node()}")


def given(node: Any) -> list[tuple[str, Any]]:
    """Keyword arguments; torch.export spells out one that says nothing."""
    return [(k, v) for k, v in node.kwargs.items() if (k, v) != ("pin_memory", False)]


def assert_same(a: Any, b: Any) -> None:
    left, left_spec = pytree.tree_flatten(a)
    right, right_spec = pytree.tree_flatten(b)
    assert left_spec == right_spec
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("entry", TRACEABLE)
def test_symbolic_agrees_with_export(entry: Any) -> None:
    model = entry.build()
    gm = symbolic(model)
    assert_same(gm(*entry.args, **entry.kwargs), model(*entry.args, **entry.kwargs))
    if type(model).__name__ in OTHER_SPELLING:
        return
    ours, theirs = calls(gm), calls(exported(model, entry.args, entry.kwargs))
    assert [out_of_place(n.target) for n in ours] == [out_of_place(n.target) for n in theirs]
    same_arguments(ours, theirs)


class Fn(nn.Module):
    """A function of an image, a matrix and integers, as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor, i: Tensor) -> Any:
        return self.function(x) if isinstance(self.function, nn.Module) else self.function(x, y, i)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "relu": lambda x, y, i: torch.relu(x) + x.relu() + F.relu(x) + nn.ReLU()(x),
    "activations": lambda x, y, i: F.gelu(F.silu(F.hardswish(F.hardsigmoid(F.leaky_relu(F.elu(F.mish(F.softplus(x)))))))),
    "clamps": lambda x, y, i: F.hardtanh(F.relu6(x), -0.5, 2.0).clamp(min=0).clamp(-1, 1),
    "gelu_tanh": lambda x, y, i: F.gelu(x, approximate="tanh"),
    "glu_softmin": lambda x, y, i: F.softmin(F.glu(x, dim=1), dim=-1),
    "rarer": lambda x, y, i: F.selu(F.celu(F.threshold(F.hardshrink(F.softsign(F.tanhshrink(F.logsigmoid(x)))), 0.1, 2))),
    "softmax": lambda x, y, i: torch.softmax(x, -1) + x.softmax(dim=1) + F.softmax(x, dim=1, dtype=torch.float32),
    "log_softmax": lambda x, y, i: F.log_softmax(x, -1).exp(),
    "arithmetic": lambda x, y, i: 2 * (1 - x) / 3 + 1 - x * x / (x + 5.0) - x**2,
    "number_first": lambda x, y, i: (1 + x, 2 * x, 3 - x, 4 / x, 2**x),
    "alpha": lambda x, y, i: torch.add(x, x, alpha=2) - torch.sub(x, x, alpha=0.5),
    "integers": lambda x, y, i: (i // 2, i % 3, -i, abs(i), ~i),
    "comparisons": lambda x, y, i: ((x > 0) & (x <= 1) | (x == 0), x != x, i < 2, i >= i),
    "rounding": lambda x, y, i: torch.div(x, 2, rounding_mode="floor"),
    "reductions": lambda x, y, i: (
        x.mean(),
        x.mean(1),
        x.sum((2, 3), keepdim=True),
        x.amax(dim=1),
        x.var(1, unbiased=False),
        x.std(-1),
    ),
    "axis": lambda x, y, i: x.sum(axis=1, keepdims=True),
    "maxima": lambda x, y, i: (x.max(), x.max(1)[0], torch.max(x, x), x.argmax(dim=1), x.topk(2)[0]),
    "var_mean": lambda x, y, i: torch.var_mean(x, 1)[0],
    "norms": lambda x, y, i: (y.norm(), y.norm(dim=1, keepdim=True), F.normalize(y, dim=-1), torch.norm(y, 1, 0)),
    "matrix": lambda x, y, i: (y @ y.T, torch.matmul(y, y.t()), y.mm(y.transpose(0, 1)), torch.einsum("ab,cb->ac", y, y)),
    "einsum_list": lambda x, y, i: torch.einsum("ab,cb,db->acd", [y, y, y]),
    "shapes": lambda x, y, i: (
        x.flatten(1).view(2, -1).reshape(2, 4, -1).permute(0, 2, 1).contiguous().transpose(1, 2).unsqueeze(0).squeeze(0)
    ),
    "sizes": lambda x, y, i: x.view(x.size(0), x.shape[1] * x.size(2), -1).expand(2, -1, -1),
    "unflatten": lambda x, y, i: torch.flatten(x, 2).unflatten(-1, (6, 6)).movedim(1, -1).swapaxes(1, 2),
    "concatenation": lambda x, y, i: torch.stack([torch.cat([x, x], dim=1), torch.cat((x, x), 1)]),
    "splits": lambda x, y, i: [torch.cat((b, a)) for a, b in (x.chunk(2, 1), x.split(2, dim=1), x.split([2, 2], 1), x.unbind(0))],
    "slices": lambda x, y, i: (x[:, 1:3], x[:, ::2], x[0], x[:, 0], x[:, :, 1:, None, :-1], x[-1:], x[:, -1]),
    "ellipsis": lambda x, y, i: (x[..., 0], x[..., None], x[..., 1:, :2], x[:, ..., None, 0]),
    "whole": lambda x, y, i: (x[...], x[:], y[:, :]),
    "index": lambda x, y, i: (x[:, i[0]], y[i], x.index_select(1, i[0]), y.gather(1, i[:, :2]), x[:, i[0]]),
    "masks": lambda x, y, i: x.masked_fill(x > 0, float("-inf")) + torch.where(x > 0, x, 0.0) + x.where(x > 1, x),
    "casts": lambda x, y, i: x.double().to(torch.float16).float().type(torch.float64).half(),
    "elementwise": lambda x, y, i: x.abs().sqrt().exp().log().rsqrt().square().reciprocal().tanh().sigmoid().sin().pow(0.5),
    "rolls": lambda x, y, i: torch.roll(x, (1, -1), dims=(2, 3)).flip(1).repeat(1, 2, 1, 1).cumsum(0).repeat_interleave(2, 0),
    "padding": lambda x, y, i: F.pad(F.pad(F.pad(x, (1, 1)), (1, 1, 1, 1), value=0.5), (1, 1, 2, 2), mode="reflect"),
    "pools": lambda x, y, i: F.avg_pool2d(F.max_pool2d(x, 2, stride=1), 2, ceil_mode=True) + F.adaptive_avg_pool2d(x, 1),
    "adaptive": lambda x, y, i: F.adaptive_avg_pool2d(x, (3, 2)) + F.adaptive_max_pool2d(x, (3, 2)) + F.lp_pool2d(x, 2, 2)[..., :2],
    "indices": lambda x, y, i: F.max_pool2d(x, 2, return_indices=True)[0],
    "convolutions": lambda x, y, i: (F.conv2d(x, torch.ones(2, 4, 3, 3)), F.conv2d(x, torch.ones(2, 4, 3, 3), padding="same")),
    "transposed": lambda x, y, i: F.conv_transpose2d(x, torch.ones(4, 2, 3, 3), stride=2, padding=1, output_padding=1),
    "linear": lambda x, y, i: F.linear(x, torch.ones(3, 6), torch.ones(3)),
    "layer_norm": lambda x, y, i: F.layer_norm(x, (6,)) + F.rms_norm(x, (6,)) + F.group_norm(x, 2, eps=1e-3),
    "instance_norm": lambda x, y, i: F.instance_norm(x),
    "dropout": lambda x, y, i: F.dropout(x, 0.1, training=False) + F.dropout2d(x, training=False) + F.alpha_dropout(x),
    "bilinear": lambda x, y, i: F.interpolate(x, size=(3, 3), mode="bilinear") + F.interpolate(x, (3, 3)),
    "bicubic": lambda x, y, i: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True),
    "pixel_shuffle": lambda x, y, i: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "attention": lambda x, y, i: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    "embedding": lambda x, y, i: F.embedding(i, torch.ones(9, 3)) + F.embedding(i, torch.ones(9, 3), padding_idx=1),
    "one_hot": lambda x, y, i: F.one_hot(i, 9),
    "similarity": lambda x, y, i: (F.cosine_similarity(y, y), F.pairwise_distance(y, y)),
    "likes": lambda x, y, i: torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 2.0),
    "properties": lambda x, y, i: (y.T, x.mT),
    "stock_batch_norm": nn.BatchNorm2d(4).eval(),
    "stock_padded": nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
    "stock_upsample": nn.UpsamplingBilinear2d(scale_factor=2),
    "stock_shapes": nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (6, 6)), nn.PixelUnshuffle(2), nn.ZeroPad2d(1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_agrees_with_export(name: str) -> None:
    model = Fn(FUNCTIONS[name]).eval()
    args = (torch.rand(2, 4, 6, 6) + 0.5, torch.rand(3, 5), torch.tensor([[1, 2, 0], [0, 2, 1]]))
    gm = symbolic(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = model(*args)
        torch.manual_seed(0)
        assert_same(gm(*args), expected)
    # a tensor made in Python is a constant here and a call in export
    made = {"aten.ones.default", "aten.lift_fresh_copy.default", "aten.detach.default"}
    ours, theirs = ([t for n in calls(g) if (t := out_of_place(n.target)) not in made] for g in (gm, exported(model, args)))
    assert ours == theirs


# -- what cannot be traced ------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class RankBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if len(x.shape) == 4 else x


class RandomDepth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if random.random() < 0.5 else x


class RandomConstant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(3)


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Autocast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, x)


class UnknownType(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.max(x, 1)
        return y[0] if isinstance(y, tuple) else y


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class TrainingStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=True)


@pytest.mark.parametrize("make", [Counter, TrainingStatistics])
def test_writing_to_state_is_a_capture_error(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(CaptureError, match="in eval mode; pass example_inputs"):
        symbolic(model)
    assert all(isinstance(v, Tensor) for v in model.buffers())


def test_hooks_run_or_are_an_error() -> None:
    model, x = nn.Sequential(nn.ReLU()), torch.randn(2, 3)
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    assert_same(symbolic(model)(x), model(x))
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(CaptureError, match="forward hooks"):
        symbolic(model)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        pytest.param(Branch, "if x.sum() > 0", id="value"),
        pytest.param(RankBranch, "len(x.shape)", id="rank"),
        pytest.param(Unregistered, "self.layers[0](x)", id="unregistered"),
        pytest.param(RandomDepth, "random numbers", id="random_branch"),
        pytest.param(RandomConstant, "random numbers", id="random_constant"),
        pytest.param(Autocast, "F.linear(x, x)", id="autocast"),
        pytest.param(UnknownType, "isinstance(y, tuple)", id="isinstance"),
    ],
)
def test_untraceable_model_is_a_capture_error(make: Callable[[], nn.Module], line: str) -> None:
    model = nn.Sequential(nn.Identity(), make())
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    with pytest.raises(CaptureError, match="pass example_inputs") as caught:
        symbolic(model)
    assert line in str(caught.value)
    assert "random" in line or "module '1'" in str(caught.value)
    assert random.getstate() == random_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert "isinstance" not in globals()


def test_untraceable_zoo_model_names_its_line() -> None:
    with pytest.raises(CaptureError, match=r"zoo_streams.py:\d+: `if ids.shape"):
        symbolic(ZOO["shape_branch"].build())


# -- what stays as it was -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn_bn", "preln_gpt", "in_place"])
def test_model_is_untouched(name: str) -> None:
    entry = ZOO[name]
    model = entry.build().train()
    seen: list[Any] = []
    handle = next(model.children()).register_forward_hook(lambda *_: seen.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    members = {k: dict(vars(m)) for k, m in model.named_modules()}
    symbolic(model)
    assert all(m.training for m in model.modules())
    assert {k: dict(vars(m)) for k, m in model.named_modules()} == members
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    handle.remove()


def test_parameters_are_the_same_objects_under_their_first_names() -> None:
    model = ZOO["preln_gpt"].build()
    gm = symbolic(model)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    read = [n.target for n in gm.graph.nodes if n.op == "get_attr"]
    assert set(read) <= set(own)
    assert len(read) == len(set(read))
    assert "head.weight" not in read
    for name in read:
        module, _, attribute = name.rpartition(".")
        assert getattr(gm.get_submodule(module), attribute) is own[name]
    assert not any(n.op == "call_module" for n in gm.graph.nodes)


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor


class Structured(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, double: bool = False) -> dict[str, Any]:
        if mask is not None:
            x = x * mask
        y = x * scale
        return {"pair": Pair(x, y), "list": [x, (y, None)], "number": 3}


def test_structure_and_keywords_are_kept() -> None:
    model, x = Structured(), torch.randn(2, 3)
    gm = symbolic(model)
    for kwargs in ({}, {"scale": 3.0}, {"mask": None, "double": False}):
        out, expected = gm(x, **kwargs), model(x, **kwargs)
        assert type(out["pair"]) is Pair
        assert torch.equal(out["pair"].right, expected["pair"].right)
        assert type(out["list"]) is list
        assert out["list"][1][1] is None
        assert out["number"] == 3
    with pytest.raises(AssertionError, match="mask has been specialized"):
        gm(x, mask=torch.ones(2, 3))
    with pytest.raises(AssertionError, match="double has been specialized"):
        gm(x, double=True)


class TypeBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], -1)
        size = y.shape[0] if isinstance(y.shape[0], int) else 1
        return (torch.relu(y) if isinstance(y, Tensor) and not isinstance(y, list | tuple) else y).view(size, 1, -1)


def test_isinstance_sees_the_value_at_run_time() -> None:
    x = torch.randn(2, 3, 4)
    assert_same(symbolic(TypeBranch())(x), TypeBranch()(x))


class OpaqueParts(nn.Module):
    """Modules and functions that have no one ATen form without shapes: recorded as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attention = nn.GRU(4, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.InstanceNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = self.norm(y.transpose(1, 2)) * x.shape[-1]
        return F.interpolate(y, scale_factor=2.0) + torch.zeros(x.size(1) * 0 + 1)


def test_unknown_parts_stay_and_work() -> None:
    model, x = OpaqueParts().eval(), torch.randn(2, 5, 4)
    gm = symbolic(model)
    assert_same(gm(x), model(x))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["rnn", "attention", "norm"]


# -- in-place -------------------------------------------------------------------------------------------------------------------


def _on_input(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    x.mul_(2)
    return x + 1


def _through_view(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    z = x * 2
    z[:, 0].add_(1)
    return z


def _augmented_view(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    z = x * 2
    v = z[:, 0]
    v += 1
    return z


def _sole_view(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    z = torch.cat([x, x])[:2].view(-1)
    z += 1
    return z


def _seen_by_view(x: Tensor, y: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    z = x * 2
    v = z.view(-1)
    z.add_(1)
    return z, v


def _seen_by_reshape(x: Tensor, y: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    z = x * 2
    v = F.dropout(z.reshape(-1), training=False)
    z.add_(1)
    return z, v


def _widening(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    z = y.half() * 2
    z += y
    return z


def _statement(x: Tensor, y: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    z = x * 2
    w = z + 1
    z.add_(1).mul_(3)
    F.relu_(z)
    return z, w


@pytest.mark.parametrize(
    ("function", "left"),
    [
        pytest.param(_on_input, ["aten.mul_.Tensor"], id="input"),
        pytest.param(_through_view, ["aten.add_.Tensor"], id="through_view"),
        pytest.param(_augmented_view, ["aten.add_.Tensor"], id="augmented_view"),
        pytest.param(_seen_by_view, ["aten.add_.Tensor"], id="seen_by_view"),
        pytest.param(_seen_by_reshape, ["aten.add_.Tensor"], id="seen_by_reshape"),
        pytest.param(_widening, ["aten.add_.Tensor"], id="promotion"),
        pytest.param(_sole_view, [], id="sole_view"),
        pytest.param(_statement, [], id="fresh"),
    ],
)
def test_in_place_is_removed_only_when_nobody_sees_it(function: Callable[..., Any], left: list[str]) -> None:
    model = Fn(function)
    gm = symbolic(model)
    args = (torch.randn(2, 3), torch.randn(3), torch.zeros(1))
    ours, theirs = ([a.clone() for a in args] for _ in range(2))
    assert_same(gm(*ours), model(*theirs))
    assert_same(ours, theirs)
    assert [str(n.target) for n in gm.graph.nodes if "_." in str(n.target) and str(n.target).startswith("aten")] == left


# -- provenance and ranks -------------------------------------------------------------------------------------------------------


def test_provenance_is_that_of_export() -> None:
    entry = ZOO["preln_vit"]
    model = entry.build()
    gm, other = symbolic(model), exported(model, entry.args)
    for ours, theirs in zip(calls(gm), calls(other), strict=True):
        assert ours.meta["nn_module_stack"] == theirs.meta["nn_module_stack"], ours
        assert "zoo_streams.py" in ours.meta["stack_trace"]


def ranks(model: nn.Module) -> dict[str, int | None]:
    return {n.name: n.meta.get("rank") for n in symbolic(model).graph.nodes if n.op != "get_attr"}


def test_rank_follows_from_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten(1), nn.Linear(4, 2))
    found = ranks(model)
    assert found.pop("linear") == found.pop("flatten") == 2
    assert found.pop("output") is None
    assert set(found.values()) == {4}


def test_rank_of_a_convolution_alone_is_open() -> None:
    assert set(ranks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm1d(4))).values()) == {None}


@pytest.mark.parametrize("entry", TRACEABLE)
def test_ranks_are_right(entry: Any) -> None:
    model = entry.build()
    gm = symbolic(model)
    wrong = []

    class Check(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if "rank" in n.meta and n.meta["rank"] != value.ndim:
                wrong.append(n)
            return value

    inputs = {n.target: n.args[0] if n.args else None for n in gm.graph.find_nodes(op="placeholder")}
    inputs |= dict(zip(inputs, entry.args, strict=False)) | entry.kwargs
    Check(gm).run(*inputs.values())
    assert not wrong


# -- real architectures ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_torchvision_agrees_with_export(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise_norms(models.get_model(name)).eval()
        x = torch.randn(2, 3, 64, 64)
    gm = symbolic(model)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)
    ours, theirs = ([out_of_place(n.target) for n in calls(g)] for g in (gm, exported(model, (x,))))
    assert ours == theirs
    assert all("rank" in n.meta for n in gm.graph.nodes if n.op == "call_function" and n.target is aten.conv2d.default)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
def test_timm_agrees_with_export(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise_norms(timm.create_model(name)).eval()
        x = torch.randn(1, 3, 224, 224)
    gm = symbolic(model)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)
    fixed = {operator.eq, torch._assert}  # the check that a fixed argument has its default
    ours = [out_of_place(n.target) for n in calls(gm) if n.target not in fixed]
    assert ours == [out_of_place(n.target) for n in calls(exported(model, (x,)))]
