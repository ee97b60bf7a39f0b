import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

from normfuse.errors import UsageError
from normfuse.nn.l1 import L1BatchNorm, L1LayerNorm, from_norm_matters
from tests.nn.contract import compiles, exports, optimized, randomised, reads_any_layout, unshaped, wide_statistics

MODES = [pytest.param(True, id="train"), pytest.param(False, id="eval")]
C = [pytest.param(1.0, id="c=1"), pytest.param(math.sqrt(math.pi / 2), id="gaussian c")]
IMAGES = [
    pytest.param((6, 3), id="vectors"),
    pytest.param((4, 3, 5), id="sequences"),
    pytest.param((4, 3, 5, 2), id="images"),
    pytest.param((2, 3, 4, 2, 3), id="volumes"),
]


def closed_form(grad, x, gamma, c, eps, dims):
    """∂L/∂x and ∂L/∂γ as derived on paper."""
    mean = x.mean(dims, keepdim=True)
    s = c * (x - mean).abs().mean(dims, keepdim=True) + eps
    normal, h = (x - mean) / s, grad * gamma
    sign = torch.sign(x - mean)
    of_x = h - h.mean(dims, keepdim=True)
    of_x = of_x - c * (sign - sign.mean(dims, keepdim=True)) * (h * normal).mean(dims, keepdim=True)
    return of_x / s, grad * normal


# -- layer norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize(
    ("c", "expected"),
    [
        pytest.param(1.0, [-4 / 3, -2 / 3, 0.0, 2.0], id="c=1"),
        pytest.param(math.sqrt(math.pi / 2), [-1.06384608, -0.53192304, 0.0, 1.59576912], id="gaussian c"),
    ],
)
def test_l1_layer_norm_gives_the_published_values(training, c, expected):
    layer = L1LayerNorm(4, eps=0.0, scale_const=c).train(training)
    torch.testing.assert_close(layer(torch.tensor([1.0, 2.0, 3.0, 6.0])), torch.tensor(expected))


def test_l1_layer_norm_of_normal_values_has_unit_variance():
    torch.manual_seed(0)
    y = L1LayerNorm(20000)(torch.randn(20000, dtype=torch.float64) * 5 + 3)
    assert y.std().item() == pytest.approx(1, abs=0.02)
    assert L1LayerNorm(3).scale_const == pytest.approx(1.2533141)


@pytest.mark.parametrize("c", C)
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("shape", [pytest.param((6,), id="one axis"), pytest.param((2, 3), id="two axes")])
def test_l1_layer_norm_has_the_gradient_of_the_closed_form(training, shape, c):
    layer = randomised(L1LayerNorm(shape, eps=1e-2, scale_const=c).double()).train(training)
    x = torch.randn(4, 5, *shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    layer(x).backward(grad)
    dims = tuple(range(-len(shape), 0))
    of_x, of_gamma = closed_form(grad, x.detach(), layer.weight.detach(), c, 1e-2, dims)
    torch.testing.assert_close(x.grad, of_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, of_gamma.sum((0, 1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=["affine", "no bias", "bare"])
def test_l1_layer_norm_passes_gradcheck(training, options):
    layer = randomised(L1LayerNorm(5, **options).double()).train(training)
    names, values = zip(*layer.named_parameters(), strict=True) if options != {"elementwise_affine": False} else ((), ())

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), *values))


def test_l1_layer_norm_trains_as_it_infers():
    layer = randomised(L1LayerNorm(6))
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_l1_layer_norm_keeps_less_for_the_gradient_than_a_chain_of_operators():
    def kept(layer, x):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.setdefault(t.data_ptr(), t.numel() * t.element_size()) and t, lambda t: t
        ):
            layer(x)
        return sum(found.values())

    for dtype in (torch.float32, torch.bfloat16):
        layer, x = L1LayerNorm(256, dtype=dtype), torch.randn(64, 256, dtype=dtype, requires_grad=True)
        trained, chain = kept(layer.train(), x), kept(layer.eval(), x)
        assert trained < 1.1 * x.numel() * x.element_size()
        assert trained < 0.6 * chain


