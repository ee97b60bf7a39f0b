"""Constants that a rounding decides are the model's own, bit for bit; and none takes more bytes than what it comes from."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.passes.bake import Bake
from normfuse.passes.cleanup import Cleanup

aten = torch.ops.aten


class Decided(nn.Module):
    """A value times a constant that is computed from buffers across a rounding."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("t", torch.arange(0, 3.2, 0.1))
        self.register_buffer("a", torch.full((32,), 0.1))
        self.register_buffer("b", torch.full((32,), 0.2))
        self.register_buffer("c", torch.full((32,), 0.3))
        self.register_buffer("h", torch.linspace(200, 300, 32).half())
        self.register_buffer("i", torch.arange(1, 33))

    def forward(self, x):
        return x * self.constant(x).to(x.dtype)

    def constant(self, x):
        t, s = self.t, self.a + self.b
        match self.how:
            case "floor":
                return (t * 10).floor()
            case "round to places":
                return torch.round(t * 10 + 0.05, decimals=1)
            case "frac":
                return (t * 10).frac()
            case "remainder":
                return torch.remainder(t * 10, 1.0)
            case "fmod":
                return torch.fmod(t, s)
            case "floor_divide":
                return torch.div(t, self.a, rounding_mode="floor")
            case "cast to integers":
                return (t * 10).long()
            case "cast to bool":
                return (s - self.c).bool()
            case "equality":
                return torch.where(s == self.c, 2.0, -1.0)
            case "comparison":
                return torch.where(s > self.c, 2.0, -1.0)
            case "sign":
                return torch.sign(s - self.c) + 0.5
            case "isinf of halves":
                return torch.where(torch.isinf(self.h * self.h), 2.0, -1.0)
            case "halves out of range":
                return torch.nan_to_num(self.h * self.h / 100, posinf=3.0)
            case "argmax":
                return F.one_hot(torch.stack([s, self.c, s]).argmax(0), 3)[:, 0]
            case "argsort":
                return torch.stack([s, self.c], 1).argsort(1, descending=True)[:, 0] + 1
            case "topk":
                return torch.stack([s, self.c], 1).topk(1, 1).indices[:, 0] + 1
            case "bucketize":
                return torch.bucketize(t * 10, torch.arange(0.0, 33.0, device=t.device)) + self.i
            case "unique":
                return torch.stack([s, self.c]).unique_consecutive(dim=0).sum(0)
            case "nextafter":
                return torch.nextafter(s, self.c)
            case "bits":
                return (t * 10).view(torch.int32).remainder(7)
            case "through half and back":
                return (t * 0.3).half().float()
            case "half meets float":
                return (self.h * 0.3) * self.c
            case "integers divided":
                return self.i / 7
            case "root of integers":
                return self.i.sqrt().floor()
            case "buckets of positions":
                n = self.i.long()
                far = 8 + (torch.log(n.float() / 8) / torch.log(torch.tensor(16.0)) * 8).long()
                return torch.where(n < 8, n, far.clamp(max=15))
        raise AssertionError(self.how)


HOWS = [
    "floor", "round to places", "frac", "remainder", "fmod", "floor_divide", "cast to integers", "cast to bool", "equality",
    "comparison", "sign", "isinf of halves", "halves out of range", "argmax", "argsort", "topk", "bucketize", "unique", "nextafter",
    "bits", "through half and back", "half meets float", "integers divided", "root of integers", "buckets of positions",
]  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_what_a_rounding_decides_is_the_models_own(how):
    model, x = Decided(how).eval(), torch.randn(3, 32)
    fast = normfuse.optimize(model, (x,), passes=[Bake(), "cleanup"], verify="off")
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("how", ["floor", "cast to integers", "equality", "integers divided", "buckets of positions"])
def test_it_is_without_example_inputs_too(how):
    model, x = Decided(how).eval(), torch.randn(3, 32)
    fast = normfuse.optimize(model, passes=[Bake(), "cleanup"])
    assert torch.equal(fast(x), model(x))


