"""The norm-family half of the zoo: every layer of `normfuse.nn` where its papers put it, and models that mix them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from normfuse.nn.batch_channel import BatchChannelNorm
from normfuse.nn.compander import WeightCompander
from normfuse.nn.crms import CRMSNorm
from normfuse.nn.dynamic import DynamicErf, DynamicTanh
from normfuse.nn.evonorm import EvoNorm
from normfuse.nn.l1 import L1BatchNorm, L1LayerNorm
from normfuse.nn.power import PowerNorm
from normfuse.nn.scaled import ScaledNorm
from normfuse.nn.unified import UnifiedNorm
from normfuse.nn.weight_standardization import WeightStandardizedConv2d
from normfuse.nn.zero_mean import LinearZeroMeanOutput
from tests.zoo_entry import Entry, named, normal
from tests.zoo_streams import LENGTH, VOCAB, Attention, Block, D

__all__ = ["FAMILY"]


def trained(model: nn.Module) -> nn.Module:
    """The look of a trained model for what `randomise_norms` does not know by its name."""
    with torch.no_grad():
        for module in model.modules():
            for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                match name:
                    case "alpha" | "v":
                        value.uniform_(0.3, 1.2)
                    case "shift":
                        value.normal_(0, 0.3)
                    case "running_phi" | "running_scale":
                        value.uniform_(0.5, 2)
                    case "weight" | "bias" if isinstance(module, (DynamicTanh, DynamicErf)):
                        value.normal_()
    return model


class Trained(nn.Module):
    """A model whose unusual statistics are randomised too, once it is built."""

    def finish(self) -> None:
        trained(self)


class NormBlock(Block):
    """Pre-norm block with any norms."""

    def __init__(self, first: nn.Module, second: nn.Module, *, bias: bool = True) -> None:
        super().__init__(attention=Attention(bias=bias))
        self.norm1, self.norm2 = first, second


class PatchModel(Trained):
    """Patches, blocks, a last norm, a head on the first token."""

    def __init__(self, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.patch, self.pos = nn.Linear(6, D), nn.Parameter(torch.randn(1, 5, D))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), norm, nn.Linear(D, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x) + self.pos))[:, 0])


def unified_vit() -> nn.Module:
    return PatchModel([NormBlock(UnifiedNorm(D), UnifiedNorm(D), bias=False) for _ in range(2)], UnifiedNorm(D))


def power_vit() -> nn.Module:
    return PatchModel([NormBlock(PowerNorm(D, group_num=4), PowerNorm(D)) for _ in range(2)], PowerNorm(D, group_num=2))


def l1_vit() -> nn.Module:
    return PatchModel([NormBlock(L1LayerNorm(D), L1LayerNorm(D)) for _ in range(2)], L1LayerNorm(D))


def lns_vit() -> nn.Module:
    blocks: list[nn.Module] = [NormBlock(ScaledNorm(nn.LayerNorm(D), i), ScaledNorm(nn.LayerNorm(D), i)) for i in (1, 2, 3)]
    return PatchModel(blocks, nn.LayerNorm(D))


def lns_rms_vit() -> nn.Module:
    blocks: list[nn.Module] = [NormBlock(ScaledNorm(nn.RMSNorm(D), i), ScaledNorm(nn.RMSNorm(D), i)) for i in (1, 2, 3)]
    return PatchModel(blocks, nn.RMSNorm(D))


def dynamic_vit() -> nn.Module:
    return PatchModel([NormBlock(DynamicTanh(D), DynamicErf(D), bias=False) for _ in range(2)], DynamicTanh(D))


def mixed_vit() -> nn.Module:
    blocks: list[nn.Module] = [
        NormBlock(UnifiedNorm(D), ScaledNorm(nn.LayerNorm(D), 1)),
        NormBlock(PowerNorm(D, group_num=2), DynamicTanh(D)),
        NormBlock(L1LayerNorm(D), DynamicErf(D)),
        NormBlock(nn.LayerNorm(D), nn.RMSNorm(D)),
    ]
    return PatchModel(blocks, UnifiedNorm(D))


class CrmsBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.mlp = CRMSNorm(d), nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def crms_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, D - 1), CrmsBlock(D - 1), CrmsBlock(D - 1), CRMSNorm(D - 1), nn.Linear(D - 1, 3))


class UnifiedTranslator(Trained):
    """Encoder–decoder: one UnifiedNorm behind the encoder is read by the keys and values of every decoder layer; tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.encoder = nn.Sequential(*[NormBlock(UnifiedNorm(D), UnifiedNorm(D)) for _ in range(2)])
        self.memory_norm, self.last = UnifiedNorm(D), UnifiedNorm(D)
        self.crosses = nn.ModuleList(Attention(bias=False) for _ in range(2))
        self.norms = nn.ModuleList(UnifiedNorm(D) for _ in range(2))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.memory_norm(self.encoder(self.embed(source)))
        y = self.embed(target)
        for norm, cross in zip(self.norms, self.crosses, strict=True):
            y = y + cross(norm(y), memory)
        return nn.functional.linear(self.last(y), self.embed.weight)