def test_l1_layer_norm_gives_the_gradient_of_each_sample():
    layer = randomised(L1LayerNorm(4).double())
    x, weight = torch.randn(3, 4, dtype=torch.float64), layer.weight.detach().clone()

    def loss(weight, sample):
        return torch.func.functional_call(layer, {"weight": weight}, (sample,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for row, sample in zip(found, x, strict=True):
        torch.testing.assert_close(row, torch.func.grad(loss)(weight, sample))


def test_l1_layer_norm_says_that_it_has_one_derivative_in_training():
    layer, x = L1LayerNorm(4), torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(layer.eval()(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()


@pytest.mark.parametrize("training", MODES)
def test_l1_layer_norm_of_equal_values_gives_the_shift_and_a_finite_gradient(training):
    layer = randomised(L1LayerNorm(5)).train(training)
    x = torch.full((2, 5), 3.0, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, layer.bias.expand(2, 5))
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("training", MODES)
def test_l1_layer_norm_reads_any_layout_and_keeps_the_dtype(training):
    layer = randomised(L1LayerNorm(7)).train(training)
    reads_any_layout(layer, torch.randn(2, 3, 7))
    wide_statistics(layer, torch.randn(2, 3, 7) * 300 + 2000)
    assert layer(torch.randn(1, 1, 7)).shape == (1, 1, 7)
    with pytest.raises(UsageError, match=r"expected floating-point values of shape \(…, 7\)"):
        layer(torch.randn(2, 6))
    with pytest.raises(UsageError, match="scale_const=0"):
        L1LayerNorm(4, scale_const=0)


def test_l1_layer_norm_exports_compiles_and_optimizes():
    model = randomised(nn.Sequential(nn.Linear(8, 8), L1LayerNorm(8), nn.Linear(8, 4)))
    x = torch.randn(3, 5, 8)
    exports(model, (x,))
    compiles(model, (x,))
    for left in (optimized(model, (x,)), unshaped(model, (x,))):
        assert left == ["linear", "mean", "sub", "abs", "mean", "mul", "add", "div", "linear"]  # γ and β are in the linear


# -- batch norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("c", C)
def test_l1_batch_norm_normalizes_each_channel_of_the_batch(shape, c):
    layer = randomised(L1BatchNorm(3, eps=1e-3, scale_const=c).double())
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    y = layer(x)
    for i in range(3):
        values = x[:, i]
        s = c * (values - values.mean()).abs().mean() + 1e-3
        expected = (values - values.mean()) / s * layer.weight[i] + layer.bias[i]
        torch.testing.assert_close(y[:, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", IMAGES)
def test_l1_batch_norm_has_the_gradient_of_the_closed_form(shape):
    layer = randomised(L1BatchNorm(3, eps=1e-2).double())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    layer(x).backward(grad)
    dims = (0, *range(2, len(shape)))
    gamma = layer.weight.detach().reshape(-1, *[1] * (len(shape) - 2))
    of_x, of_gamma = closed_form(grad, x.detach(), gamma, layer.scale_const, 1e-2, dims)
    torch.testing.assert_close(x.grad, of_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, of_gamma.sum(dims), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, grad.sum(dims), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("affine", [pytest.param(True, id="affine"), pytest.param(False, id="bare")])
def test_l1_batch_norm_passes_gradcheck(training, affine):
    layer = randomised(L1BatchNorm(3, affine=affine, momentum=0.0).double()).train(training)
    names, values = zip(*layer.named_parameters(), strict=True) if affine else ((), ())

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True), *values))


@pytest.mark.parametrize("momentum", [pytest.param(0.1, id="moving"), pytest.param(None, id="mean of all")])
def test_l1_batch_norm_follows_its_batches_as_batch_norm_does(momentum):
    layer, batch_norm = L1BatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    scale, batches = torch.ones(3), [torch.randn(7, 3) * (i + 1) + i for i in range(4)]
    for i, x in enumerate(batches):
        layer(x), batch_norm(x)
        rate = 1 / (i + 1) if momentum is None else momentum
        scale += rate * (layer.scale_const * (x - x.mean(0)).abs().mean(0) - scale)
    torch.testing.assert_close(layer.running_mean, batch_norm.running_mean)
    torch.testing.assert_close(layer.running_scale, scale)
    assert layer.num_batches_tracked == 4
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(batches[0])
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0
    assert layer.running_scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("affine", [pytest.param(True, id="affine"), pytest.param(False, id="bare")])
def test_l1_batch_norm_is_affine_in_eval_mode(shape, affine):
    layer = randomised(L1BatchNorm(3, eps=1e-2, affine=affine).double()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    wide = [-1, *[1] * (len(shape) - 2)]
    expected = (x - layer.running_mean.reshape(wide)) / (layer.running_scale + 1e-2).reshape(wide)
    if affine:
        expected = expected * layer.weight.reshape(wide) + layer.bias.reshape(wide)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", MODES)
def test_l1_batch_norm_reads_any_layout_and_keeps_the_dtype(training):
    layer = randomised(L1BatchNorm(3, momentum=0.0)).train(training)
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))
    wide_statistics(layer, x * 300)
    if training:
        assert all(v.dtype == torch.float32 for v in (layer.running_mean, layer.running_scale))
    else:
        reads_any_layout(layer, x)


def test_l1_batch_norm_of_a_dead_channel_is_finite_in_float16():
    layer = randomised(L1BatchNorm(2)).half()
    with torch.no_grad():
        layer.running_scale[0] = 0  # γ / ε is above the largest float16
    x = layer.running_mean.reshape(1, 2, 1).expand(3, 2, 4)
    torch.testing.assert_close(layer.eval()(x), layer.bias.reshape(1, 2, 1).expand(3, 2, 4))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param((0, 3, 4), "an empty batch in training", id="empty"),
        pytest.param((1, 3), "one value a channel in training", id="one value"),
        pytest.param((4, 2, 5), r"has shape \(4, 2, 5\); expected \(N, 3\)", id="channels"),
        pytest.param((4,), "and up to three more axes", id="rank"),
    ],
)
def test_l1_batch_norm_refuses_what_has_no_statistics(shape, message):
    layer = L1BatchNorm(3)
    with pytest.raises(UsageError, match=message):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("reentrant", [pytest.param(False, id="saved tensors"), pytest.param(True, id="reentrant")])
def test_l1_batch_norm_counts_a_checkpointed_batch_once(reentrant):
    plain = randomised(nn.Sequential(nn.Linear(4, 3), L1BatchNorm(3)).double())
    again = copy.deepcopy(plain)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expected = plain(x)
    found = checkpoint(again, x, use_reentrant=reentrant)
    torch.testing.assert_close(found, expected)
    for model, y in ((plain, expected), (again, found)):
        y.square().sum().backward()
        assert model[1].num_batches_tracked == 1
    for a, b in zip((*plain.parameters(), *plain.buffers()), (*again.parameters(), *again.buffers()), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.grad, b.grad)


def test_l1_batch_norm_loads_official_checkpoints():
    official = {
        "body.0.running_mean": torch.randn(3),
        "body.0.running_var": torch.rand(3) + 0.5,  # the reciprocal of the scale
        "body.0.scale": torch.randn(3),
        "body.0.mean": torch.randn(3),
    }
    model = nn.ModuleDict({"body": nn.Sequential(L1BatchNorm(3))})
    model.load_state_dict(official, strict=True)
    assert set(official) == {f"body.0.{k}" for k in ("running_mean", "running_var", "scale", "mean")}  # not changed
    x = torch.randn(4, 3, 2, 2)
    mean, reciprocal, gamma, beta = (v.reshape(3, 1, 1) for v in official.values())
    expected = (x - mean) * reciprocal * gamma + beta
    torch.testing.assert_close(model.eval()["body"](x), expected)

    converted = from_norm_matters(official | {"head.weight": torch.ones(1)}, "body.0.")
    own = {f"body.0.{k}" for k in ("weight", "bias", "running_mean", "running_scale", "num_batches_tracked")}
    assert set(converted) == {"head.weight"} | own
    model.load_state_dict({k: v for k, v in converted.items() if k in own}, strict=True)
    torch.testing.assert_close(model["body"](x), expected)
    model.load_state_dict(model.state_dict(), strict=True)


def test_untrained_official_checkpoints_are_refused():
    state = {k: torch.zeros(3) for k in ("running_mean", "running_var", "scale", "mean")}
    with pytest.raises(UsageError, match="never trained"):
        from_norm_matters(state)
    with pytest.raises(UsageError, match=r"no a\.running_mean, a\.running_var"):
        from_norm_matters(state, "a.")


@pytest.mark.parametrize("affine", [pytest.param(True, id="affine"), pytest.param(False, id="bare")])
def test_l1_batch_norm_folds_into_convolutions(affine):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), L1BatchNorm(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 2, 1))
    randomised(model)
    x = torch.randn(2, 3, 6, 6)
    exports(model, (x,))
    compiles(model, (x,))
    assert optimized(model, (x,)) == ["conv2d", "relu", "conv2d"]
    assert unshaped(model, (x,)) == ["conv2d", "batch_norm", "relu", "conv2d"]  # which axis is the channels is not known
    before = randomised(nn.Sequential(L1BatchNorm(3, affine=affine), nn.Conv2d(3, 2, 3)))
    assert optimized(before, (x,)) == ["conv2d"]


