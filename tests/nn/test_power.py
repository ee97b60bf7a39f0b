"""PowerNorm: a slow second implementation, group scaling, and what surrounds a training step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.power import PowerNorm


def randomized(layer: nn.Module) -> Any:
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2) if "ema_gz" not in name else tensor.uniform_(-0.1, 0.1)
    return layer


def step(layer: nn.Module, x: Tensor, grad: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and the gradients of x, γ and β of one training step."""
    x = x.detach().requires_grad_()
    y = layer(x, **more)
    dx, dw, db = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)
    return y.detach(), dx, dw, db


def scaled(x: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """x / √(mean(x² over a group) + ε), group by group."""
    parts = x.split(x.shape[-1] // groups, -1)
    return torch.cat([p / (p.square().mean(-1, keepdim=True) + eps).sqrt() for p in parts], -1)


# -- a second implementation -------------------------------------------------------------------------------------------


class Plain:
    """The steps of the specification behind the group scaling, number by number."""

    def __init__(self, layer: PowerNorm) -> None:
        self.gamma, self.beta = layer.weight.tolist(), layer.bias.tolist()
        self.C, self.W, self.eps = layer.num_features, layer.warmup_iters, layer.eps
        self.af, self.ab = layer.alpha_fwd, layer.alpha_bkw
        self.phi, self.psi, self.t = [1.0] * self.C, [0.0] * self.C, 0

    def forward(self, rows: list[list[float]], keep: list[bool]) -> list[list[float]]:
        self.t += 1
        t, C = self.t, range(self.C)
        kept = [row for row, k in zip(rows, keep, strict=True) if k]
        self.q = [sum(row[c] ** 2 for row in kept) / len(kept) for c in C]
        root = [math.sqrt((self.q if t <= self.W else self.phi)[c] + self.eps) for c in C]
        if t < self.W:
            self.phi = [self.phi[c] * (t - 1) / t + self.q[c] / t for c in C]
        self.phi = [self.af * self.phi[c] + (1 - self.af) * self.q[c] for c in C]
        self.z = [[row[c] / root[c] for c in C] for row in rows]
        return [[self.gamma[c] * row[c] + self.beta[c] for c in C] for row in self.z]

    def backward(self, grad: list[list[float]]) -> tuple[list[list[float]], list[float], list[float]]:
        C, rows = range(self.C), range(len(grad))
        g = [[grad[n][c] * self.gamma[c] - (1 - self.ab) * self.psi[c] * self.z[n][c] for c in C] for n in rows]
        self.psi = [self.psi[c] + sum(g[n][c] * self.z[n][c] for n in rows) / len(grad) for c in C]
        dx = [[g[n][c] / math.sqrt(self.q[c] + self.eps) for c in C] for n in rows]
        dw = [sum(grad[n][c] * self.z[n][c] for n in rows) for c in C]
        return dx, dw, [sum(grad[n][c] for n in rows) for c in C]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"group_num": 1}, id="one-group"),
        pytest.param({"group_num": 2, "alpha_fwd": 0.8, "alpha_bkw": 0.7, "eps": 1e-3}, id="two-groups"),
        pytest.param({"group_num": 4}, id="a-channel-a-group"),
        pytest.param({"group_scaling": False}, id="no-group-scaling"),
    ],
)
@pytest.mark.parametrize("warmup", [pytest.param(0, id="no-warmup"), pytest.param(25, id="warmup")])
def test_agrees_with_a_plain_implementation(options: dict[str, Any], warmup: int) -> None:
    layer = PowerNorm(4, warmup_iters=warmup, **options).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    plain = Plain(layer)
    for t in range(150):
        x = (torch.randn(3, 2, 4) * torch.exp(0.5 * torch.randn(())) * torch.tensor([1.0, 0.3, 3.0, 2.0])).double()
        mask = torch.rand(2, 3) < 0.3 if t % 3 == 0 else None  # (B, T)
        if mask is not None:
            mask[0, 0] = False
        grad = torch.randn(3, 2, 4).double()
        y, dx, dw, db = step(layer, x, grad, pad_mask=mask)
        leaf = x.clone().requires_grad_()
        u = scaled(leaf, layer.group_num) if layer.group_num else leaf * 1.0
        keep = [True] * 6 if mask is None else [not bool(mask[b, i]) for i in range(3) for b in range(2)]
        y_plain = plain.forward(u.detach().flatten(0, 1).tolist(), keep)
        du, dw_plain, db_plain = plain.backward(grad.flatten(0, 1).tolist())
        (dx_plain,) = torch.autograd.grad(u, leaf, torch.tensor(du, dtype=torch.float64).view(3, 2, 4))
        pairs = ((y.flatten(0, 1), y_plain), (dx, dx_plain.tolist()), (dw, dw_plain), (db, db_plain))
        for ours, theirs in (*pairs, (layer.running_phi.flatten(), plain.phi), (layer.ema_gz.flatten(), plain.psi)):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-10)
    assert layer.iters.item() == 150


