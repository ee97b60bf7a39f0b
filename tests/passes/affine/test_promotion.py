"""An affine never changes the dtype or the shape of its value: what would is refused, what is not known is asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.nn import DynamicErf
from tests.tolerances import TOLERANCES
from tests.zoo import randomise_norms


def compared(model, *inputs, given=True, **options):
    """The optimized model, with the model's dtype and values."""
    fast = normfuse.optimize(model, inputs if given else None, verify="off", **options)
    with torch.no_grad():
        expected, found = model(*inputs), fast(*inputs)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    bound = TOLERANCES[expected.dtype].rtol if expected.dtype in TOLERANCES else 0
    assert float((found.double() - expected.double()).abs().max()) <= bound * float(expected.double().abs().max())
    return fast


class Wider(nn.Module):
    """A half linear layer times something."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.head, self.how = nn.Linear(8, 8).half(), nn.Linear(8, 8).half(), how
        self.vector, self.precise = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8).double())
        self.one, self.scalar = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(()))
        self.brain, self.phase = nn.Parameter(torch.rand(8).bfloat16()), nn.Buffer(torch.rand(8) + 1j)

    def forward(self, x):
        y = self.fc(x)
        match self.how:
            case "vector":
                return y * self.vector
            case "sum":
                return self.vector + y
            case "float64":
                return y * self.precise
            case "one element":
                return y / self.one
            case "no axes":
                return self.head(y * self.scalar)
            case "bfloat16":
                return y - self.brain
            case "complex":
                return (y * self.phase).real
            case "norm in float32":
                z = F.layer_norm(y, (8,), self.vector, self.vector)
                return self.head(z * 0.5)
            case "mixed norm, float32 gain":
                z = F.rms_norm(y, (8,), self.vector, 1e-5)
                return z * self.vector
            case "back to half":
                return self.head((y * self.vector).half())
        raise AssertionError


WIDER = [
    "vector", "sum", "float64", "one element", "no axes", "bfloat16", "complex", "norm in float32", "mixed norm, float32 gain",
    "back to half",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("how", WIDER)
def test_a_wider_constant_promotes_as_in_the_model(how, given):
    torch.manual_seed(0)
    compared(Wider(how).eval(), torch.randn(3, 8).half(), given=given)


class Literal(nn.Module):
    """Numbers beside norms: every constant that is made of one takes the dtype of the value."""

    def __init__(self, how):
        super().__init__()
        self.how, self.fc = how, nn.Linear(8, 8)
        self.ln, self.bn = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.g = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        match self.how:
            case "norm times a number":
                return self.ln(x) * 0.3
            case "norm times and plus":
                return self.fc(torch.sigmoid(self.ln(x) * 0.3 + 0.7))
            case "number before batch norm":
                return torch.sigmoid(self.bn(torch.sigmoid(x).mul_(0.3)))
            case "number before batch norm and linear":
                return self.fc(self.bn(torch.sigmoid(x) * 0.3))
            case "scaled norm":
                return self.g * F.normalize(x, dim=-1) * 0.3
            case "into linear":
                return self.fc(x) * 0.3 + 0.1
            case "minus":
                return 1.0 - self.ln(x) / 3
        raise AssertionError


LITERALS = [
    "norm times a number", "norm times and plus", "number before batch norm", "number before batch norm and linear", "scaled norm",
    "into linear", "minus",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("how", LITERALS)
def test_literal_factors_in_models_of_any_dtype(how, dtype):
    torch.manual_seed(0)
    model = randomise_norms(Literal(how)).to(dtype).eval()
    fast = compared(model, torch.randn(5, 8).to(dtype))
    assert all(p.dtype == dtype for p in fast.state_dict().values() if p.is_floating_point())
    compared(model, torch.randn(5, 8).to(dtype), given=False)


class Integers(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.conv = how, nn.Linear(8, 4), nn.Conv2d(8, 4, 1)
        self.register_buffer("mean", torch.rand(8))

    def forward(self, x):
        match self.how:
            case "scaled":
                return self.fc(x / 255.0)
            case "scaled and centred":
                return self.fc(x / 255.0 - self.mean)
            case "centred":
                return self.fc((x - self.mean) / 0.3)
            case "counted":
                return torch.count_nonzero(x, 1) * 1.0
            case "product of integers":
                return x * 3 + 1
            case "image":
                return self.conv(x[:, :, None, None] / 255)
        raise AssertionError


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("how", ["scaled", "scaled and centred", "centred", "counted", "product of integers", "image"])
def test_integers_become_floating_before_they_meet_weights(how, given):
    compared(Integers(how).eval(), torch.randint(0, 200, (5, 8)), given=given)


def test_without_inputs_a_refusal_asks_for_them():
    fast = normfuse.optimize(Integers("scaled").eval())
    (site,) = [s for s in normfuse.report(fast).refused if "dtype unknown" in s.note]
    assert site.remedy == "pass example_inputs"


class Gains(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.conv = how, nn.Linear(8, 4), nn.Conv2d(8, 4, 1)
        self.ln, self.gain, self.plane = nn.LayerNorm(8), nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        match self.how:
            case "linear":
                return torch.relu(self.fc(x) * self.gain)
            case "conv":
                return torch.relu(self.conv(x[:, :, None, None]) * self.plane + 0.5)
            case "norm":
                return self.fc(self.ln(x) * 0.5 * self.plane.view(-1)[:1])
        raise AssertionError


@pytest.mark.parametrize("how", ["linear", "conv", "norm"])
def test_gains_behind_weights_fold_without_inputs(how):
    fast = compared(Gains(how).eval(), torch.randn(3, 8), given=False)
    left = {str(n.target) for n in fast.graph.nodes if n.op == "call_function"}
    assert not left & {"aten.mul.Tensor", "aten.add.Tensor"}


class Enlarges(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.one, self.bn = how, nn.Linear(8, 8), nn.Linear(8, 1), nn.BatchNorm1d(8)
        self.vector, self.table = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(1, 6, 8))
        self.deep, self.column = nn.Parameter(torch.full((1, 1, 1), 2.0)), nn.Parameter(torch.rand(5, 1))

    def forward(self, x):
        match self.how:
            case "frequencies":
                return self.fc(x[:, :1] * self.vector)
            case "score":
                return torch.relu(self.one(x) * self.vector)
            case "dimensions":
                return torch.relu(self.fc(x) * self.deep)
            case "rows":
                return torch.relu(self.fc(x)[0] + self.column)
            case "positions":
                return self.bn((self.one(x[:, None].expand(-1, 6, -1)) + self.table).transpose(1, 2))
            case "a sum enlarged by a vector":
                return self.bn(self.one(x) + self.vector)
        raise AssertionError


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("how", ["frequencies", "score", "dimensions", "rows", "positions", "a sum enlarged by a vector"])
def test_a_constant_that_enlarges_a_value_is_no_affine_of_it(how, given):
    torch.manual_seed(0)
    fast = compared(randomise_norms(Enlarges(how)).eval(), torch.randn(5, 8), given=given)
    assert not normfuse.report(fast).undone


class Frn(nn.Module):
    """γ x ρ + β behind a convolution that nothing can be folded into, as arithmetic."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.gamma, self.beta = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5), nn.Parameter(torch.rand(1, 4, 1, 1))

    def forward(self, x):
        y = self.conv(x)
        y = y * torch.rsqrt(y.abs().mean((2, 3), keepdim=True) + 1e-6)
        return torch.sigmoid(y * self.gamma + self.beta)


