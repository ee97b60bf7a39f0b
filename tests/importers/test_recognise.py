"""Official layers are recognised by name, state and numbers; whatever only has the name stays, with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.importers import recognise
from tests.importers import official


def _randomized(module: nn.Module) -> Any:
    with torch.no_grad():
        for t in module.state_dict().values():
            t.copy_(torch.rand_like(t) + 0.5) if t.is_floating_point() else t.fill_(7)
    return module.eval()


def _calls(fast: Any) -> list[str]:
    return [str(n.target).removeprefix("aten.").split(".")[0] for n in fast.graph.nodes if n.op == "call_function"]


def _notes(fast: Any) -> str:
    return "\n".join(normfuse.report(fast).notes)


# -- official keys -----------------------------------------------------------------------------------------------------

NORM = {"weight": (6,), "bias": (6,), "running_mean": (6,), "running_var": (6,), "num_batches_tracked": ()}
KEYS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "UN1d": (
        lambda: official.UN1d(6),
        {
            "weight": (6,),
            "bias": (6,),
            "running_var": (6,),
            "ema_gz": (6,),
            "iters": (1,),
            "buffer_x2": (4, 6),
            "buffer_gz": (4, 6),
            "skip_counter": (1,),
        },
    ),
    "MaskPowerNorm": (
        lambda: official.MaskPowerNorm(6, group_num=2),
        {"weight": (6,), "bias": (6,), "running_phi": (1, 6, 1, 1), "ema_gz": (1, 6, 1, 1), "iters": (1,)},
    ),
    "GN": (lambda: official.GN(6, 3), {"weight": (1, 3, 1), "bias": (1, 3, 1), **{f"pbn.{k}": v for k, v in NORM.items()}}),
    "BCNorm": (
        lambda: official.BCNorm(6, 3, 1e-4),
        {"weight": (1, 3, 1), "bias": (1, 3, 1), **{f"bn.{k}": v for k, v in NORM.items()}},
    ),
    "BCNorm-estimate": (
        lambda: official.BCNorm(6, 3, 1e-4, estimate=True),
        {"weight": (1, 3, 1), "bias": (1, 3, 1), **{f"bn.{k}": v for k, v in NORM.items()}, "bn.estbn_moving_speed": (1,)},
    ),
    "EstBN": (lambda: official.EstBN(6), NORM | {"estbn_moving_speed": (1,)}),
    "Conv2d": (lambda: official.Conv2d(4, 6, 3), {"weight": (6, 4, 3, 3), "bias": (6,)}),
    "L1BatchNorm2d": (
        lambda: official.L1BatchNorm2d(6),
        {"mean": (6,), "scale": (6,), "running_mean": (6,), "running_var": (6,)},
    ),
    "RN_B": (
        lambda: official.RN_B(6),
        {"foreground_gamma": (6,), "foreground_beta": (6,), "background_gamma": (6,), "background_beta": (6,)},
    ),
    "RN_L": (
        lambda: official.RN_L(6),
        {
            "sa.conv1.weight": (1, 2, 7, 7),
            "sa.gamma_conv.weight": (1, 1, 7, 7),
            "sa.gamma_conv.bias": (1,),
            "sa.beta_conv.weight": (1, 1, 7, 7),
            "sa.beta_conv.bias": (1,),
        },
    ),
    "AlphaBatchNorm": (
        lambda: official.AlphaBatchNorm(nn.BatchNorm2d(6), 0.3),
        {
            **{f"layer.{k}": v for k, v in NORM.items()},
            **{f"norm.{k}": v for k, v in NORM.items() if k not in ("weight", "bias")},
        },
    ),
    "DynamicTanh": (lambda: official.DynamicTanh(6, True), {"alpha": (1,), "weight": (6,), "bias": (6,)}),
    "DynamicTanh-first": (lambda: official.DynamicTanh(6, False), {"alpha": (1,), "weight": (6,), "bias": (6,)}),
    "Dynamic_erf": (lambda: official.Dynamic_erf(6), {"alpha": (1,), "shift": (1,), "weight": (6,), "bias": (6,)}),
    "RMSNorm": (lambda: official.RMSNorm(6, elementwise_affine=False), {}),
    "CRMSNorm": (lambda: official.CRMSNorm(6, elementwise_affine=False), {}),
    "LinearZeroMeanOutput": (lambda: official.LinearZeroMeanOutput(6, 4), {"weight": (4, 6), "bias": (4,)}),
    "CCLinear": (lambda: official.CCLinear(6, 4), {"weight": (4, 6), "bias": (4,)}),
    "TrActLinear": (lambda: official.TrActLinear(6, 4), {"weight": (4, 6), "bias": (4,)}),
    "TrActConv2d": (lambda: official.TrActConv2d(4, 6, 3, stride=2, padding=1), {"weight": (6, 4, 3, 3), "bias": (6,)}),
}


@pytest.mark.parametrize("name", KEYS)
def test_layer_with_official_keys_is_recognised(name: str) -> None:
    make, shapes = KEYS[name]
    integers = ("iters", "skip_counter", "num_batches_tracked")
    state = {
        k: torch.full(s, 7) if k.split(".")[-1] in integers else torch.rand(s) + 0.5 for k, s in shapes.items()
    }  # as a checkpoint holds them
    layer = make()
    layer.load_state_dict(state, strict=True)
    layer.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    model = nn.Sequential(layer)
    new, notes = recognise(model)
    assert new is model
    assert type(new[0]).__module__.startswith(("normfuse.", "torch.nn."))
    assert len(notes) == 1
    assert notes[0].startswith(f"1 × {type(layer).__name__} (")
    assert notes[0].endswith(") recognised")
    for key, tensor in layer.state_dict().items():  # shared, and not written to
        assert torch.equal(tensor, before[key]), key


# -- what is left at inference -----------------------------------------------------------------------------------------

IMAGE = (2, 4, 8, 8)
TOKENS = (2, 5, 6)
FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "UN1d": (lambda: nn.Sequential(official.UN1d(6), nn.Linear(6, 3)), TOKENS, ["linear"]),
    "UN1d-bias-free": (lambda: nn.Sequential(official.UN1d(6), nn.Linear(6, 3, bias=False)), TOKENS, ["linear"]),
    "GN": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), official.GN(6, 3)), IMAGE, ["conv2d", "group_norm"]),
    "BCNorm": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), official.BCNorm(6, 3, 1e-4)), IMAGE, ["conv2d", "group_norm"]),
    "BCNorm-estimate": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), official.BCNorm(6, 3, 1e-4, estimate=True)),
        IMAGE,
        ["conv2d", "group_norm"],
    ),
    "GN-after-WS": (lambda: nn.Sequential(official.Conv2d(4, 6, 3), official.GN(6, 3)), IMAGE, ["conv2d", "group_norm"]),
    "EstBN": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), official.EstBN(6)), IMAGE, ["conv2d"]),
    "Conv2d": (lambda: nn.Sequential(official.Conv2d(4, 6, 3, groups=2), nn.ReLU()), IMAGE, ["conv2d", "relu"]),
    "L1BatchNorm2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), official.L1BatchNorm2d(6)), IMAGE, ["conv2d"]),
    "AlphaBatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), official.AlphaBatchNorm(nn.BatchNorm2d(6), 0.3)),
        IMAGE,
        ["conv2d"],
    ),
    "AlphaBatchNorm-source": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), official.AlphaBatchNorm(nn.BatchNorm2d(6), 0)),
        IMAGE,
        ["conv2d"],
    ),
    "DynamicTanh": (lambda: nn.Sequential(official.DynamicTanh(6, True), nn.Linear(6, 3)), TOKENS, ["mul", "tanh", "linear"]),
    "Dynamic_erf": (lambda: nn.Sequential(official.Dynamic_erf(6), nn.Linear(6, 3)), TOKENS, ["mul", "add", "erf", "linear"]),
    "RMSNorm": (
        lambda: nn.Sequential(official.RMSNorm(6, elementwise_affine=False), nn.Linear(6, 3)),
        TOKENS,
        ["rms_norm", "linear"],
    ),
    "LinearZeroMeanOutput": (lambda: nn.Sequential(official.LinearZeroMeanOutput(6, 3)), TOKENS, ["linear"]),
    "CCLinear": (lambda: nn.Sequential(official.CCLinear(6, 3), nn.ReLU()), TOKENS, ["linear", "relu"]),
    "TrActLinear": (lambda: nn.Sequential(official.TrActLinear(6, 3)), TOKENS, ["linear"]),
    "TrActConv2d": (
        lambda: nn.Sequential(official.TrActConv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)),
        IMAGE,
        ["conv2d"],
    ),
}


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("name", FOLDED)
def test_official_layer_folds_as_ours(name: str, with_inputs: bool) -> None:
    make, shape, expected = FOLDED[name]
    model = _randomized(make())
    x = torch.randn(shape)
    y = model(x).detach()
    fast = normfuse.optimize(model, (x,) if with_inputs else None)
    assert _calls(fast) == expected
    assert "recognised" in _notes(fast)
    assert torch.allclose(fast(x), y, rtol=0, atol=1e-5 * float(y.abs().max()))
    if with_inputs:
        assert normfuse.report(fast).exact.max_rel < 1e-9


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_power_norm_keeps_its_group_scaling_only(groups: int, with_inputs: bool) -> None:
    model = _randomized(nn.Sequential(official.MaskPowerNorm(6, group_num=groups), nn.Linear(6, 3)))
    x = torch.randn(5, 2, 6)
    fast = normfuse.optimize(model, (x,) if with_inputs else None)
    calls = _calls(fast)
    assert calls.count("rms_norm") == 1
    assert not {"mul", "div", "add", "sqrt"} & set(calls)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_power_norm_without_group_scaling_folds_completely() -> None:
    class MaskPowerNorm(official.MaskPowerNorm):
        def __init__(self, num_features: int):
            super().__init__(num_features)
            self.gp = nn.Identity()
            del self.gp, self.group_num

        def forward(self, x: Tensor, pad_mask: Tensor | None = None, is_encoder: bool = False) -> Tensor:
            _, _, channels = x.shape if len(x.shape) == 3 else (1, *x.shape)
            s = self.weight / (self.running_phi.reshape(channels) + self.eps).sqrt()
            return x * s + self.bias

    model = _randomized(nn.Sequential(MaskPowerNorm(6), nn.Linear(6, 3)))
    fast = normfuse.optimize(model)
    assert _calls(fast) == ["linear"]
    x = torch.randn(5, 2, 6)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a"])
@pytest.mark.parametrize("apply_act", [True, False])
def test_timm_evonorm_is_traced_without_inputs(kind: str, apply_act: bool) -> None:
    evo_norm = pytest.importorskip("timm.layers.evo_norm")
    layer = getattr(evo_norm, f"EvoNorm2d{kind}")(6, apply_act=apply_act, **({} if kind[0] == "B" else {"groups": 2}))
    model = _randomized(nn.Sequential(nn.Conv2d(4, 6, 3), layer, nn.Conv2d(6, 3, 1)))
    fast = normfuse.optimize(model)
    assert f"1 × EvoNorm2d{kind} (timm) recognised" in _notes(fast)
    if not apply_act and not kind.endswith("a"):
        assert _calls(fast) == ["conv2d", "conv2d"]
    x = torch.randn(IMAGE)
    y = model(x).detach()
    assert torch.allclose(fast(x), y, atol=1e-5 * float(y.abs().max()))


class _Inpainting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, padding=1)
        self.known = official.RN_B(6)
        self.learned = official.RN_L(6, threshold=0.6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.learned(self.known(self.stem(x), mask).relu())


@pytest.mark.parametrize("with_inputs", [True, False])
def test_region_norms_stay_correct(with_inputs: bool) -> None:
    model = _randomized(_Inpainting())
    nn.init.normal_(model.learned.sa.conv1.weight, std=0.05)
    x, mask = torch.randn(IMAGE), (torch.rand(2, 1, 4, 4) > 0.4).float()
    fast = normfuse.optimize(model, (x, mask) if with_inputs else None)
    assert "1 × RN_B (RN) recognised" in _notes(fast)
    assert "1 × RN_L (RN) recognised" in _notes(fast)
    assert torch.allclose(fast(x, mask), model(x, mask), atol=1e-4)
    if with_inputs:
        assert normfuse.report(fast).exact.max_rel < 1e-9


def test_live_alpha_batch_norm_stays_live() -> None:
    """The inner norm in training mode takes the statistics of each batch, while the model is in eval mode."""
    norm = _randomized(nn.BatchNorm2d(6))
    model = nn.Sequential(_randomized(nn.Conv2d(4, 6, 3)), official.AlphaBatchNorm(norm, 0.3)).eval()
    model[1].norm.train()
    before = copy.deepcopy(model.state_dict())
    first, second = torch.randn(IMAGE), torch.randn(IMAGE) * 3 + 1
    fast = normfuse.optimize(model, (first,))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert "var_mean" in _calls(fast)
    for x in (first, second):
        assert torch.allclose(fast(x), model(x), atol=1e-4)
    frozen = normfuse.optimize(model.eval(), (first,))
    assert _calls(frozen) == ["conv2d"]
    assert torch.allclose(frozen(first), model(first), atol=1e-4)


def test_transformer_of_official_layers() -> None:
    """Masks are passed on as in the official models; one norm is shared by two places."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = official.UN1d(6)
            self.attend = nn.Linear(6, 6)
            self.norm2 = self.norm1
            self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), official.LinearZeroMeanOutput(8, 6))

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            x = x + self.attend(self.norm1(x, pad_mask=padding))
            return x + self.mlp(self.norm2(x))

    model = _randomized(Block())
    x, padding = torch.randn(TOKENS), torch.zeros(2, 5, dtype=torch.bool)
    for inputs in ((x, padding), None):
        fast = normfuse.optimize(model, inputs)
        assert not {"div", "sqrt", "permute", "mul"} & set(_calls(fast))
        assert "1 × UN1d" in _notes(fast)
        assert torch.allclose(fast(x, padding), model(x, padding), atol=1e-4)