class PostUnified(Trained):
    """UnifiedNorm behind the addition: its output is the residual, nobody can take the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.norms = nn.ModuleList(UnifiedNorm(D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = norm(x + mlp(x).relu())
        return x


class BcnNet(Trained):
    """Weight-standardized convolutions under BatchChannelNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            WeightStandardizedConv2d(3, 8, 3, padding=1),
            BatchChannelNorm(8, groups=2),
            nn.ReLU(),
            WeightStandardizedConv2d(8, 8, 3, groups=2, bias=False),
            BatchChannelNorm(8, groups=4),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean((2, 3)))


class EvoNet(Trained):
    """EvoNorms with and without activation: without, the non-a kinds are affine."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            EvoNorm("B0", 8),
            nn.Conv2d(8, 8, 3),
            EvoNorm("S0", 8, groups=2),
            nn.Conv2d(8, 8, 1, bias=False),
            EvoNorm("B0", 8, apply_act=False),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            EvoNorm("S2", 8, groups=4),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean((2, 3)))


class L1Net(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), L1BatchNorm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), L1BatchNorm(4), nn.Hardswish()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Reparametrized(Trained):
    """Every way to compute a weight from another one."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = weight_norm(nn.Linear(6, D))
        self.sn = spectral_norm(nn.Linear(D, D))
        self.wc = nn.Linear(D, D)
        parametrize.register_parametrization(self.wc, "weight", WeightCompander())
        self.zm, self.norm = LinearZeroMeanOutput(D, D), nn.LayerNorm(D)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wc(self.sn(self.wn(x).relu()).relu()).relu()
        return self.head(self.norm(self.zm(x)))


class HandWritten(nn.Module):
    """RMSNorm and LayerNorm spelled out, the former as Llama does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, D), nn.Linear(D, D, bias=False), nn.Linear(D, 3)
        self.gain, self.gamma, self.beta = (nn.Parameter(torch.randn(D)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        wide = y.to(torch.float32)
        y = y + self.b(self.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(y.dtype))
        mean = y.mean(-1, keepdim=True)
        spread = (y - mean).pow(2).mean(-1, keepdim=True)
        return self.c(self.gamma * (y - mean) / torch.sqrt(spread + 1e-5) + self.beta)


class RepBlock(nn.Module):
    """RepVGG: 3×3, 1×1 and identity, each with a BatchNorm, added."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(channels))
        self.one = nn.Sequential(nn.Conv2d(channels, channels, 1, groups=groups, bias=False), nn.BatchNorm2d(channels))
        self.same = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (self.three(x) + self.one(x) + self.same(x)).relu()


def repvgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), RepBlock(8), RepBlock(8, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


PATCHES, IMAGE = (normal(2, 5, 6),), (normal(2, 3, 8, 8),)

FAMILY: dict[str, Entry] = {
    **named(
        (unified_vit, PATCHES),
        (power_vit, PATCHES),
        (l1_vit, PATCHES),
        (lns_vit, PATCHES),
        (lns_rms_vit, PATCHES),
        (dynamic_vit, PATCHES),
        (mixed_vit, PATCHES),
        (crms_mlp, PATCHES),
        (UnifiedTranslator, (torch.arange(2 * LENGTH).reshape(2, LENGTH) % VOCAB, torch.arange(14).reshape(2, 7) % VOCAB)),
        (PostUnified, (normal(2, 5, D),)),
        (BcnNet, IMAGE),
        (EvoNet, IMAGE),
        (L1Net, IMAGE),
        (Reparametrized, PATCHES),
        (HandWritten, PATCHES),
        (repvgg, IMAGE),
    ),
}