def test_arithmetic_is_not_told_to_be_a_norm():
    fast = compared(Frn().eval(), torch.randn(2, 3, 5, 5))
    assert not any(normfuse.report(fast).norms_after.values())
    assert not any("batch_norm" in str(n.target) for n in fast.graph.nodes)


class Promoted(nn.Module):
    """Factors of two dtypes on a value of which only the caller knows the dtype."""

    def __init__(self, *factors):
        super().__init__()
        self.factors, self.norm = nn.ParameterList(factors), DynamicErf(8, dtype=torch.bfloat16)

    def forward(self, x):
        x = self.norm(x)
        for c in self.factors:
            x = x * c
        return x


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_two_factors_promote_like_one_after_the_other(dtypes, dtype):
    model = randomise_norms(Promoted(*(torch.rand(8).to(d) + 0.5 for d in dtypes), torch.tensor(0.75, dtype=torch.float64))).eval()
    model.norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(2, 8).to(dtype)
    with torch.no_grad():
        expected, found = model(x), normfuse.optimize(model, verify="off")(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)  # the model rounds to the narrowest between its steps


class Table(nn.Module):
    """A norm of an input of which nothing is known, times a vector that may be wider than it."""

    def __init__(self, norm, vector):
        super().__init__()
        self.norm, self.vector = norm, nn.Buffer(vector)

    def forward(self, x):
        return self.norm(x) * self.vector


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8)], ids=str)
@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
@pytest.mark.parametrize("given", [True, False])
def test_a_wider_vector_promotes_what_is_traced_without_inputs(norm, weights, given):
    model = nn.Sequential(Table(randomise_norms(norm).to(weights), torch.rand(8) + 0.5), nn.Tanh()).eval()
    fast = compared(model, torch.randn(3, 8).to(weights), given=given)
    if weights is torch.float32 and isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:  # nothing can be promoted
        assert not any(n.target is torch.ops.aten.mul.Tensor for n in fast.graph.nodes)