# -- impostors ---------------------------------------------------------------------------------------------------------


class _Un(official.UN1d):
    def scale(self) -> Tensor:
        return self.running_var.view(1, -1, 1, 1).sqrt() + self.eps


class _UnGamma(official.UN1d):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, pad_mask) * self.gamma


class _UnClamped(official.UN1d):
    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, pad_mask).clamp(-50, 50)


class _UnArgument(official.UN1d):
    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        return super().forward(x) * temperature


class _Power(official.MaskPowerNorm):
    def forward(self, input: Tensor, pad_mask: Tensor | None = None, is_encoder: bool = False) -> Tensor:
        return super().forward(input, pad_mask, is_encoder) * 1.5


class _GroupNorm(official.GN):
    def forward(self, inp: Tensor) -> Tensor:
        return _wrong_group_part(self, inp)


def _wrong_group_part(module: Any, inp: Tensor) -> Tensor:
    rows = module.pbn(inp).reshape(inp.size(0), module.num_groups, -1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True) + 1e-5)
    return (module.weight * rows + module.bias).reshape(inp.shape)


class _Est(official.EstBN):
    def forward(self, inp: Tensor) -> Tensor:
        out = (inp - self.running_mean.view(1, -1, 1, 1)) / (self.running_var.sqrt() + 1e-5).view(1, -1, 1, 1)
        return self.weight.view(1, -1, 1, 1) * out + self.bias.view(1, -1, 1, 1)