class Threshold(nn.Module):
    """What an operator reads at run time that decides."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("t", torch.arange(1, 33) / 10)

    def forward(self, x):
        t = (self.t * 3).contiguous() / 3 * 3
        match self.how:
            case "comparison":
                return torch.where(x >= t.view(1, -1), 1.0, x * 0)
            case "bucketize":
                return torch.bucketize(x, t)
            case "remainder":
                return torch.remainder(x, t)
        raise AssertionError


@pytest.mark.parametrize("how", ["comparison", "bucketize", "remainder"])
def test_constants_that_decide_about_inputs_are_the_models_own(how):
    model = Threshold(how).eval()
    x = (model.t * 3 / 3 * 3)[None].clone()
    fast = normfuse.optimize(model, (x,), passes=[Bake(), "cleanup"], verify="off")
    assert torch.equal(fast(x), model(x))
    assert len(list(fast.graph.nodes)) <= 8  # the constant is folded


class Weight(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("q", torch.randint(-127, 128, (300, 300), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(300, 1) * 0.01)
        self.w = nn.Parameter(torch.randn(300, 300).half())

    def forward(self, x):
        match self.how:
            case "int8":
                return F.linear(x, self.q.to(x.dtype) * self.scale)
            case "half in float32":
                return F.linear(x, self.w.float())
            case "standardized in float32":
                w = self.w.float()
                return F.linear(x.half(), ((w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)).half())
        raise AssertionError


@pytest.mark.parametrize(("how", "folds"), [("int8", False), ("half in float32", False), ("standardized in float32", True)])
def test_no_constant_takes_more_bytes_than_what_it_comes_from(how, folds):
    model, x = Weight(how).eval(), torch.randn(2, 300)
    fast = normfuse.optimize(model, (x,), verify="off")
    used: list[Tensor] = {"int8": [model.q, model.scale], "half in float32": [model.w], "standardized in float32": [model.w]}[how]
    assert sum(t.nbytes for t in fast.state_dict().values()) <= sum(t.nbytes for t in used)
    left = {n.target for n in fast.graph.nodes if n.op == "call_function"} - {aten.linear.default, aten.to.dtype}
    assert (left == set() and len(fast.state_dict()) == 1) if folds else fast.state_dict().keys() <= set(model.state_dict())
    torch.testing.assert_close(fast(x), model(x), rtol=2e-3, atol=2e-3)


def test_a_step_in_between_is_not_stored():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.randn(500))

        def forward(self, x):
            return x + (self.v[:, None] * self.v).sum(0)

    fast = normfuse.optimize(Outer().eval(), (torch.randn(500),), passes=[Bake()])
    assert [t.shape for t in fast.state_dict().values()] == [(500,)]
    assert [n.target for n in fast.graph.nodes if n.op == "call_function"] == [aten.add.Tensor]


# -- memory of outputs ---------------------------------------------------------------------------------------------------


class Copies(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.l = how, nn.Linear(4, 4)
        self.register_buffer("anchors", torch.rand(4))

    def forward(self, x):
        w = self.l.weight
        match self.how:
            case "clone of an input":
                return x.clone()
            case "copy by a cast":
                return x.to(torch.float32, copy=True)
            case "clone behind a view":
                return x.t().clone()[1:]
            case "clone before a view":
                return x.clone().view(-1).detach()
            case "clone of a weight":
                return w.clone(), self.l(x)
            case "contiguous of a transposed weight":
                return w.t().contiguous(), self.l(x)
            case "function of a weight":
                return w.exp(), self.anchors * 2
            case "times one":
                return x * 1.0
            case "times one twice":
                return x * 2.0 * 0.5
            case "concatenation of one":
                return torch.cat([x])
            case "padding by nothing":
                return F.pad(x, (0, 0))
            case "one value twice":
                y = self.l(x)
                return y, y.clone()
            case "two copies of one value":
                y = self.l(x)
                return y.clone(), y.clone(), self.anchors * 2, self.anchors * 2
            case "the input itself":
                return x, x.view(-1), x.contiguous()
            case "a buffer itself":
                return self.anchors, self.anchors[1:], self.l(x)
        raise AssertionError(self.how)


COPIES = [
    "clone of an input", "copy by a cast", "clone behind a view", "clone before a view", "clone of a weight",
    "contiguous of a transposed weight", "function of a weight", "times one", "times one twice", "concatenation of one",
    "padding by nothing", "one value twice", "two copies of one value", "the input itself", "a buffer itself",
]  # fmt: skip


def memory(module, *inputs):
    """Which of inputs, weights and outputs share memory with each output, by place."""
    out = module(*inputs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    held = [*inputs, *(module.state_dict()[k] for k in ("l.weight", "anchors") if k in module.state_dict()), *outputs]
    names = [*("input" for _ in inputs), *(k for k in ("l.weight", "anchors") if k in module.state_dict()), *range(len(outputs))]
    place = [t.untyped_storage().data_ptr() for t in held]
    return [
        {n for n, p in zip(names, place, strict=True) if n != i and p == o.untyped_storage().data_ptr()}
        for i, o in enumerate(outputs)
    ]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("given", [True, False])
def test_outputs_share_the_memory_that_they_share_in_the_model(how, given):
    model, x = Copies(how).eval(), torch.randn(4, 4)
    fast = normfuse.optimize(model, (x,) if given else None)
    assert memory(fast, x) == memory(model, x)
    first, second = fast(x), fast(x)
    if "weight" in how:  # two calls give two tensors
        assert first[0].data_ptr() != second[0].data_ptr()


def test_copies_inside_of_a_model_still_go():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x.clone()).clone()).clone()

    fast = normfuse.optimize(Inside().eval(), (torch.randn(2, 4),), passes=[Cleanup()])
    assert [n.target for n in fast.graph.nodes if n.op == "call_function"] == [aten.linear.default] * 2


def test_large_halves_that_leave_their_range_stay_out_of_it():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((300, 300), 300.0).half())

        def forward(self, x):
            return F.linear(x, self.w * self.w / 1000.0)

    model, x = Scaled().eval(), torch.ones(2, 300).half()
    fast = normfuse.optimize(model, (x,), verify="off")
    assert torch.equal(fast(x), model(x))
    assert len(list(fast.graph.nodes)) == 4
