"""Batch-channel normalization: BatchNorm, then a group norm with one gain for each group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.batch_channel import BatchChannelNorm, EstimatedBatchNorm2d

OFFICIAL = {
    "weight": (1, 4, 1),
    "bias": (1, 4, 1),
    "pbn.weight": (8,),
    "pbn.bias": (8,),
    "pbn.running_mean": (8,),
    "pbn.running_var": (8,),
    "pbn.num_batches_tracked": (),
}


def _randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point() and "moving_speed" not in name:
                t.copy_(torch.rand_like(t) + 0.5)
    return module


def _reference(layer: BatchChannelNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Batch norm with the given statistics, then each (sample, group) by itself, as the paper writes it."""
    pbn: Any = layer.pbn
    y = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + layer.eps).sqrt()
    y = y * pbn.weight.view(1, -1, 1, 1) + pbn.bias.view(1, -1, 1, 1)
    rows = y.reshape(x.shape[0], layer.groups, -1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    return (layer.weight * rows + layer.bias).reshape(x.shape)


def _layer(**kwargs: Any) -> BatchChannelNorm:
    layer = _randomized(BatchChannelNorm(8, 4, **kwargs).double())
    assert isinstance(layer, BatchChannelNorm)
    return layer


X = (3, 8, 5, 4)


@pytest.mark.parametrize("estimate", [False, True])
def test_eval_is_a_batch_norm_and_a_group_norm(estimate: bool) -> None:
    layer = _layer(estimate=estimate).eval()
    x = torch.randn(X, dtype=torch.float64)
    pbn: Any = layer.pbn
    assert torch.allclose(layer(x), _reference(layer, x, pbn.running_mean, pbn.running_var), rtol=1e-12, atol=1e-12)


def test_training_uses_the_batch_and_updates_as_batch_norm_does() -> None:
    layer = _layer().train()
    x = torch.randn(X, dtype=torch.float64) * 3 + 1
    norm = nn.BatchNorm2d(8).double()
    norm.load_state_dict(layer.pbn.state_dict(), strict=True)
    y = layer(x)
    norm(x)
    assert torch.allclose(y, _reference(layer, x, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)), rtol=1e-11, atol=1e-11)
    for name, t in norm.state_dict().items():
        assert torch.allclose(layer.pbn.state_dict()[name].double(), t.double(), rtol=1e-12), name


def test_estimate_follows_the_moving_speed() -> None:
    """Three steps by hand: R_σ² is taken around the old R_μ, and both are updated before they are used."""
    layer = _layer(estimate=True, momentum=0.3).train()
    pbn: Any = layer.pbn
    mean, var = pbn.running_mean.clone(), pbn.running_var.clone()
    for _ in range(3):
        x = torch.randn(X, dtype=torch.float64) + 2
        y = layer(x)
        around = (x - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        mean = 0.7 * mean + 0.3 * x.mean((0, 2, 3))
        var = 0.7 * var + 0.3 * around
        assert torch.allclose(pbn.running_mean, mean, rtol=1e-6)  # the speed is a float32 0.3
        assert torch.allclose(pbn.running_var, var, rtol=1e-6)
        assert torch.allclose(y, _reference(layer, x, pbn.running_mean, pbn.running_var), rtol=1e-11, atol=1e-11)
    assert int(pbn.num_batches_tracked) == 3


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("prefix", ["pbn", "bn"])
def test_official_keys_load(estimate: bool, prefix: str) -> None:
    shapes = OFFICIAL | ({"pbn.estbn_moving_speed": (1,)} if estimate else {})
    state = {k.replace("pbn.", f"{prefix}."): torch.rand(s) if s else torch.tensor(7) for k, s in shapes.items()}
    layer = BatchChannelNorm(8, 4, estimate=estimate)
    given = dict(state)
    layer.load_state_dict(state, strict=True)
    assert state.keys() == given.keys()
    nn.Sequential(nn.Identity(), layer).load_state_dict({f"1.{k}": v for k, v in state.items()}, strict=True)
    assert set(layer.state_dict()) == set(shapes)
    for key in shapes:
        assert torch.equal(layer.state_dict()[key], state[key.replace("pbn.", f"{prefix}.")].to(layer.state_dict()[key].dtype))


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(estimate: bool, training: bool) -> None:
    layer = _layer(estimate=estimate, momentum=0.0).train(training)
    x = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    parameters = dict(layer.named_parameters())

    def run(*values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x.detach(),))
        return out

    assert torch.autograd.gradcheck(run, tuple(parameters.values()))


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_updates_the_statistics_once(estimate: bool, use_reentrant: bool) -> None:
    plain = _layer(estimate=estimate).train()
    repeated = copy.deepcopy(plain)
    x = torch.randn(X, dtype=torch.float64, requires_grad=True)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(repeated, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.allclose(x.grad, expected, rtol=1e-12, atol=1e-12)
    for name, t in plain.state_dict().items():
        assert torch.equal(repeated.state_dict()[name], t), name


def test_two_forwards_may_come_before_their_backwards() -> None:
    layer = _layer(estimate=True).train()
    losses = [layer(torch.randn(X, dtype=torch.float64)).square().sum() for _ in range(2)]
    torch.stack(losses).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch_passes_and_leaves_the_statistics(estimate: bool, training: bool) -> None:
    layer = _layer(estimate=estimate).train(training)
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.empty(0, 8, 3, 3, dtype=torch.float64)).shape == (0, 8, 3, 3)
    for name, t in layer.state_dict().items():
        if name != "pbn.num_batches_tracked":
            assert torch.equal(t, before[name]), name