class _Conv(official.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1


class _L1(official.L1BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        out = (x - self.running_mean.view(1, -1, 1, 1)) / (self.running_var.view(1, -1, 1, 1) + self.eps)
        return out * self.scale.view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1)


class _RegionB(official.RN_B):
    def __init__(self, feature_channels: int):
        super().__init__(feature_channels)
        self.rn.bn_norm = nn.InstanceNorm2d(feature_channels)


class _RegionL(official.RN_L):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class _Alpha(official.AlphaBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        self.norm(input)
        gap = (self.layer.running_mean - self.norm.running_mean).square()
        mean = (1 - self.alpha) * self.layer.running_mean + self.alpha * self.norm.running_mean
        var = (1 - self.alpha) * self.layer.running_var + self.alpha * self.norm.running_var
        var = var + self.alpha * (1 - self.alpha) * gap
        return F.batch_norm(input, mean, var, self.layer.weight, self.layer.bias, False, 0, self.layer.eps)


class _Tanh(official.DynamicTanh):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x * self.weight) + self.bias


class _Erf(official.Dynamic_erf):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.erf(self.alpha * (x + self.shift)) + self.bias


class _Rms(official.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class _Crms(official.CRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        left_out = x.sum(-1, keepdim=True)
        return x * torch.rsqrt((x.pow(2).mean(-1, keepdim=True) + left_out.pow(2)) / (x.shape[-1] + 1) + self.eps)


class _ZeroMean(official.LinearZeroMeanOutput):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(dim=1, keepdim=True), self.bias)


class _Centered(official.CCLinear):
    def update(self) -> None:
        with torch.no_grad():  # torch.export warns of attributes that carry a gradient
            super().update()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class _TrActLinear(official.TrActLinear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) * self.lambda_


class _TrActConv(official.TrActConv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, self.stride, self.padding) + 1


DIFFERS = "computes something else: its output differs by"
IMPOSTORS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...], str]] = {
    "UN1d-eps": (lambda: _Un(6), "UN1d", TOKENS, DIFFERS),
    "UN1d-gamma": (lambda: _UnGamma(6), "UN1d", TOKENS, "has parameter `gamma`; expected weight, bias, running_var"),
    "UN1d-clamp": (lambda: _UnClamped(6), "UN1d", TOKENS, DIFFERS),
    "UN1d-argument": (lambda: _UnArgument(6), "UN1d", TOKENS, "has a forward with arguments x, temperature; expected x, pad_mask"),
    "MaskPowerNorm": (lambda: _Power(6), "MaskPowerNorm", (5, 2, 6), DIFFERS),
    "GN": (lambda: _GroupNorm(6, 3), "GN", (2, 6, 4, 4), DIFFERS),
    "EstBN": (lambda: _Est(6), "EstBN", (2, 6, 4, 4), DIFFERS),
    "Conv2d": (lambda: _Conv(4, 6, 3), "Conv2d", IMAGE, DIFFERS),
    "L1BatchNorm2d": (lambda: _L1(6), "L1BatchNorm2d", (2, 6, 4, 4), DIFFERS),
    "RN_L": (lambda: _RegionL(6), "RN_L", (2, 6, 8, 8), DIFFERS),
    "AlphaBatchNorm": (lambda: _Alpha(nn.BatchNorm2d(6), 0.3), "AlphaBatchNorm", (2, 6, 4, 4), DIFFERS),
    "DynamicTanh": (lambda: _Tanh(6, True), "DynamicTanh", TOKENS, DIFFERS),
    "Dynamic_erf": (lambda: _Erf(6), "Dynamic_erf", TOKENS, DIFFERS),
    "RMSNorm": (lambda: _Rms(6), "RMSNorm", TOKENS, DIFFERS),
    "CRMSNorm": (lambda: _Crms(6), "CRMSNorm", TOKENS, DIFFERS),
    "LinearZeroMeanOutput": (lambda: _ZeroMean(6, 4), "LinearZeroMeanOutput", TOKENS, DIFFERS),
    "CCLinear": (lambda: _Centered(6, 4), "CCLinear", TOKENS, DIFFERS),
    "TrActLinear": (lambda: _TrActLinear(6, 4), "TrActLinear", TOKENS, DIFFERS),
    "TrActConv2d": (lambda: _TrActConv(4, 6, 3), "TrActConv2d", IMAGE, DIFFERS),
}


