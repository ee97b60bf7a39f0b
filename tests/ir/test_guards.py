"""The optimized module refuses calls that it was not captured for, in words that say what to do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse
from normfuse.errors import NormfuseError, UsageError


class Net(nn.Module):
    """Sizes, a number and a flag take part in the arithmetic."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x, y=None, scale=1.0, flip=False):
        z = self.norm(self.linear(x)) * scale + x.sum(1, keepdim=True) / x.shape[1]
        z = z if y is None else z + y
        return z.flip(-1) if flip else z


def inputs(batch=4, tokens=5):
    return torch.randn(batch, tokens, 8), torch.randn(batch, tokens, 8)


@pytest.fixture(scope="module")
def fixed():
    return normfuse.optimize(Net().eval(), (*inputs(), 2.0, True))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        pytest.param((*inputs(3), 2.0, True), {}, r"x is float32\[3, 5, 8\].*with float32\[4, 5, 8\].*dynamic_shapes", id="size"),
        pytest.param((inputs()[0], inputs(4, 1)[1], 2.0, True), {}, r"input y is float32\[4, 1, 8\]", id="size of another"),
        pytest.param((inputs()[0][0], inputs()[1], 2.0, True), {}, r"input x is float32\[5, 8\].*optimize again", id="rank"),
        pytest.param((inputs()[0].double(), inputs()[1], 2.0, True), {}, r"x is float64\[4, 5, 8\]", id="dtype"),
        pytest.param((*inputs(), 3.0, True), {}, "scale is 3.0; it was captured as the constant 2.0: optimize again", id="number"),
        pytest.param((*inputs(), 2, True), {}, "input scale is 2; it was captured as the constant 2.0", id="integer for a float"),
        pytest.param((*inputs(), 2.0, False), {}, "input flip is False; it was captured as the constant True", id="flag"),
        pytest.param((inputs()[0], None, 2.0, True), {}, r"input y is None; the model was captured with float32", id="None"),
        pytest.param((*inputs(), torch.tensor(2.0), True), {}, r"input scale is float32\[\]", id="tensor for a number"),
        pytest.param(inputs(), {"scale": 2.0}, "input flip is missing.*as True", id="missing"),
        pytest.param((*inputs(), 2.0, True, 1), {}, "5 positional inputs.*captured with 4", id="further"),
        pytest.param((*inputs(), 2.0, True), {"mask": None}, "input mask is not one", id="unknown"),
        pytest.param((*inputs(), 2.0, True), {"x": inputs()[0]}, "input x is given twice", id="twice"),
    ],
)
def test_another_call_is_refused(fixed, args, kwargs, message):
    with pytest.raises(UsageError, match=message):
        fixed(*args, **kwargs)


def test_inputs_may_be_given_by_position_or_by_name(fixed):
    x, y = inputs()
    torch.testing.assert_close(fixed(x, flip=True, scale=2.0, y=y), fixed(x, y, 2.0, True))


def free(**limits):
    """Batch within limits, tokens free."""
    dims = {0: Dim("b", **limits), 1: Dim.AUTO}
    return (dims, dims)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        pytest.param(inputs(1)[0], inputs(1)[1], r"x.shape\[0\] must be at least 2.*wider limits", id="too few"),
        pytest.param(inputs(9)[0], inputs(9)[1], r"x.shape\[0\] must be at most 8", id="too many"),
        pytest.param(inputs(4)[0], inputs(5)[1], r"y.shape\[0\] must be x.shape\[0\]", id="unequal"),
    ],
)
def test_limits_and_equal_sizes_of_free_dimensions_are_checked(x, y, message):
    fast = normfuse.optimize(Net().eval(), inputs(), dynamic_shapes=free(min=2, max=8))
    with pytest.raises(UsageError, match=message):
        fast(x, y)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 7), (9, 1), (3, 5)])
def test_free_sizes_are_taken_down_to_one(batch, tokens):
    model = Net().eval()
    fast = normfuse.optimize(model, inputs(), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO}))
    x, y = inputs(batch, tokens)
    torch.testing.assert_close(fast(x, y), model(x, y))


class Pairs(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], -1, 2).mean(-1)


def test_derived_sizes_are_checked():
    half = Dim("half", min=2, max=20)
    fast = normfuse.optimize(Pairs(), (torch.randn(3, 8),), dynamic_shapes=({1: 2 * half},))
    assert fast(torch.randn(3, 40)).shape == (3, 20)
    for n in (9, 42, 2):
        with pytest.raises(UsageError, match=r"x.shape\[1\] must be"):
            fast(torch.randn(3, n))


def test_what_the_model_asked_about_its_sizes_is_checked():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[1] % 3 == 0 else x * 5

    fast = normfuse.optimize(Branch(), (torch.randn(2, 6),), dynamic_shapes=({1: Dim.AUTO},))
    x = torch.randn(2, 9)
    assert torch.equal(fast(x), x * 2)
    with pytest.raises(UsageError, match=r"x.shape\[1\] % 3.* must hold"):
        fast(torch.randn(2, 7))