def test_evaluation_normalizes_by_the_running_value_behind_the_group_scaling() -> None:
    layer = randomized(PowerNorm(6, eps=1e-3, group_num=3, group_eps=1e-2)).double().eval()
    x = torch.randn(4, 2, 6).double()
    phi = layer.running_phi.flatten()
    torch.testing.assert_close(layer(x), scaled(x, 3, 1e-2) / (phi + 1e-3).sqrt() * layer.weight + layer.bias)


def test_both_updates_of_the_running_value_are_applied_in_the_warmup() -> None:
    """t = 1: φ ← q, then 0.9 φ + 0.1 q = q;  t = 2: φ ← (q₁ + q₂)/2, then 0.9 φ + 0.1 q₂."""
    layer = PowerNorm(1, group_num=0).double()
    layer(torch.tensor([[2.0]]).double())
    assert layer.running_phi.item() == pytest.approx(4)
    layer(torch.tensor([[4.0]]).double())
    assert layer.running_phi.item() == pytest.approx(0.9 * (4 + 16) / 2 + 0.1 * 16)


# -- checkpoints and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"group_num": 0}])
def test_loads_the_official_keys(options: dict[str, Any]) -> None:
    state = {
        "weight": torch.rand(6),
        "bias": torch.rand(6),
        "running_phi": torch.rand(1, 6, 1, 1),
        "ema_gz": torch.rand(1, 6, 1, 1),
        "iters": torch.tensor([4321]),
    }
    layer = PowerNorm(6, **options)
    layer.load_state_dict(state, strict=True)
    assert list(layer.state_dict()) == list(state)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == state[name].dtype
    assert layer.weight.requires_grad == options.get("affine", True)


def test_reset_warmup_starts_the_steps_again() -> None:
    layer = randomized(PowerNorm(3, group_num=0, warmup_iters=5))
    layer.iters.fill_(5000)
    layer.reset_warmup()
    x = torch.randn(6, 3)
    torch.testing.assert_close(layer(x), x / (x.square().mean(0) + 1e-5).sqrt() * layer.weight + layer.bias)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"group_num": 3}, id="groups-do-not-divide"),
        pytest.param({"group_num": -1}, id="negative-groups"),
        pytest.param({"alpha_fwd": 1.1}, id="alpha-fwd"),
        pytest.param({"alpha_bkw": -0.1}, id="alpha-bkw"),
        pytest.param({"eps": -1.0}, id="eps"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        PowerNorm(4, **options)


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        pytest.param(torch.zeros(2, 3, 5), None, id="channels"),
        pytest.param(torch.zeros(2, 4, 3, 4), None, id="rank"),
        pytest.param(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), id="mask-not-batch-first"),
        pytest.param(torch.zeros(2, 3, 4), torch.zeros(3, 2), id="mask-dtype"),
        pytest.param(torch.zeros(0, 3, 4), None, id="empty"),
        pytest.param(torch.zeros(2, 3, 4), torch.ones(3, 2, dtype=torch.bool), id="all-padding"),
    ],
)
def test_wrong_inputs_are_refused_before_the_statistics_change(x: Tensor, mask: Tensor | None) -> None:
    layer = PowerNorm(4)
    with pytest.raises(UsageError):
        layer(x, mask)
    assert layer.iters.item() == 0
    assert torch.equal(layer.running_phi, torch.ones(1, 4, 1, 1))