def _renamed(module: nn.Module, name: str) -> nn.Module:
    type(module).__name__ = name
    return module


@pytest.mark.parametrize("case", IMPOSTORS)
def test_impostor_stays_with_its_reason(case: str) -> None:
    make, name, shape, reason = IMPOSTORS[case]
    layer = _renamed(make(), name)
    if isinstance(layer, official.AlphaBatchNorm):
        layer.norm.running_mean.fill_(3)  # apart from the source
    model = nn.Sequential(nn.Identity(), layer)
    _randomized(model)
    if isinstance(layer, official.AlphaBatchNorm):
        layer.norm.running_mean.add_(3)
    x = torch.randn(shape)
    y = model(x).detach()
    fast = normfuse.optimize(model, (x,))
    assert f"1: called {name}, but it {reason}" in _notes(fast)
    assert "left as it is" in _notes(fast)
    assert "recognised" not in _notes(fast)
    assert torch.allclose(fast(x), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_region_norm_of_each_image_is_an_impostor() -> None:
    layer = _renamed(_RegionB(6), "RN_B")
    _, notes = recognise(nn.Sequential(_randomized(layer)))
    assert notes[0].startswith(f"0: called RN_B, but it {DIFFERS}")


def test_other_layers_of_a_common_name_are_passed_over_in_silence() -> None:
    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (6,), self.weight, 1e-6)

    class Conv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class GN(nn.GroupNorm):
        pass

    for layer in (RMSNorm(), Conv2d(4, 6, 3), GN(2, 6)):
        model = nn.Sequential(layer)
        new, notes = recognise(model)
        assert notes == ()
        assert new[0] is layer


