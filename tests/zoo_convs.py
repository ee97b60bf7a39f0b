"""The convolutional half of the zoo: batch norms before, after and between everything that can or cannot absorb them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_entry import Entry, named, normal

__all__ = ["CONVOLUTIONAL"]


def cnn_bn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16, affine=False), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


def bn_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))


def bn_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))


def two_bns() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, eps=1e-3), nn.SiLU())


class SharedConv(nn.Module):
    """One convolution under two batch norms: folding into its weight in place would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn_a, self.bn_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.bn_a(self.conv(x))), self.bn_b(self.conv(y))


class ForkedConv(nn.Module):
    """One convolution value read by two batch norms and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn_a, self.bn_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([F.relu(self.bn_a(y)), self.bn_b(y).sigmoid(), y], dim=1)


def grouped_depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.Hardswish()),
        *(nn.Conv2d(8, 8, 3, padding="same", groups=8, dilation=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8, padding_mode="reflect"), nn.BatchNorm2d(16)),
    )


def conv1d_bn() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 8, 5, stride=2), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 3, 1), nn.BatchNorm1d(3))


def conv3d_bn() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Tanh(), nn.AvgPool3d(2), nn.Conv3d(6, 4, 2))


def conv_transpose() -> nn.Module:
    return nn.Sequential(
        *(nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)),
        *(nn.ConvTranspose2d(6, 8, 3, groups=2, output_padding=1, stride=2), nn.BatchNorm2d(8), nn.ELU()),
        *(nn.Flatten(2), nn.ConvTranspose1d(8, 4, 3, groups=4), nn.BatchNorm1d(4)),
    )


def linear_bn1d() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.PReLU(16), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8))


class PreactResnet(nn.Module):
    """BN -> ReLU -> conv blocks: the second norm of a block folds backward, the first only forward or not at all."""

    def __init__(self, d: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, d, 3, padding=1)
        self.bn1 = nn.ModuleList(nn.BatchNorm2d(d) for _ in range(depth))
        self.conv1 = nn.ModuleList(nn.Conv2d(d, d, 3, padding=1, bias=False) for _ in range(depth))
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(d) for _ in range(depth))
        self.conv2 = nn.ModuleList(nn.Conv2d(d, d, 3, padding=1, bias=False) for _ in range(depth))
        self.bn, self.head = nn.BatchNorm2d(d), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for bn1, conv1, bn2, conv2 in zip(self.bn1, self.conv1, self.bn2, self.conv2, strict=True):
            x = x + conv2(bn2(conv1(bn1(x).relu())).relu())
        return self.head(self.bn(x).relu().mean((2, 3)))


class Resnet(nn.Module):
    """Post-activation residual block with a projection shortcut: conv -> BN -> (+) -> ReLU in place."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, d, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(d)
        self.conv2, self.bn2 = nn.Conv2d(d, d, 3, padding=1, bias=False), nn.BatchNorm2d(d)
        self.downsample = nn.Sequential(nn.Conv2d(3, d, 1, stride=2, bias=False), nn.BatchNorm2d(d))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        out = self.relu(out)
        return {"features": out, "pooled": out.mean((-2, -1))}


class Densenet(nn.Module):
    """BN after a concatenation: its channels have several producers, one of them read again later."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, d, 3, padding=1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(d * (i + 1)) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(d * (i + 1), d, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for bn, conv in zip(self.bns, self.convs, strict=True):
            features.append(conv(F.relu(bn(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class ConcatBn(nn.Module):
    """BN over a concatenation of two convolutions with one use each: it splits and folds into both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat((self.a(x), self.b(x)), dim=1))


class CrepeLike(nn.Module):
    """pad -> conv -> ReLU -> BN -> max-pool -> pad -> conv: BN can only go forward, across a zero border, gains of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, (9, 1), stride=(2, 1)), nn.BatchNorm2d(8, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, (5, 1)), nn.BatchNorm2d(6, eps=1e-3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(F.relu(self.conv1(F.pad(x, (0, 0, 4, 4))))), (2, 1), (2, 1))
        x = F.max_pool2d(self.bn2(F.relu(self.conv2(F.pad(x, (0, 0, 2, 2))))), (2, 1), (2, 1))
        return torch.sigmoid(self.head(x.permute(0, 2, 1, 3).squeeze(3)))


class FunctionalNorm(nn.Module):
    """`F.batch_norm` and `F.conv2d` on bare parameters."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(d, 3, 3, 3) * 0.2)
        self.gamma, self.beta = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, stride=2)
        y = F.batch_norm(y, self.running_mean, self.running_var, self.gamma, self.beta, self.training, 0.01, 1e-3)
        return F.leaky_relu(y, 0.2)