def test_one_value_a_channel_is_refused_in_training() -> None:
    with pytest.raises(UsageError, match="more than one value per channel"):
        BatchChannelNorm(8, 4).train()(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_layout_of_the_input_does_not_matter(estimate: bool, training: bool) -> None:
    layer = _layer(estimate=estimate).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(X, dtype=torch.float64)
    apart = torch.stack((x, x), -1)[..., 0]
    assert not apart.is_contiguous()
    assert torch.allclose(layer(x), other(apart), rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer(x), other(x.contiguous(memory_format=torch.channels_last)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimate", [False, True])
def test_autocast_keeps_the_statistics_in_float32(estimate: bool) -> None:
    layer = BatchChannelNorm(8, 4, estimate=estimate).train()
    exact = copy.deepcopy(layer)
    x = (torch.randn(X) * 300).half()  # squares overflow float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    expected = exact(x.float())
    assert torch.allclose(y.float(), expected, atol=0.05)
    assert torch.allclose(layer.pbn.running_var, exact.pbn.running_var, rtol=1e-5)


def test_half_module_takes_half() -> None:
    layer = _randomized(BatchChannelNorm(8, 4)).eval()
    x = torch.randn(X)
    expected = layer(x)
    y = layer.half()(x.half())
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), expected, atol=0.03)


def test_other_ranks_and_wrong_groups_are_refused() -> None:
    with pytest.raises(AssertionError, match="N, C, H, W"):
        BatchChannelNorm(8, 4)(torch.randn(2, 8, 3))
    with pytest.raises(UsageError, match="do not split"):
        BatchChannelNorm(10, 4)


@pytest.mark.parametrize("estimate", [False, True])
def test_export_and_compile_work(estimate: bool) -> None:
    layer = _layer(estimate=estimate)
    x = torch.randn(X, dtype=torch.float64)
    exported = torch.export.export(layer.eval(), (x,)).module()
    assert torch.allclose(exported(x), layer(x), rtol=1e-12, atol=1e-12)
    for training in (False, True):
        layer.train(training)
        other = copy.deepcopy(layer)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(layer, backend="eager")(x), other(x), rtol=1e-12, atol=1e-12)
        for name, t in other.state_dict().items():
            assert torch.allclose(layer.state_dict()[name], t), name


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_optimize_leaves_one_group_norm(estimate: bool, with_inputs: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), BatchChannelNorm(8, 4, estimate=estimate), nn.ReLU())
    _randomized(model).eval()
    x = torch.randn(2, 3, 6, 6)
    fast = normfuse.optimize(model, (x,) if with_inputs else None)
    calls = [str(n.target) for n in fast.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.conv2d.default", "aten.group_norm.default", "aten.relu.default"]
    assert torch.allclose(fast(x), model(x), atol=1e-4)
    if with_inputs:
        assert normfuse.report(fast).exact.max_rel < 1e-9


def test_estimated_batch_norm_stands_alone() -> None:
    layer = EstimatedBatchNorm2d(3, moving_speed=0.0)
    assert set(layer.state_dict()) == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "estbn_moving_speed",
    }
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(layer.train()(x), layer.eval()(x))