# -- the walk ----------------------------------------------------------------------------------------------------------


def test_model_itself_may_be_the_layer() -> None:
    layer = _randomized(official.UN1d(6))
    new, notes = recognise(layer)
    assert type(new).__name__ == "UnifiedNorm"
    assert notes == ("1 × UN1d (Unified-Normalization) recognised",)
    assert new.weight is layer.weight
    x = torch.randn(TOKENS)
    assert torch.allclose(normfuse.optimize(layer)(x), layer(x), atol=1e-5)


def test_shared_layer_stays_shared() -> None:
    layer = _randomized(official.UN1d(6))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": _randomized(official.UN1d(6))})
    new, notes = recognise(model)
    assert new["a"] is new["b"][0]
    assert new["a"] is not new["c"]
    assert notes == ("2 × UN1d (Unified-Normalization) recognised",)


def test_forward_hooks_keep_the_layer() -> None:
    model = nn.Sequential(_randomized(official.UN1d(6)), nn.Linear(6, 3)).eval()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(TOKENS)
    fast = normfuse.optimize(model, (x,))
    assert "0: called UN1d, but it has forward hooks" in _notes(fast)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        pytest.param(official.UN1d(6), "running_var is 1 everywhere and iters is 0", id="UN1d"),
        pytest.param(official.MaskPowerNorm(6), "running_phi is 1 everywhere and iters is 0", id="MaskPowerNorm"),
        pytest.param(official.L1BatchNorm2d(6), "is 0 everywhere", id="L1BatchNorm2d"),
        pytest.param(official.AlphaBatchNorm(nn.BatchNorm2d(6), 0.3), "num_batches_tracked is 0", id="AlphaBatchNorm"),
    ],
)
def test_untrained_statistics_are_noted(layer: nn.Module, reason: str) -> None:
    _, notes = recognise(nn.Sequential(layer).eval())
    assert len(notes) == 1
    assert "statistics that were never t" in notes[0]
    assert reason in notes[0]


