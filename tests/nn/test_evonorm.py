"""EvoNorm: timm's layers give the same values, and without activation nothing is left at inference."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.evonorm import KINDS, EvoNorm

BATCH = ("B0", "B1", "B2")
DIVIDES = ("S0a", "S1a", "S2a")
CASES = [pytest.param(kind, act, id=f"{kind}-{'act' if act else 'plain'}") for kind in KINDS for act in (True, False)]
X = (3, 8, 5, 4)


def _randomized(module: nn.Module) -> Any:
    with torch.no_grad():
        for t in module.state_dict().values():
            t.copy_(torch.rand_like(t) + 0.5)
    return module


def _layer(kind: str, apply_act: bool = True, **kwargs: Any) -> Any:
    return _randomized(EvoNorm(kind, 8, apply_act=apply_act, **({} if kind in BATCH else {"groups": 2}), **kwargs))


def _by_hand(layer: Any, kind: str, x: Tensor, var: Tensor | None) -> Tensor:
    """The table, channel by channel and group by group."""
    eps, out = layer.eps, torch.empty_like(x)
    size = x.shape[1] // getattr(layer, "groups", 1)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            v, own = x[n, c], x[n, c]
            group = x[n, c // size * size : c // size * size + size]
            std = math.sqrt(float((own - own.mean()).square().mean()) + eps)
            rms = math.sqrt(float(own.square().mean()) + eps)
            group_std = math.sqrt(float((group - group.mean()).square().mean()) + eps)
            group_rms = math.sqrt(float(group.square().mean()) + eps)
            floor = math.sqrt(float(var[c]) + eps) if var is not None else 0.0
            if layer.apply_act:
                v = {
                    "B0": lambda v, c=c, s=std, f=floor: v / (v * layer.v[c] + s).clamp(min=f),
                    "B1": lambda v, r=rms, f=floor: v / ((v + 1) * r).clamp(min=f),
                    "B2": lambda v, r=rms, f=floor: v / (r - v).clamp(min=f),
                    "S0": lambda v, c=c, s=group_std: v * torch.sigmoid(v * layer.v[c]) / s,
                    "S1": lambda v, s=group_std: v * torch.sigmoid(v) / s,
                    "S2": lambda v, r=group_rms: v * torch.sigmoid(v) / r,
                }[kind[:2]](v)
            elif kind in DIVIDES:
                v = v / (group_rms if kind == "S2a" else group_std)
            out[n, c] = v * layer.weight[c] + layer.bias[c]
    return out


@pytest.mark.parametrize(("kind", "apply_act"), CASES)
def test_values_follow_the_table(kind: str, apply_act: bool) -> None:
    layer = _layer(kind, apply_act).double().eval()
    x = torch.randn(X, dtype=torch.float64)
    expected = _by_hand(layer, kind, x, getattr(layer, "running_var", None))
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "apply_act"), CASES)
def test_timm_gives_the_same(kind: str, apply_act: bool) -> None:
    evo_norm = pytest.importorskip("timm.layers.evo_norm")
    ours = _layer(kind, apply_act)
    theirs = getattr(evo_norm, f"EvoNorm2d{kind}")(8, apply_act=apply_act, **({} if kind in BATCH else {"groups": 2}))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.eps == theirs.eps
    for training in (True, True, False):
        x = torch.randn(X) * 2 + 0.5
        given = [x.clone().requires_grad_() for _ in range(2)]
        a, b = ours.train(training)(given[0]), theirs.train(training)(given[1])
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
        a.square().sum().backward()
        b.square().sum().backward()
        assert torch.allclose(given[0].grad, given[1].grad, rtol=1e-3, atol=1e-4)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-3), name
        for name, t in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], t, rtol=1e-6), name


def test_defaults_are_those_of_timm() -> None:
    evo_norm = pytest.importorskip("timm.layers.evo_norm")
    for kind in KINDS:
        ours, theirs = EvoNorm(kind, 64), getattr(evo_norm, f"EvoNorm2d{kind}")(64)
        assert ours.eps == theirs.eps
        assert getattr(ours, "groups", None) == getattr(theirs, "groups", None)
        assert getattr(ours, "momentum", None) == getattr(theirs, "momentum", None)
        for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(a, b)


def test_constant_image_has_the_deviation_of_eps() -> None:
    layer = EvoNorm("B0", 2, eps=1e-2)
    nn.init.zeros_(layer.v)
    layer.running_var.zero_()
    x = torch.full((1, 2, 3, 3), 5.0)
    assert torch.allclose(layer.eval()(x), x / 0.1)


def test_running_variance_is_unbiased() -> None:
    layer = _layer("B0").double().train()
    before = layer.running_var.clone()
    x = torch.randn(X, dtype=torch.float64)
    layer(x)
    assert torch.allclose(layer.running_var, 0.9 * before + 0.1 * x.var((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "apply_act"), CASES)
def test_gradients(kind: str, apply_act: bool, training: bool) -> None:
    layer = _layer(kind, apply_act).double().train(training)
    if kind in BATCH:
        layer.momentum = 0.0  # the numerical gradient calls forward many times
    x = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", BATCH)
def test_checkpointing_updates_the_statistics_once(kind: str, use_reentrant: bool) -> None:
    plain = _layer(kind).train()
    repeated = copy.deepcopy(plain)
    x = torch.randn(X, requires_grad=True)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(repeated, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(plain.running_var, repeated.running_var)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "apply_act"), CASES)
def test_empty_batch_and_any_layout(kind: str, apply_act: bool, training: bool) -> None:
    layer = _layer(kind, apply_act).train(training)
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.empty(0, 8, 3, 3)).shape == (0, 8, 3, 3)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]), name
    x = torch.randn(X)
    apart = torch.stack((x, x), -1)[..., 0]
    assert torch.allclose(layer(x), layer(apart), rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer(x), layer(x.contiguous(memory_format=torch.channels_last)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BATCH)
def test_one_value_a_channel_is_refused_in_training(kind: str) -> None:
    layer = _layer(kind)
    with pytest.raises(UsageError, match="more than one value per channel"):
        layer.train()(torch.randn(1, 8, 1, 1))
    assert bool(layer.eval()(torch.randn(1, 8, 1, 1)).isfinite().all())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_half_inputs_have_float32_statistics(kind: str, training: bool) -> None:
    layer = _layer(kind).train(training)
    exact = copy.deepcopy(layer)
    x = (torch.randn(X) * 300).half()  # squares overflow float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float16
    expected = exact(x.float())
    assert torch.allclose(y.float(), expected, rtol=2e-2, atol=2e-2)
    for name, t in exact.state_dict().items():
        assert torch.allclose(layer.state_dict()[name], t, rtol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_half_module_takes_half(kind: str) -> None:
    layer = _layer(kind).eval()
    x = torch.randn(X)
    expected = layer(x)
    y = layer.half()(x.half())
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize(("kind", "apply_act"), CASES)
def test_half_model_is_optimized(kind: str, apply_act: bool, with_inputs: bool) -> None:
    model = _randomized(nn.Sequential(nn.Conv2d(3, 8, 3), _layer(kind, apply_act), nn.Conv2d(8, 5, 1))).eval()
    x = torch.randn(2, 3, 7, 7)
    expected = model(x).detach()
    model.bfloat16()
    fast = normfuse.optimize(model, (x.bfloat16(),) if with_inputs else None)
    y = fast(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected, atol=0.05 * float(expected.abs().max()))


def test_group_size_and_wrong_arguments() -> None:
    assert EvoNorm("S0", 12, group_size=4).groups == 3
    with pytest.raises(UsageError, match="12 channels do not split into groups of 5"):
        EvoNorm("S0", 12, group_size=5)
    with pytest.raises(UsageError, match="12 channels do not split into 32 groups"):
        EvoNorm("S1", 12)
    with pytest.raises(UsageError, match="expected one of B0"):
        EvoNorm("S3", 12)
    with pytest.raises(AssertionError, match="N, C, H, W"):
        _layer("B0")(torch.randn(2, 8, 3))


def test_other_activation() -> None:
    layer = _layer("S1", act_layer=nn.ReLU).eval()
    x = torch.randn(X)
    groups = x.reshape(3, 2, -1)
    den = (groups.var(-1, correction=0) + layer.eps).sqrt().repeat_interleave(4, 1)[..., None, None]
    expected = x.relu() / den * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_compile_work(kind: str) -> None:
    layer = _layer(kind)
    x = torch.randn(X)
    exported = torch.export.export(layer.eval(), (x,)).module()
    assert torch.allclose(exported(x), layer(x), atol=1e-5)
    for training in (False, True):
        layer.train(training)
        other = copy.deepcopy(layer)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(layer, backend="eager")(x), other(x), atol=1e-5)
        for name, t in other.state_dict().items():
            assert torch.allclose(layer.state_dict()[name], t), name


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize(("kind", "apply_act"), CASES)
def test_optimize_folds_what_is_affine(kind: str, apply_act: bool, with_inputs: bool) -> None:
    model = _randomized(nn.Sequential(nn.Conv2d(3, 8, 3), _layer(kind, apply_act), nn.Conv2d(8, 5, 1))).eval()
    x = torch.randn(2, 3, 7, 7)
    fast = normfuse.optimize(model, (x,) if with_inputs else None)
    calls = [str(n.target).removeprefix("aten.").split(".")[0] for n in fast.graph.nodes if n.op == "call_function"]
    if apply_act or kind in DIVIDES:
        # γ and β are in the second convolution: nothing comes between it and the division
        assert "batch_norm" not in calls
        assert calls[-2:] == (["div", "conv2d"] if kind in BATCH else ["flatten", "conv2d"])
        assert sum(calls.count(statistic) for statistic in ("var", "mean", "rms_norm")) == 1
    else:
        assert calls == ["conv2d", "conv2d"]
    expected = model(x).detach()
    assert torch.allclose(fast(x), expected, atol=1e-5 * float(expected.abs().max()))
    if with_inputs:
        assert normfuse.report(fast).exact.max_rel < 1e-9
