"""UnifiedNorm: the golden numbers of its specification, a slow second implementation, and what surrounds a training step."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.unified import UnifiedNorm

KEYS = ["weight", "bias", "running_var", "ema_gz", "iters", "buffer_x2", "buffer_gz", "skip_counter"]


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


# -- golden numbers ----------------------------------------------------------------------------------------------------


def test_inference_oracle() -> None:
    layer = UnifiedNorm(2, eps=0.0).eval()
    layer.load_state_dict(
        {"running_var": torch.tensor([4, 0.25]), "weight": torch.tensor([2, 0.5]), "bias": torch.tensor([1.0, -1])}, strict=False
    )
    assert layer(torch.tensor([[1.0, 2], [3, -4]])).tolist() == [[2, 1], [4, -5]]


def test_golden_trace() -> None:
    expected = [  # running_var, ema_gz, grad γ, y[0]
        ((1.4, 1.1125), (-0.02236066, -0.01714982), (-0.22360657, -0.68599273), (1.8944263, -0.31400727)),
        ((3.26, 1.85125), (-0.04248527, -0.03258468), (-0.22360674, -0.68599394), (1.89442697, -0.31400606)),
        ((5.934, 2.941125), (-0.06311014, -0.04840324), (-0.27386123, -0.84016772), (2.09544493, -0.15983228)),
        ((11.3406, 5.1970125), (-0.08340213, -0.06396648), (-0.25819887, -0.79211788), (2.03279547, -0.20788212)),
    ]
    layer = UnifiedNorm(2, 2, 0).double()
    layer.load_state_dict({"weight": torch.tensor([2, 0.5]), "bias": torch.tensor([1.0, -1])}, strict=False)
    base = torch.tensor([[[1, 2], [-3, 0.5]]], dtype=torch.float64)
    grad = torch.tensor([[[1, -1], [0.5, 2]]], dtype=torch.float64)
    for t, (running_var, ema_gz, dw_expected, y_expected) in enumerate(expected, 1):
        y, dx, dw, db = step(layer, t * base, grad)
        assert layer.running_var.tolist() == pytest.approx(running_var, abs=1e-12)
        assert layer.ema_gz.tolist() == pytest.approx(ema_gz, abs=6e-9)
        assert dw.tolist() == pytest.approx(dw_expected, abs=6e-9)
        assert y[0, 0].tolist() == pytest.approx(y_expected, abs=6e-9)
        assert db.tolist() == [1.5, 1.0]
        if t == 1:
            assert dx.flatten().tolist() == pytest.approx((0.89889842, -0.32685543, 0.43379678, 0.69002796), abs=6e-9)
    assert layer.iters.tolist() == [4]
    assert layer.skip_counter.tolist() == [0]


def at_window(q: list[float]) -> UnifiedNorm:
    """A layer whose window is [1, 4], [4, 9], after a step whose mean(x²) is q and replaces the second row."""
    layer = UnifiedNorm(2, 2, 2, True, eps=0.0).double()
    state = {"buffer_x2": [[1.0, 4], [4, 9]], "running_var": [2.0, 5], "iters": [2]}
    layer.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    layer(torch.tensor([q], dtype=torch.float64).sqrt())
    return layer


def test_window_oracle() -> None:
    """GM = [2, 6], AM = [2.5, 6.5], M V = 4/3: no outlier."""
    layer = at_window([4, 9])
    assert layer.skip_counter.item() == 0
    assert (layer.running_var - 0.9 * torch.tensor([2.0, 5])).mul(10).tolist() == pytest.approx([2, 6])


def test_outlier_stays_out_of_the_window_and_enters_the_running_value() -> None:
    """AM − GM of the first channel is 7.5 − √14 > 4/3."""
    layer = at_window([14, 9])
    assert layer.skip_counter.item() == 1
    assert layer.buffer_x2.tolist() == [[1, 4], [2, 5]]
    assert layer.running_var.tolist() == pytest.approx([0.9 * 2 + 1.4, 0.9 * 5 + 0.9])


# -- a second implementation -------------------------------------------------------------------------------------------


class Plain:
    """The steps of the specification, number by number."""

    def __init__(self, layer: UnifiedNorm) -> None:
        state = layer.state_dict()
        self.gamma, self.beta = state["weight"].tolist(), state["bias"].tolist()
        self.C, (self.Mf, self.Mb) = layer.channels, layer.window_size
        self.W, self.filtration, self.per_channel = layer.warmup_iters, layer.outlier_filtration, layer.per_channel_threshold
        self.eps, self.a = layer.eps, layer.momentum
        self.phi, self.psi = [1.0] * self.C, [0.0] * self.C
        self.x2 = [[0.0] * self.C for _ in range(self.Mf)]
        self.gz = [[0.0] * self.C for _ in range(self.Mb)]
        self.t = self.skipped = 0

    @staticmethod
    def variance(numbers: list[float]) -> float:
        mean = sum(numbers) / len(numbers)
        return sum((n - mean) ** 2 for n in numbers) / (len(numbers) - 1)

    def geometric(self, c: int) -> float:
        column = [row[c] for row in self.x2]
        return 0.0 if min(column) == 0 else math.exp(sum(map(math.log, column)) / self.Mf)

    def forward(self, rows: list[list[float]], keep: list[bool]) -> list[list[float]]:
        self.t += 1
        t, C = self.t, range(self.C)
        kept = [row for row, k in zip(rows, keep, strict=True) if k]
        q = [sum(row[c] ** 2 for row in kept) / len(kept) for c in C]
        V = [0.0] * self.C
        if self.Mf > 1:
            pooled = self.variance([math.sqrt(n) for row in self.x2 for n in row])
            V = [self.variance([math.sqrt(row[c]) for row in self.x2]) if self.per_channel else pooled for c in C]
        self.x2[t % self.Mf] = q
        self.skip = self.Mf <= 1
        if t >= self.W and self.filtration and not self.skip:
            gaps = [sum(row[c] for row in self.x2) / self.Mf - self.geometric(c) for c in C]
            if any(gap > self.Mf * v for gap, v in zip(gaps, V, strict=True)):
                self.x2[t % self.Mf] = self.phi
                self.skip = True
                self.skipped += 1
        v = q if t <= self.Mf or t < self.W or self.skip else [self.geometric(c) for c in C]
        self.r = [1.0] * self.C
        if t > max(1000, self.W) and not self.skip:
            ratio = [math.sqrt((v[c] + self.eps) / (self.phi[c] + self.eps)) for c in C]
            self.r = [min(max(n, 0.2), 5.0) for n in ratio]
        self.root = [math.sqrt(n + self.eps) for n in v]
        self.z = [[row[c] / self.root[c] for c in C] for row in rows]
        self.phi = [self.a * self.phi[c] + (1 - self.a) * v[c] for c in C]
        return [[self.gamma[c] * row[c] + self.beta[c] for c in C] for row in self.z]

    def backward(self, grad: list[list[float]]) -> tuple[list[list[float]], list[float], list[float]]:
        t, C, rows = self.t, range(self.C), range(len(grad))
        g = [[grad[n][c] * self.gamma[c] * self.r[c] for c in C] for n in rows]
        gz = [sum(g[n][c] * self.z[n][c] for n in rows) / len(grad) for c in C]
        self.gz[t % self.Mb] = self.psi if self.skip else gz
        plain = t <= self.Mb or t < self.W or self.skip
        m = gz if plain else [sum(row[c] for row in self.gz) / self.Mb for c in C]
        self.psi = [self.a * self.psi[c] + (1 - self.a) * m[c] for c in C]
        kappa = m if self.skip else self.psi
        dx = [[(g[n][c] - kappa[c] * self.z[n][c]) / self.root[c] for c in C] for n in rows]
        dw = [sum(grad[n][c] * self.r[c] * self.z[n][c] for n in rows) for c in C]
        return dx, dw, [sum(grad[n][c] for n in rows) for c in C]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"window_size": 4, "warmup_iters": 20, "outlier_filtration": True}, id="filtered"),
        pytest.param({"window_size": (3, 5), "warmup_iters": 7, "outlier_filtration": True, "momentum": 0.8}, id="two-windows"),
        pytest.param(
            {"window_size": 3, "warmup_iters": 10, "outlier_filtration": True, "per_channel_threshold": True}, id="per-channel"
        ),
        pytest.param({"window_size": 4, "warmup_iters": 10, "eps": 1e-3}, id="unfiltered"),
        pytest.param({"window_size": (2, 6), "warmup_iters": 0}, id="no-warmup"),
        pytest.param({"window_size": 1, "warmup_iters": 5}, id="window-of-one"),
        pytest.param({"window_size": (1, 3), "warmup_iters": 5}, id="forward-window-of-one"),
    ],
)
@pytest.mark.parametrize("start", [pytest.param(0, id="from-0"), pytest.param(900, id="across-1000")])
def test_agrees_with_a_plain_implementation(options: dict[str, Any], start: int) -> None:
    layer = UnifiedNorm(3, **options).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    plain = Plain(layer)
    if start:  # a full window in both
        plain.x2 = [[1.0 + i + c for c in range(3)] for i in range(plain.Mf)]
        plain.t = start
        layer.load_state_dict({"buffer_x2": torch.tensor(plain.x2), "iters": torch.tensor([start])}, strict=False)
    normal, compensated = torch.get_rng_state(), 0
    torch.manual_seed(1)
    for t in range(200):
        scale = torch.exp(torch.randn(()) * (2.0 if t % 17 == 0 else 0.2)) * torch.tensor([1.0, 0.3, 3.0])
        x = (torch.randn(2, 4, 3) * scale).double()
        mask = torch.rand(2, 4) < 0.3 if t % 3 == 0 else None
        if mask is not None:
            mask[0, 0] = False
        grad = torch.randn(2, 4, 3).double()
        y, dx, dw, db = step(layer, x, grad, pad_mask=mask)
        keep = [True] * 8 if mask is None else (~mask).flatten().tolist()
        y_plain = plain.forward(x.flatten(0, 1).tolist(), keep)
        dx_plain, dw_plain, db_plain = plain.backward(grad.flatten(0, 1).tolist())
        compensated += plain.r != [1.0] * 3
        for ours, theirs in ((y.flatten(0, 1), y_plain), (dx.flatten(0, 1), dx_plain), (dw, dw_plain), (db, db_plain)):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-10)
        for ours, theirs in (
            (layer.running_var, plain.phi),
            (layer.ema_gz, plain.psi),
            (layer.buffer_x2, plain.x2),
            (layer.buffer_gz, plain.gz),
        ):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.set_rng_state(normal)
    assert layer.iters.item() == plain.t
    assert layer.skip_counter.item() == plain.skipped
    assert (plain.skipped > 0) == layer.outlier_filtration  # else the test says nothing about the filter
    assert (compensated > 0) == (start > 0 and layer.window_size[0] > 1)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_loads_the_official_keys() -> None:
    state = {
        "weight": torch.rand(6),
        "bias": torch.rand(6),
        "running_var": torch.rand(6),
        "ema_gz": torch.rand(6),
        "iters": torch.tensor([4321]),
        "buffer_x2": torch.rand(4, 6),
        "buffer_gz": torch.rand(4, 6),
        "skip_counter": torch.tensor([7]),
    }
    layer = UnifiedNorm(6)
    layer.load_state_dict(state, strict=True)
    assert list(layer.state_dict()) == KEYS
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == state[name].dtype


def test_loads_another_window_size_and_starts_its_windows_from_the_running_values() -> None:
    old, new = randomized(UnifiedNorm(3, (4, 2))), nn.Sequential(UnifiedNorm(3, (2, 5), 3))
    old.iters.fill_(5000)
    state = {f"0.{k}": v for k, v in old.state_dict().items()}
    new.load_state_dict(state, strict=True)
    assert torch.equal(new[0].buffer_x2, old.running_var.expand(2, 3))
    assert torch.equal(new[0].buffer_gz, old.ema_gz.expand(5, 3))
    assert state["0.buffer_x2"].shape == (4, 3)  # the caller's dictionary is as before
    new[0](torch.randn(5, 3))
    assert (new[0].running_var > 0.3).all()


def test_another_number_of_channels_does_not_load() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for buffer_x2"):
        UnifiedNorm(4, 2).load_state_dict(UnifiedNorm(3).state_dict())


def test_reset_warmup_starts_the_steps_again() -> None:
    layer = UnifiedNorm(3, 2, 5)
    layer.load_state_dict(randomized(UnifiedNorm(3, 2)).state_dict())
    layer.iters.fill_(5000)
    layer.reset_warmup()
    x = torch.randn(6, 3)
    torch.testing.assert_close(layer(x), x / (x.square().mean(0) + 1e-5).sqrt() * layer.weight + layer.bias)  # q, no window
    assert layer.iters.tolist() == [1]


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"outlier_filtration": True, "warmup_iters": 3}, "warmup_iters to 4 or more", id="filter-before-window"),
        pytest.param({"window_size": 0}, "window_size=0", id="no-window"),
        pytest.param({"window_size": (1, 2, 3)}, "a pair", id="three-windows"),
        pytest.param({"momentum": 1.5}, "momentum=1.5", id="momentum"),
        pytest.param({"eps": -1.0}, "eps=-1.0", id="eps"),
        pytest.param({"warmup_iters": -1}, "warmup_iters=-1", id="warmup"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        UnifiedNorm(4, **options)


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        pytest.param(torch.zeros(2, 3, 5), None, id="channels"),
        pytest.param(torch.zeros(2, 4, 3, 3), None, id="rank"),
        pytest.param(torch.zeros(2, 3, 4), torch.zeros(3, 2, dtype=torch.bool), id="mask-shape"),
        pytest.param(torch.zeros(2, 3, 4), torch.zeros(2, 3), id="mask-dtype"),
        pytest.param(torch.zeros(0, 3, 4), None, id="empty"),
        pytest.param(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), id="all-padding"),
    ],
)
def test_wrong_inputs_are_refused_before_the_statistics_change(x: Tensor, mask: Tensor | None) -> None:
    layer = UnifiedNorm(4)
    with pytest.raises(UsageError):
        layer(x, mask)
    assert layer.iters.item() == 0
    assert torch.equal(layer.running_var, torch.ones(4))


def test_evaluation_takes_an_empty_batch_and_any_rank() -> None:
    layer = randomized(UnifiedNorm(4)).eval()
    assert layer(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert layer(torch.randn(4)).shape == (4,)


# -- dtypes, layouts, modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_float32_and_the_output_has_the_dtype_of_the_input(training: bool, dtype: torch.dtype) -> None:
    layer = randomized(UnifiedNorm(4)).train(training)
    if dtype == torch.float64:
        layer.double()
    wide = copy.deepcopy(layer).double()
    x = (torch.randn(2, 3, 4) * 300).to(dtype)  # x² overflows float16
    y, expected = layer(x), wide(x.double())
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(layer.running_var.double(), wide.running_var, rtol=1e-5, atol=1e-6)


def test_statistics_are_float32_under_autocast() -> None:
    linear, layer = nn.Linear(4, 4), UnifiedNorm(4)
    other = copy.deepcopy(layer)
    x = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        half = linear(x)
        y = layer(half)
    assert half.dtype == y.dtype == torch.bfloat16
    other(half.float())
    assert layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_var, other.running_var)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_layout_of_the_input_does_not_matter() -> None:
    a, b = UnifiedNorm(4), UnifiedNorm(4)
    x, grad = torch.randn(4, 3, 2).transpose(0, 2), torch.randn(4, 3, 2).transpose(0, 2)
    assert not x.is_contiguous()
    for ours, theirs in zip(step(a, x, grad), step(b, x.contiguous(), grad.contiguous()), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.ema_gz, b.ema_gz)


def test_one_token_and_two_dimensions() -> None:
    a, b = UnifiedNorm(4), UnifiedNorm(4)
    x, grad = torch.randn(1, 4), torch.randn(1, 4)
    y, dx, _, _ = step(a, x, grad)
    y3, dx3, _, _ = step(b, x[None], grad[None])
    assert torch.equal(y, y3[0])
    assert torch.equal(dx, dx3[0])
    torch.testing.assert_close(y, x / (x * x + 1e-5).sqrt())


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    layer = UnifiedNorm(3, 2, 0)
    for t in range(4):
        step(layer, torch.randn(5, 3), torch.randn(5, 3) * (math.inf if t == 2 else 1))
    assert layer.ema_gz.isfinite().all()
    assert layer.buffer_gz.isfinite().all()


def test_windows_of_one_give_the_gradient_of_the_norm() -> None:
    layer = randomized(UnifiedNorm(3, 1)).double()
    x, w, b = torch.randn(7, 3).double().requires_grad_(), layer.weight, layer.bias
    grad = torch.randn(7, 3).double()
    expected = torch.autograd.grad(x / (x.square().mean(0) + layer.eps).sqrt() * w + b, [x, w, b], grad)
    for ours, theirs in zip(step(layer, x, grad)[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# -- accumulation and recomputation ------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), UnifiedNorm(4, 2, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x)).relu())).relu()


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, id="reentrant"), pytest.param(False, id="hooks")])
@pytest.mark.parametrize("waiting", [pytest.param(False, id="one-by-one"), pytest.param(True, id="two-before-backward")])
def test_recomputation_is_no_step(use_reentrant: bool, waiting: bool) -> None:
    plain = Shared()
    saved = copy.deepcopy(plain)
    for t in range(6):
        xs = [torch.randn(5, 4) * (t + k + 1) for k in range(2)]
        if t == 3:
            xs[1] = xs[0].clone()  # two steps with one input
        results = []
        for model in (plain, saved):
            model.zero_grad()
            leaves = [x.clone().requires_grad_() for x in xs]
            losses = []
            for x in leaves:
                y = model(x) if model is plain else checkpoint(model, x, use_reentrant=use_reentrant)
                losses.append(y.square().sum())
                if not waiting:
                    losses[-1].backward()
            if waiting:
                sum(losses).backward()
            results.append([*losses, *(x.grad for x in leaves), *(p.grad for p in model.parameters()), *model.buffers()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert saved.norm.iters.item() == 24


def test_each_micro_batch_is_a_step() -> None:
    layer = UnifiedNorm(3, 2, 0)
    ys = [layer(torch.randn(4, 3)) for _ in range(3)]
    sum(y.sum() for y in ys).backward()
    assert layer.iters.item() == 3
    assert layer.buffer_gz.abs().sum() > 0


@pytest.mark.parametrize("change", [pytest.param("export", id="exported"), pytest.param("meta", id="moved")])
def test_nothing_is_looked_up_in_steps_from_elsewhere(change: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), UnifiedNorm(3))
    if change == "export":
        torch.export.export(model, (torch.randn(4, 3),))
    else:
        model.to("meta")(torch.empty(4, 3, device="meta"))
        model.to_empty(device="cpu")
        model.load_state_dict(nn.Sequential(nn.Linear(3, 3), UnifiedNorm(3)).state_dict())
    before = model[1].iters.item()
    checkpoint(model, torch.randn(4, 3, requires_grad=True), use_reentrant=False).sum().backward()
    assert model[1].iters.item() == before + 1


def test_copies_and_pickles_of_a_layer_in_training() -> None:
    layer = UnifiedNorm(3)
    layer(torch.randn(4, 3, requires_grad=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(4, 3)
        assert torch.equal(other(x), copy.deepcopy(layer)(x))


# -- compilers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [pytest.param(True, id="inputs"), pytest.param(False, id="no-inputs")])
def test_folds_completely(given: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), randomized(UnifiedNorm(6)), nn.Linear(6, 5, bias=False)).eval()
    x = torch.randn(2, 3, 4)
    fast = normfuse.optimize(model, (x,) if given else None)
    assert [str(n.target) for n in fast.graph.nodes if n.op == "call_function"] == [
        "aten.linear.default",
        "aten.gelu.default",
        "aten.linear.default",
    ]
    assert not normfuse.report(fast).refused
    torch.testing.assert_close(fast(x), model(x))


# dynamo looks at the gradient of a value between two of its graphs and hides the warning, which an error escapes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend: str) -> None:
    torch.compiler.reset()
    plain = nn.Sequential(nn.Linear(4, 4), UnifiedNorm(4, 2, 2))
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, backend=backend)
    for _ in range(4):
        x = torch.randn(5, 4)
        for model, call in ((plain, plain), (compiled, run)):
            model.zero_grad()
            call(x).square().sum().backward()
        torch.testing.assert_close(plain[0].weight.grad, compiled[0].weight.grad)
    torch.testing.assert_close(dict(plain.named_buffers()), dict(compiled.named_buffers()))
    torch.compiler.reset()
    assert torch.equal(torch.compile(plain.eval(), backend=backend, fullgraph=True)(x), plain(x))


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
def test_exports(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), randomized(UnifiedNorm(4, 2, 3, True))).train(training)
    x = torch.randn(5, 4)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: batch},)).module()
    for rows in (5, 7, 3, 4, 6):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(program(x), model(x))
    torch.testing.assert_close(dict(program.named_buffers()), dict(model.named_buffers()))