def test_equal_reasons_share_a_line() -> None:
    model = nn.Sequential(*[_renamed(_UnGamma(6), "UN1d") for _ in range(4)])
    _, notes = recognise(model)
    assert len(notes) == 1
    assert notes[0].startswith("0 and 3 more: called UN1d, but it has parameter `gamma`")


def test_attributes_of_the_layer_can_still_be_read() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = official.UN1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * self.norm.num_features + self.norm.running_var

    model = _randomized(Reader())
    x = torch.randn(TOKENS)
    assert torch.allclose(normfuse.optimize(model, (x,))(x), model(x), atol=1e-4)


def test_model_and_random_state_are_left_alone() -> None:
    model = nn.Sequential(official.UN1d(6), official.TrActLinear(6, 6), nn.ReLU())
    _randomized(model)
    kinds = [type(m) for m in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    normfuse.optimize(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_recognised(dtype: torch.dtype) -> None:
    model = _randomized(nn.Sequential(official.UN1d(6), official.RMSNorm(6), official.TrActLinear(6, 3))).to(dtype)
    new, notes = recognise(model)
    assert len(notes) == 3
    assert new[0].weight.dtype == dtype


def test_model_in_training_mode_is_optimized_as_in_eval() -> None:
    model = _randomized(nn.Sequential(official.UN1d(6), nn.Linear(6, 3))).train()
    x = torch.randn(TOKENS)
    fast = normfuse.optimize(model, (x,))
    assert _calls(fast) == ["linear"]
    assert model[0].training
    assert torch.allclose(fast(x), model.eval()(x), atol=1e-5)


def test_stale_centered_weight_is_pointed_out() -> None:
    model = nn.Sequential(official.CCLinear(6, 4)).eval()
    assert recognise(copy.copy(model))[1] == ("1 × CCLinear (CBWC) recognised",)
    layer = official.CCLinear(6, 4)
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})
    model = nn.Sequential(layer).eval()
    x = torch.randn(TOKENS)
    fast = normfuse.optimize(model, (x,))
    assert "centered weight is not that of its parameter" in _notes(fast)
    assert torch.allclose(fast(x), model(x), atol=1e-5)  # what the model computes, whatever was meant


def test_our_own_layers_are_not_looked_at() -> None:
    from normfuse.nn.evonorm import EvoNorm

    model = nn.Sequential(EvoNorm("B0", 6))
    assert recognise(model)[1] == ()