@pytest.mark.parametrize("shape", [pytest.param((6, 8), id="vectors"), pytest.param((4, 8, 5), id="sequences")])
def test_l1_batch_norm_folds_into_layers_of_other_ranks(shape):
    layers = (nn.Linear(8, 3), L1BatchNorm(3)) if len(shape) == 2 else (nn.Conv1d(8, 3, 1), L1BatchNorm(3))
    assert optimized(randomised(nn.Sequential(*layers)), (torch.randn(shape),)) == ["linear" if len(shape) == 2 else "conv1d"]


def _rank(rank, file, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, grad, layer = torch.load(out / "in.pt", weights_only=False)
    part = slice(0, 3) if rank == 0 else slice(3, None)  # ranks may have batches of different sizes
    mine = x[part].clone().requires_grad_()
    layer(mine).backward(grad[part])
    torch.save((mine.grad, layer.weight.grad, layer.bias.grad, layer.state_dict()), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_l1_batch_norm_on_two_ranks_equals_one_on_the_joined_batch(tmp_path):
    layer = randomised(L1BatchNorm(3).double())
    x, grad = torch.randn(8, 3, 5, dtype=torch.float64), torch.randn(8, 3, 5, dtype=torch.float64)
    torch.save((x, grad, layer), tmp_path / "in.pt")
    spawn(_rank, (tmp_path / "store", tmp_path), nprocs=2)
    joined = x.clone().requires_grad_()
    layer(joined).backward(grad)
    ranks = [torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2)]
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), joined.grad)
    torch.testing.assert_close(ranks[0][1] + ranks[1][1], layer.weight.grad)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], layer.bias.grad)
    for _, _, _, state in ranks:
        for key, value in layer.state_dict().items():
            torch.testing.assert_close(state[key], value, msg=key)