# -- dtypes, layouts, recomputation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [0, 2])
def test_statistics_are_float32_and_the_output_has_the_dtype_of_the_input(groups: int, training: bool, dtype: torch.dtype) -> None:
    layer = randomized(PowerNorm(4, group_num=groups)).train(training)
    if dtype == torch.float64:
        layer.double()
    wide = copy.deepcopy(layer).double()
    x = (torch.randn(2, 3, 4) * 300).to(dtype)  # x² overflows float16
    y, expected = layer(x), wide(x.double())
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(layer.running_phi.double(), wide.running_phi, rtol=max(2 * eps, 1e-5), atol=1e-5)


def test_autocast_trains_and_keeps_the_dtype_of_the_input() -> None:
    linear, layer = nn.Linear(4, 4), PowerNorm(4, group_num=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(linear(torch.randn(5, 4)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.running_phi.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_layout_of_the_input_does_not_matter() -> None:
    a, b = PowerNorm(4, group_num=2), PowerNorm(4, group_num=2)
    x, grad = torch.randn(4, 3, 2).transpose(0, 2), torch.randn(4, 3, 2).transpose(0, 2)
    assert not x.is_contiguous()
    for ours, theirs in zip(step(a, x, grad), step(b, x.contiguous(), grad.contiguous()), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.ema_gz, b.ema_gz)


def test_two_dimensions_are_one_time_step() -> None:
    a, b = PowerNorm(4), PowerNorm(4)
    x, grad, mask = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([False, True, False])
    y, dx, _, _ = step(a, x, grad, pad_mask=mask)
    y3, dx3, _, _ = step(b, x[None], grad[None], pad_mask=mask[:, None])
    assert torch.equal(y, y3[0])
    assert torch.equal(dx, dx3[0])


def test_evaluation_takes_an_empty_batch() -> None:
    assert PowerNorm(4, group_num=2).eval()(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    layer = PowerNorm(3)
    for t in range(4):
        step(layer, torch.randn(5, 3), torch.randn(5, 3) * (math.inf if t == 2 else 1))
    assert layer.ema_gz.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, id="reentrant"), pytest.param(False, id="hooks")])
def test_recomputation_is_no_step(use_reentrant: bool) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), PowerNorm(4, group_num=2, warmup_iters=3), nn.ReLU(), nn.Linear(4, 4))
    saved = copy.deepcopy(plain)
    for _ in range(6):
        x = torch.randn(5, 4)
        results = []
        for model in (plain, saved):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(leaf) if model is plain else checkpoint(model, leaf, use_reentrant=use_reentrant)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert saved[1].iters.item() == 6


# -- compilers ---------------------------------------------------------------------------------------------------------

GROUPED = ["aten.unflatten.int", "aten.rms_norm.default", "aten.flatten.using_ints"]


@pytest.mark.parametrize("given", [pytest.param(True, id="inputs"), pytest.param(False, id="no-inputs")])
@pytest.mark.parametrize(("groups", "kept"), [pytest.param(2, GROUPED, id="grouped"), pytest.param(0, [], id="no-group-scaling")])
def test_folds_but_for_the_group_scaling(groups: int, kept: list[str], given: bool) -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.GELU(), randomized(PowerNorm(6, group_num=groups)), nn.Linear(6, 5, bias=False)
    ).eval()
    x = torch.randn(2, 3, 4)
    fast = normfuse.optimize(model, (x,) if given else None)
    targets = [str(n.target) for n in fast.graph.nodes if n.op == "call_function"]
    assert targets == ["aten.linear.default", "aten.gelu.default", *kept, "aten.linear.default"]
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiles() -> None:
    torch.compiler.reset()
    plain = nn.Sequential(nn.Linear(4, 4), PowerNorm(4, warmup_iters=2, group_num=2))
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(5, 4)
        for model, call in ((plain, plain), (compiled, run)):
            model.zero_grad()
            call(x).square().sum().backward()
        torch.testing.assert_close(plain[0].weight.grad, compiled[0].weight.grad)
    torch.testing.assert_close(dict(plain.named_buffers()), dict(compiled.named_buffers()))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(plain.eval(), backend="aot_eager", fullgraph=True)(x), plain(x))


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
def test_exports(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), randomized(PowerNorm(4, warmup_iters=2, group_num=2))).train(training)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(copy.deepcopy(model), (torch.randn(5, 4),), dynamic_shapes=({0: batch},)).module()
    for rows in (5, 7, 3, 4, 6):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(program(x), model(x))
    torch.testing.assert_close(dict(program.named_buffers()), dict(model.named_buffers()))
