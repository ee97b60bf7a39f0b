"""Stand-ins of the official layers: their class names, keys, attributes and eval functions, written from the papers' formulas.

They keep what makes the real ones hard to trace: custom autograd functions, `len(x.shape)`, unpacked shapes, plain attributes
that hold tensors, casts to float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        raise AssertionError("the training forward of a stand-in was called")


class UN1d(nn.Module):
    def __init__(self, channels: int, window_size: int = 4, warmup_iters: int = 4000, eps: float = 1e-5, momentum: float = 0.9):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema_gz", torch.zeros(channels))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("buffer_x2", torch.zeros(window_size, channels))
        self.register_buffer("buffer_gz", torch.zeros(window_size, channels))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.int64))
        self.num_features, self.eps, self.momentum = channels, eps, momentum
        self.fp_buffer_size = self.bp_buffer_size = window_size
        self.warmup_iters, self.outlier_filtration = warmup_iters, False

    def scale(self) -> Tensor:
        return (self.running_var.view(1, -1, 1, 1) + self.eps).sqrt()

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        flat = len(x.shape) == 2
        if flat:
            x = x.unsqueeze(0)
        _, _, channels = x.shape
        rows = x.clone() if pad_mask is None else x[~pad_mask, :]
        rows.reshape(-1, self.num_features)
        y = x.permute(0, 2, 1).contiguous()
        shape = y.size()
        y = y.reshape(y.size(0), channels, -1).unsqueeze(-1)
        y = _Train.apply(y) if self.training else self.weight.view(1, -1, 1, 1) * (y / self.scale()) + self.bias.view(1, -1, 1, 1)
        y = y.reshape(shape).permute(0, 2, 1).contiguous()
        return y.squeeze(0) if flat else y


class GroupScaling1D(nn.Module):
    def __init__(self, eps: float = 1e-5, group_num: int = 4):
        super().__init__()
        self.eps, self.group_num = eps, group_num

    def forward(self, x: Tensor) -> Tensor:
        T, B, C = x.shape[0], x.shape[1], x.shape[2]
        size = C // self.group_num
        groups = x.contiguous().reshape(T, B, self.group_num, size)
        moment = torch.repeat_interleave((groups * groups).mean(3, keepdim=True), size, -1).reshape(T, B, C)
        return x / torch.sqrt(moment + self.eps)


class MaskPowerNorm(nn.Module):
    def __init__(self, num_features: int, eps: float = 1e-5, group_num: int = 1):
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, True
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_phi", torch.ones(1, num_features, 1, 1))
        self.register_buffer("ema_gz", torch.zeros(1, num_features, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.afwd = self.abkw = 0.9
        self.gp = GroupScaling1D(group_num=group_num)
        self.group_num = group_num

    def forward(self, input: Tensor, pad_mask: Tensor | None = None, is_encoder: bool = False) -> Tensor:
        flat = len(input.shape) == 2
        if flat:
            input = input.unsqueeze(0)
        _, _, _ = input.shape
        input = self.gp(input)
        y = input.permute(1, 2, 0).contiguous()
        shape = y.size()
        y = y.reshape(y.size(0), self.num_features, -1).unsqueeze(-1)
        y = y / (self.running_phi + self.eps).sqrt()
        y = self.weight.reshape(1, -1, 1, 1) * y + self.bias.reshape(1, -1, 1, 1)
        y = y.reshape(shape).permute(2, 0, 1).contiguous()
        return y.squeeze(0) if flat else y


def _group_part(module: Any, out: Tensor, inp: Tensor, eps: float) -> Tensor:
    rows = out.view(1, inp.size(0) * module.num_groups, -1)
    rows = torch.batch_norm(rows, None, None, None, None, True, 0, eps, True)
    return (module.weight * rows.view(inp.size(0), module.num_groups, -1) + module.bias).view_as(inp)


class GN(nn.Module):
    def __init__(self, num_channels: int, num_groups: int):
        super().__init__()
        self.num_channels, self.num_groups = num_channels, num_groups
        self.weight = nn.Parameter(torch.ones(1, num_groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_groups, 1))
        self.pbn = nn.BatchNorm2d(num_channels)

    def forward(self, inp: Tensor) -> Tensor:
        return _group_part(self, self.pbn(inp), inp, 1e-5)


class EstBN(nn.Module):
    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.register_buffer("estbn_moving_speed", torch.zeros(1))

    def forward(self, inp: Tensor) -> Tensor:
        self.estbn_moving_speed.item()
        out = inp - self.running_mean.view(1, -1, 1, 1)
        out = out / torch.sqrt(self.running_var + 1e-5).view(1, -1, 1, 1)
        return self.weight.view(1, -1, 1, 1) * out + self.bias.view(1, -1, 1, 1)


class BCNorm(nn.Module):
    def __init__(self, num_channels: int, num_groups: int, eps: float, estimate: bool = False):
        super().__init__()
        self.num_channels, self.num_groups, self.eps = num_channels, num_groups, eps
        self.weight = nn.Parameter(torch.ones(1, num_groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_groups, 1))
        self.bn = EstBN(num_channels) if estimate else nn.BatchNorm2d(num_channels)

    def forward(self, inp: Tensor) -> Tensor:
        return _group_part(self, self.bn(inp), inp, self.eps)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        std = torch.pow(weight.view(weight.size(0), -1).var(dim=1) + 1e-5, 0.5).view(-1, 1, 1, 1)
        return F.conv2d(x, weight / std.expand_as(weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class L1BatchNorm2d(nn.Module):
    def __init__(self, num_features: int, dim: int = 1, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.zeros(num_features))
        self.momentum, self.dim, self.noise, self.eps = momentum, dim, False, eps
        self.mean = nn.Parameter(torch.zeros(num_features))
        self.scale = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        mean, scale = self.running_mean, self.running_var
        out = (x - mean.view(1, mean.size(0), 1, 1)) * scale.view(1, scale.size(0), 1, 1)
        return out * self.scale.view(1, self.scale.size(0), 1, 1) + self.mean.view(1, self.mean.size(0), 1, 1)


class RN_binarylabel(nn.Module):  # noqa: N801 - the official name
    def __init__(self, feature_channels: int):
        super().__init__()
        self.bn_norm = nn.BatchNorm2d(feature_channels, affine=False, track_running_stats=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        label = label.detach()
        return self.rn(x * label, label) + self.rn(x * (1 - label), 1 - label)

    def rn(self, region: Tensor, mask: Tensor) -> Tensor:
        shape = region.size()
        size = mask.sum(dim=[0, 2, 3])
        size[size == 0] = 1
        mu = region.sum(dim=[0, 2, 3]) / size
        share = torch.sqrt(size / (shape[0] * shape[2] * shape[3]))
        return self.bn_norm(region + (1 - mask) * mu[None, :, None, None]) * share[None, :, None, None]


class RN_B(nn.Module):  # noqa: N801 - the official name
    def __init__(self, feature_channels: int):
        super().__init__()
        self.rn = RN_binarylabel(feature_channels)
        self.foreground_gamma = nn.Parameter(torch.zeros(feature_channels))
        self.foreground_beta = nn.Parameter(torch.zeros(feature_channels))
        self.background_gamma = nn.Parameter(torch.zeros(feature_channels))
        self.background_beta = nn.Parameter(torch.zeros(feature_channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = F.interpolate(mask, size=x.size()[2:], mode="nearest")
        y = self.rn(x, mask)
        front = (y * mask) * (1 + self.foreground_gamma[None, :, None, None]) + self.foreground_beta[None, :, None, None]
        back = (y * (1 - mask)) * (1 + self.background_gamma[None, :, None, None]) + self.background_beta[None, :, None, None]
        return front + back


class SelfAware_Affine(nn.Module):  # noqa: N801 - the official name
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.sigmoid = nn.Sigmoid()
        self.gamma_conv = nn.Conv2d(1, 1, 7, padding=3)
        self.beta_conv = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest, _ = torch.max(x, dim=1, keepdim=True)
        importance = self.sigmoid(self.conv1(torch.cat([x.mean(1, keepdim=True), largest], dim=1)))
        return importance, self.gamma_conv(importance), self.beta_conv(importance)


class RN_L(nn.Module):  # noqa: N801 - the official name
    def __init__(self, feature_channels: int, threshold: float = 0.8):
        super().__init__()
        self.sa = SelfAware_Affine()
        self.threshold = threshold
        self.rn = RN_binarylabel(feature_channels)

    def forward(self, x: Tensor) -> Tensor:
        importance, gamma, beta = self.sa(x)
        mask = torch.zeros_like(importance)
        mask[importance.detach() >= self.threshold] = 1
        return self.rn(x, mask.expand(x.size())) * (1 + gamma) + beta


class AlphaBatchNorm(nn.Module):
    def __init__(self, layer: nn.BatchNorm2d, alpha: float):
        super().__init__()
        self.layer = layer
        self.layer.eval()
        self.alpha = alpha
        self.norm = nn.BatchNorm2d(layer.num_features, affine=False, momentum=1.0)

    def forward(self, input: Tensor) -> Tensor:
        self.norm(input)
        mean = (1 - self.alpha) * self.layer.running_mean + self.alpha * self.norm.running_mean
        var = (1 - self.alpha) * self.layer.running_var + self.alpha * self.norm.running_var
        return F.batch_norm(input, mean, var, self.layer.weight, self.layer.bias, False, 0, self.layer.eps)


class DynamicTanh(nn.Module):
    def __init__(self, normalized_shape: int, channels_last: bool, alpha_init_value: float = 0.5):
        super().__init__()
        self.normalized_shape, self.alpha_init_value, self.channels_last = normalized_shape, alpha_init_value, channels_last
        self.alpha = nn.Parameter(torch.ones(1) * alpha_init_value)
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.alpha * x)
        if self.channels_last:
            return x * self.weight + self.bias
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Dynamic_erf(nn.Module):  # noqa: N801 - the official name
    def __init__(self, normalized_shape: int, alpha_init_value: float = 0.5, shift_init_value: float = 0.0):
        super().__init__()
        self.normalized_shape = normalized_shape
        self.alpha = nn.Parameter(torch.ones(1) * alpha_init_value)
        self.shift = nn.Parameter(torch.ones(1) * shift_init_value)
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.erf(self.alpha * x + self.shift) + self.bias


class RMSNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).type_as(x)


class CRMSNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        left_out = wide.sum(dim=-1, keepdim=True)
        square = (wide.square().sum(dim=-1, keepdim=True) + left_out.square()) / (wide.shape[-1] + 1)
        return (wide * torch.rsqrt(square + self.eps)).type_as(x)


class LinearZeroMeanOutput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(dim=0, keepdim=True), self.bias - self.bias.mean())


class CCLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        if bias:
            self.bias = nn.Parameter(torch.randn(out_features))
        else:
            self.register_parameter("bias", None)
            self.register_parameter("compute_bias", None)
        self.update()

    def update(self) -> None:
        self.compute_weight = torch.sub(self.weight, self.weight.mean(dim=0))
        if self.bias is not None:
            self.compute_bias = torch.sub(self.bias, self.bias.mean(dim=0))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.update()
        return F.linear(input, self.compute_weight, self.compute_bias)

    def eval(self) -> nn.Module:
        self.update()
        return self.train(False)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, lambda_: float) -> Tensor:
        ctx.lambda_ = lambda_
        return input @ weight.T + (bias if bias is not None else 0)


class TrActLinear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, lambda_: float = 0.1, **kwargs: Any):
        super().__init__(in_features, out_features, **kwargs)
        self.lambda_, self.inv_type = lambda_, "inverse"

    def forward(self, input: Tensor) -> Tensor:
        shape = input.shape
        if len(shape) > 2:
            input = input.view(-1, input.shape[-1])
        bias = self.bias.unsqueeze(0) if self.bias is not None else None
        out = _LinearFunction.apply(input, self.weight, bias, self.lambda_)
        return out.view(*shape[:-1], out.shape[-1]) if len(shape) > 2 else out


class _ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        return F.conv2d(input, weight, bias, stride, padding)


class TrActConv2d(nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, **kwargs: Any):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, **kwargs)
        self.lambda_, self.inv_type = 0.1, "inverse"

    def forward(self, input: Tensor) -> Tensor:
        return _ConvFunction.apply(input, self.weight, self.bias, self.stride, self.padding)