def test_conditions_of_a_loaded_program_are_checked():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[1] % 3 == 0 else x * 5

    file = io.BytesIO()
    torch.export.save(torch.export.export(Branch(), (torch.randn(2, 6),), dynamic_shapes=({1: Dim.AUTO},)), file)
    file.seek(0)
    fast = normfuse.optimize(torch.export.load(file))
    with pytest.raises(UsageError, match="must hold"):
        fast(torch.randn(2, 7))


def test_a_dimension_that_became_fixed_is_said():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(x)

    fast = normfuse.optimize(Fixed(), (torch.randn(2, 6),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert [n for n in normfuse.report(fast).notes if "x.shape[1] was asked to be free, and the model fixes it to 6" in n]
    assert not [n for n in normfuse.report(fast).notes if "x.shape[0]" in n]


def test_a_recurrent_net_at_another_batch_is_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.f = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 4)

        def forward(self, x):
            return self.f(self.r(x)[0])

    fast = normfuse.optimize(Recurrent().eval(), (torch.randn(2, 5, 8),))
    with pytest.raises(UsageError, match=r"x is float32\[3, 5, 8\]"):
        fast(torch.randn(3, 5, 8))


def test_nested_inputs_are_named_by_their_place():
    class Nested(nn.Module):
        def forward(self, batch, k):
            return batch["x"] + batch["y"][0] + k

    x = torch.randn(3)
    fast = normfuse.optimize(Nested(), ({"x": x, "y": [x]}, 1.0))
    assert torch.equal(fast({"y": [x], "x": x}, 1.0), x + x + 1)
    with pytest.raises(UsageError, match=r"input batch\['y'\]\[0\] is float32\[4\]"):
        fast({"x": x, "y": [torch.randn(4)]}, 1.0)
    for wrong in ({"x": x}, {"x": x, "y": [x], "z": x}, {"x": x, "y": [x, x]}, x):
        with pytest.raises(UsageError, match="input batch is nested as"):
            fast(wrong, 1.0)


def test_without_example_inputs_names_and_flags_are_checked():
    model = Net().eval()
    fast = normfuse.optimize(model)
    x, _ = inputs(3, 2)
    torch.testing.assert_close(fast(x), model(x))
    for args, message in [
        ((), "x is missing"),
        ((x, x), "y is"),
        ((x, None, 1.0, True), "flip is True"),
        ((x,) * 5, "5 positional"),
    ]:
        with pytest.raises(UsageError, match=message):
            fast(*args)


def _saved(gm):
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda gm: pickle.loads(pickle.dumps(gm)),
        _saved,
        normfuse.optimize,
        lambda gm: gm.to("cpu").eval(),
    ],
    ids=["copy", "deepcopy", "pickle", "torch.save", "optimize", "to"],
)
def test_copies_keep_their_guards_and_their_report(fixed, copied):
    args = (*inputs(), 2.0, True)
    made = copied(fixed)
    torch.testing.assert_close(made(*args), fixed(*args))
    assert normfuse.report(made).norms_before
    with pytest.raises(UsageError, match="input x"):
        made(*inputs(3), 2.0, True)


def test_a_copy_checks_once(fixed):
    assert len(copy.deepcopy(copy.deepcopy(fixed))._forward_pre_hooks) == 1


def test_exports_of_the_result_keep_its_constants(fixed):
    args = (*inputs(), 2.0, True)
    torch.testing.assert_close(torch.export.export(fixed, args).module()(*args), fixed(*args))
    for wrong in ((*inputs(), 3.0, True), (*inputs(3), 2.0, True)):
        with pytest.raises(UsageError, match="input"):
            torch.export.export(fixed, wrong)
        with pytest.raises(UsageError, match="input"):
            normfuse.optimize(fixed, wrong)


def test_compiled_results_refuse_too(fixed):
    args = (*inputs(), 2.0, True)
    compiled = torch.compile(fixed, backend="eager")
    torch.testing.assert_close(compiled(*args), fixed(*args))
    with pytest.raises(UsageError, match="input x"):
        compiled(*inputs(3), 2.0, True)
    torch._dynamo.reset()


def test_a_result_inside_of_another_model_is_compiled_whole(fixed):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = fixed

        def forward(self, x, y):
            return self.inner(x, y, 2.0, True) + 1

    args = inputs()
    compiled = torch.compile(Around(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), fixed(*args, 2.0, True) + 1)
    torch._dynamo.reset()


def test_graphs_of_torch_are_taken_with_their_guards():
    module = torch.export.export(Net().eval(), (*inputs(), 2.0, True)).module()
    with pytest.raises(NormfuseError, match="input x"):
        normfuse.optimize(module)(*inputs(3), 2.0, True)


def test_an_expression_that_is_no_arithmetic_is_not_evaluated():
    from normfuse.ir.guards import _code

    assert _code("s0 % 2 == 0", {"s0": "v0.shape[0]"}) == "v0.shape[0] % 2 == 0"
    for code in ("__import__('os').getcwd() == s0", "s0.__class__ == 1", "open('x') == 1", "(lambda: s0)() == 1", "v0.data == 1"):
        assert _code(code, {"s0": "v0.shape[0]"}) is None