class PaddedConv(nn.Conv2d):
    """A subclass with its own forward, as in efficientnet-lite: pads by hand, then convolves."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [0, 1, 0, 1]), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def conv_subclass() -> nn.Module:
    return nn.Sequential(PaddedConv(3, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), PaddedConv(8, 4, 2))


class NegativeScale(nn.Module):
    """Every gain is negative: scales must not cross a ReLU or a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        )

    def finish(self) -> None:
        with torch.no_grad():
            for i in (2, 5):
                self.net[i].weight.abs_().neg_()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GammaZero(nn.Module):
    """Pruned channels: some gains are exactly zero, one norm is all zero (an untrained residual branch)."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.conv1, self.bn1 = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def finish(self) -> None:
        with torch.no_grad():
            self.bn0.weight[0] = self.bn1.weight[::2] = 0
            self.bn2.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(self.bn0(x))).relu()))


def no_running_stats() -> nn.Module:
    """Batch statistics at inference: not a constant affine, must stay."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.BatchNorm2d(8))


class AddAlpha(nn.Module):
    """`alpha=` scales the second addend: easily lost when an add is decoded by position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.skip = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(3, 8, 1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sub(torch.add(self.bn(self.conv(x)), self.skip(x), alpha=0.5), self.shift, alpha=3)
        return 2 * (1 - y) / 3 + 1


class InPlace(nn.Module):
    """In-place arithmetic, harmless on a fresh value (`+=`, `relu_`) and visible through a view (`mul_` on a slice)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)), inplace=True)
        y += 1
        y.mul_(2)
        z = y * 3
        z[:, 0].mul_(0.5)
        return F.relu_(z).sub_(y)


class DropoutEverywhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Dropout(0.1), nn.Conv2d(3, 8, 3), nn.Dropout2d(0.3), nn.BatchNorm2d(8), nn.ReLU(), nn.AlphaDropout(0.2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity(), nn.Linear(8, 8), nn.Dropout(0.5)),
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.net(x)), 0.2, self.training))


class OtherNorms(nn.Module):
    """GroupNorm (grouped, per channel, one group) and L2 normalisation between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList((nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)))
        self.norm = nn.ModuleList((nn.GroupNorm(2, 8), nn.GroupNorm(8, 8, affine=False), nn.GroupNorm(1, 8, eps=1e-3)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm[0](self.conv[0](x)))
        x = self.norm[2](self.conv[2](self.norm[1](self.conv[1](x)).relu()))
        x = F.interpolate(self.conv[3](x), scale_factor=2, mode="bilinear", align_corners=False)
        return F.normalize(x.flatten(1), dim=-1)


_IMAGE = (normal(2, 3, 8, 8),)
CONVOLUTIONAL: dict[str, Entry] = named(
    *((make, _IMAGE) for make in (cnn_bn, bn_first, bn_last, two_bns, conv_subclass, no_running_stats)),
    *((make, _IMAGE) for make in (ForkedConv, PreactResnet, Resnet, Densenet, ConcatBn, FunctionalNorm, NegativeScale)),
    *((make, _IMAGE) for make in (AddAlpha, InPlace, DropoutEverywhere, OtherNorms)),
    (SharedConv, (normal(2, 3, 8, 8), normal(3, 3, 6, 6))),
    (grouped_depthwise, (normal(2, 4, 8, 8),)),
    (conv1d_bn, (normal(2, 4, 16),)),
    (conv3d_bn, (normal(2, 2, 6, 6, 6),)),
    (conv_transpose, (normal(2, 4, 5, 5),)),
    (linear_bn1d, (normal(4, 6),)),
    (CrepeLike, (normal(2, 1, 32, 1),)),
    (GammaZero, (normal(2, 4, 6, 6),)),
)
