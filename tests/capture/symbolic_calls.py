"""Calls of torch in the spellings that models use, for the tests of the front end without example inputs.

Each is an expression of `x` (2, 4, 6, 6), `m` (6, 6), `v` (6) and integers `i` (2, 3) below 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CALLS", "Expression", "inputs"]

# fmt: off
CALLS = [
    # pooling: integers behind the first are no list
    "F.avg_pool1d(m, 3, 2)", "F.avg_pool2d(x, 3, 2)", "F.avg_pool2d(x, 3, 2, 1)", "F.avg_pool2d(x, 3, stride=2, padding=1)",
    "F.avg_pool2d(x, (3, 2), 1, 0, True, False)", "F.avg_pool2d(x, 2, divisor_override=3)",
    "F.avg_pool2d(kernel_size=2, input=x)", "F.avg_pool3d(x, 2, 1)", "F.max_pool1d(m, 3, 2)", "F.max_pool2d(x, 3, 2)",
    "F.max_pool2d(x, 3, 2, 1)", "F.max_pool2d(x, 2, 1, 1, 2)", "F.max_pool2d(x, 2, ceil_mode=True)", "F.max_pool3d(x, 2, 1)",
    "F.max_pool2d(x, 2, return_indices=True)[1]", "F.adaptive_avg_pool2d(x, 2)", "F.adaptive_avg_pool2d(x, (3, 1))",
    "F.adaptive_avg_pool1d(m, 3)", "F.adaptive_max_pool2d(x, 2)", "F.lp_pool2d(x, 2, 3, 2)", "F.lp_pool1d(m, 2, 3)",
    # moving
    "x.roll(1, 0)", "x.roll(1)", "x.roll((1, 2), (0, 1))", "torch.roll(x, 1, 0)", "torch.roll(x, shifts=(1, -1), dims=(2, 3))",
    "x.flip(0)", "x.flip(0, 1)", "x.flip((0, 1))", "torch.flip(x, [2])", "x.rot90()", "x.rot90(1, (2, 3))",
    "torch.rot90(x, 2, [0, 1])", "x.permute(0, 2, 3, 1)", "x.permute((1, 0, 2, 3))", "torch.permute(x, (3, 2, 1, 0))",
    "x.permute(dims=(0, 1, 3, 2))", "v.permute(0)", "x.transpose(1, 2)", "torch.transpose(x, dim0=0, dim1=1)", "x.swapaxes(0, 1)",
    "x.swapdims(2, 3)", "x.movedim(1, -1)", "x.moveaxis((0, 1), (1, 0))", "m.t()", "m.T", "x.mT", "x.view(2, -1)",
    "x.view((8, 36))", "x.view(-1)", "x.view(torch.Size([8, -1]))", "x.reshape(4, 72)", "torch.reshape(x, (4, -1))",
    "x.reshape(-1)", "x.reshape(shape=(4, 72))", "x.flatten()", "x.flatten(1)", "x.flatten(1, 2)",
    "torch.flatten(x, start_dim=2)", "x.unflatten(1, (2, 2))", "x.unflatten(-1, [3, -1])", "x.unsqueeze(0)", "x.squeeze()",
    "x[None].squeeze(0)", "x[None, :, None].squeeze((0, 2))", "x[None, None].squeeze(0, 1)", "torch.squeeze(x[:1], dim=0)",
    "v.expand(3, 6)", "v.expand(3, -1)", "v.expand((3, 6))", "v.expand_as(m)", "v.repeat(3)", "v.repeat(3, 2)",
    "m.repeat((2, 1))", "m.tile(2)", "m.tile(2, 1)", "torch.tile(m, (2, 2))", "x.repeat_interleave(2, 1)",
    "x.repeat_interleave(2, dim=0)", "x.repeat_interleave(2)", "x.narrow(1, 1, 2)", "torch.narrow(x, 1, start=0, length=2)",
    "x.select(1, 0)", "x.index_select(1, i[0])", "x.unfold(2, 3, 1)", "F.unfold(x, 3, 1)", "F.unfold(x, 2, stride=2)",
    "F.fold(x.flatten(1)[..., None], (12, 3), (12, 3))", "m.diagonal()", "m.diagonal(1)", "m.diag()", "torch.diag(v, 1)",
    "m.tril()", "m.tril(-1)", "torch.triu(m, diagonal=1)", "F.pad(x, (1, 1))", "F.pad(x, [0, 0, 1, 2])",
    "F.pad(x, (1, 1, 1, 1), 'constant', 2)", "F.pad(x, (1, 1, 1, 1), mode='reflect')", "F.pad(x, (1, 1), value=1)",
    "F.pixel_shuffle(x, 2)", "F.pixel_unshuffle(x, 3)", "F.channel_shuffle(x, 2)", "x.contiguous()", "x.clone()", "x.detach()",
    # several values
    "torch.cat([x, x])", "torch.cat((x, x), 1)", "torch.cat([x, x], dim=-1)", "torch.cat(tensors=[x, x], dim=1)",
    "torch.concat([x, x], 1)", "torch.stack([x, x])", "torch.stack((x, x), dim=1)", "torch.hstack([m, m])",
    "torch.vstack((m, m))", "x.chunk(2)", "x.chunk(2, 1)[1]", "torch.chunk(x, 2, dim=1)[0]", "x.split(2, 1)[1]",
    "x.split(split_size=2, dim=1)[0]", "torch.split(x, [1, 3], 1)[1]", "x.split((1, 3), dim=1)[0]", "x.unbind(1)[2]",
    "x.unbind()", "torch.unbind(x, dim=2)[0]", "x.tensor_split(2, 1)[0]", "torch.meshgrid(v, v, indexing='ij')[0]",
    "torch.broadcast_tensors(v, m)[0]", "torch.where(x > 0, x, 0)", "torch.where(x > 0, x, m)", "x.where(x > 0, m)",
    "torch.cartesian_prod(v, v)",
    # named results
    "x.max(1).values", "x.max(1)[1]", "x.max()", "x.max(dim=1, keepdim=True).indices", "torch.max(x, m)", "torch.max(x, 1)[0]",
    "x.max(m)", "x.min(1)", "x.min(-1, True)[0]", "x.sort(-1).values", "x.sort(descending=True)[0]", "torch.sort(x, 1)[0]",
    "x.sort(dim=1).indices.float()", "x.topk(2)[0]", "x.topk(2, 1).values", "torch.topk(x, k=1, dim=1).indices",
    "x.kthvalue(2).values", "x.median(1).values", "x.median()", "x.mode(1).values", "x.aminmax().max", "x.aminmax(dim=1)[0]",
    "x.cummax(1).values", "x.cummin(1)[0]", "torch.std_mean(x, 1)[0]", "torch.var_mean(x, dim=1, keepdim=True)[1]",
    "torch.frexp(x).mantissa", "torch.linalg.qr(m).R.abs()", "torch.linalg.slogdet(m).logabsdet",
    # reductions
    "x.sum()", "x.sum(1)", "x.sum((1, 2))", "x.sum(1, True)", "x.sum(dim=1, keepdim=True)", "x.sum(axis=1)",
    "x.sum(dtype=torch.float64)", "torch.sum(x, (0, 1))", "x.sum(())", "x.mean()", "x.mean(1)", "x.mean((2, 3), keepdim=True)",
    "torch.mean(x, dim=[1])", "x.mean(-1, dtype=torch.float64)", "x.var()", "x.var(1)", "x.var(1, False)",
    "x.var(1, unbiased=False, keepdim=True)", "x.var(False)", "x.var(dim=1, correction=0)", "x.std(-1)",
    "torch.std(x, 1, correction=2)", "torch.std(x, (1, 2), True)", "x.prod()", "x.prod(1)", "x.prod(1, True)", "x.amax(1)",
    "x.amax((1, 2), True)", "x.amax()", "torch.amin(x, dim=1)", "x.argmax()", "x.argmax(1)", "x.argmin(dim=1, keepdim=True)",
    "x.argsort(-1)", "x.argsort(dim=1, descending=True)", "x.any()", "x.any(1)", "x.all(dim=1)", "(x > 0).any(1, True)",
    "x.count_nonzero()", "x.count_nonzero(1)", "x.count_nonzero(0, 1)", "x.count_nonzero((0, 1))",
    "torch.count_nonzero(x, dim=(0, 1))", "x.norm()", "x.norm(2, 1)", "x.norm(dim=1, keepdim=True)", "x.norm(p=1, dim=(1, 2))",
    "torch.norm(x, 2, 1)", "torch.linalg.norm(x, dim=1)", "torch.linalg.vector_norm(x, 2, 1)",
    "torch.linalg.vector_norm(x, ord=1, dim=(1, 2), keepdim=True)", "x.logsumexp(1)", "torch.logsumexp(x, (1, 2), True)",
    "x.cumsum(1)", "torch.cumsum(x, dim=0)", "x.cumprod(1)", "x.diff()", "x.nansum(1)",
    # arithmetic
    "x + 1", "1 + x", "x - 1.5", "1.5 - x", "x * 2", "x / 255", "2 / x", "x ** 2", "x ** 0.5", "2 ** x", "x // 2", "3 // x",
    "x % 3", "7 % x", "x @ m", "m @ x", "m @ v", "-x", "abs(x)", "+x", "x.add(1)", "x.add(m, alpha=2)",
    "torch.add(x, m, alpha=2)", "torch.add(input=x, other=1)", "x.sub(m)", "torch.sub(x, 1, alpha=2)", "torch.rsub(x, 1)",
    "x.mul(m)", "torch.mul(x, 2)", "x.div(2)", "x.div(2, rounding_mode='floor')", "torch.div(x, m, rounding_mode='trunc')",
    "x.true_divide(3)", "x.floor_divide(2)", "x.remainder(3)", "x.fmod(2)", "x.pow(2)", "torch.pow(x, v)", "torch.pow(2, x)",
    "x.float_power(2)", "x.lerp(m, 0.5)", "torch.lerp(x, m, x)", "x.addcmul(m, v)", "torch.addcmul(x, m, v, value=2)",
    "torch.addcdiv(x, m, v)", "torch.addmm(m, m, m)", "torch.addmm(m, m, m, beta=2, alpha=3)", "m.mm(m)", "m.mv(v)", "v.dot(v)",
    "v.outer(v)", "torch.bmm(x[0], x[1])", "torch.baddbmm(x[0], x[0], x[1])", "torch.matmul(x, m)",
    "torch.einsum('bchw,wk->bchk', x, m)", "torch.einsum('ab,bc->ac', [m, m])", "torch.tensordot(x, m, 1)",
    "torch.tensordot(x, m, dims=([3], [0]))", "torch.cross(m[:, :3], m[:, :3], 1)", "torch.kron(m, m)", "torch.cdist(m, m)",
    "x.maximum(m)", "torch.minimum(x, m)", "x.clamp(0)", "x.clamp(-1, 1)", "x.clamp(max=1)", "x.clamp(min=m)",
    "torch.clamp(x, m, m + 1)", "x.clip(0, 1)", "x.clamp_min(0.1)", "torch.clamp_max(x, 1)", "x.copysign(m)", "torch.atan2(x, m)",
    "torch.hypot(x, m)", "x.gcd(i[0, 0])", "x.heaviside(m)",
    # comparisons
    "x > 0", "x == m", "x.eq(1)", "torch.ne(x, m)", "x.ge(0) & x.le(1)", "(x > 0) | (x < -1)", "~(x > 0)", "(x > 0) ^ (m > 0)",
    "x.isnan()", "torch.isinf(x)", "x.isfinite()", "torch.isclose(x, m)", "x.logical_not()", "torch.logical_and(x, m)",
    "x.sign()", "torch.isin(x, i)",
    # element by element
    "x.abs()", "torch.exp(x)", "x.sqrt()", "x.rsqrt()", "torch.log(x)", "x.log1p()", "x.square()", "x.reciprocal()",
    "x.sigmoid()", "torch.tanh(x)", "x.sin()", "torch.cos(x)", "x.erf()", "x.floor()", "x.round()", "x.round(decimals=1)",
    "torch.ceil(x)", "x.trunc()", "x.frac()", "x.relu()", "F.relu(x)", "F.relu(x, True)", "F.relu(input=x, inplace=False)",
    "F.gelu(x)", "F.gelu(x, approximate='tanh')", "F.silu(x)", "F.mish(x)", "F.elu(x, 0.5)", "F.elu(x, alpha=0.5)", "F.selu(x)",
    "F.celu(x, 0.5)", "F.leaky_relu(x, 0.1)", "F.leaky_relu(x, negative_slope=0.1)", "F.hardtanh(x, -2, 2)",
    "F.hardtanh(x, min_val=-0.5)", "F.relu6(x)", "F.hardswish(x)", "F.hardsigmoid(x)", "F.softplus(x, 2)",
    "F.softplus(x, beta=2, threshold=3)", "F.softsign(x)", "F.tanhshrink(x)", "F.hardshrink(x, 0.3)",
    "F.softshrink(x, lambd=0.3)", "F.threshold(x, 0.1, 2)", "F.logsigmoid(x)", "F.glu(x, 1)", "F.prelu(x, v[:4])",
    "F.prelu(x, v[0])", "x.softmax(1)", "x.softmax(dim=-1)", "F.softmax(x, 1)", "F.softmax(x, dim=-1, dtype=torch.float64)",
    "torch.softmax(x, 1, torch.float64)", "F.log_softmax(x, -1)", "x.log_softmax(1)", "F.softmin(x, 1)", "F.normalize(x)",
    "F.normalize(x, 1, 2)", "F.normalize(x, dim=-1, eps=1e-3)", "F.cosine_similarity(m, m, 0)", "F.pairwise_distance(m, m, 1)",
    "x.nan_to_num()", "x.nan_to_num(1.0, 2.0)", "F.dropout(x, 0.3, False)", "F.dropout2d(x, training=False)", "F.one_hot(i)",
    "F.one_hot(i, 5)",
    # layers as functions
    "F.linear(x, m)", "F.linear(x, m, v)", "F.linear(x, weight=m, bias=v)", "F.conv2d(x, x)", "F.conv2d(x, x, None, 1, 2)",
    "F.conv2d(x, x, padding=(1, 2))", "F.conv2d(x, x, v[:2], stride=2, padding=2)",
    "F.conv2d(x, x.transpose(0, 1)[:, :1], None, 1, 0, 1, 4)", "F.conv1d(x[0], x[0])",
    "F.conv2d(x, x[:, :, :3, :3], padding='same')", "F.conv_transpose2d(x, x.transpose(0, 1), stride=2)",
    "F.conv_transpose2d(x, x.transpose(0, 1), None, 2, 1, 1)", "F.layer_norm(x, (6,))", "F.layer_norm(x, [6], v, v)",
    "F.layer_norm(x, (6, 6), m, None, 1e-3)", "F.rms_norm(x, (6,))", "F.rms_norm(x, (6,), weight=v, eps=1e-3)",
    "F.group_norm(x, 2)", "F.group_norm(x, 2, v[:4], v[:4], 1e-3)", "F.instance_norm(x)", "F.instance_norm(x, eps=1e-2)",
    "F.batch_norm(x, v[:4], v[:4].abs() + 1)", "F.batch_norm(x, v[:4], v[:4].abs() + 1, v[:4], None, False, 0.1, 1e-3)",
    "F.local_response_norm(x, 2)", "F.embedding(i, m)", "F.embedding(i, m, padding_idx=1)", "F.embedding_bag(i, m)",
    "F.scaled_dot_product_attention(x, x, x)", "F.scaled_dot_product_attention(x, x, x, None, 0.0, True)",
    "F.scaled_dot_product_attention(x, x, x, attn_mask=m)", "F.interpolate(x, 3)", "F.interpolate(x, (3, 4))",
    "F.interpolate(x, scale_factor=2)", "F.interpolate(x, size=3, mode='bilinear')",
    "F.interpolate(x, None, 2, 'bilinear', True)", "F.interpolate(x, scale_factor=(2.0, 1.5), mode='bicubic')",
    "F.grid_sample(x, x[:, :, :, :2], align_corners=False)", "F.bilinear(m, m, x[0])",
    # indices
    "x[0]", "x[:, 1:3]", "x[..., -1]", "x[:, None, ..., ::2]", "x[:, i[0]]", "x[x > 0]", "m[i]", "x[0, 1]", "x[-1, ..., None]",
    "m[(0, 1)]", "m[[0, 1]]", "m[i, i]", "m[:, [1, 0]]", "x.gather(1, i[:, :, None, None])", "x.take(i)",
    "torch.take_along_dim(m, i[:1], 1)", "x.masked_fill(x > 0, 1)", "x.masked_fill(m > 0, float('-inf'))",
    "torch.masked_fill(x, m > 0, 0)", "x.masked_select(x > 0)", "m.index_add(0, i[0], m[:3])", "m.scatter(1, i, 1)",
    "m.scatter(1, i, m)", "m.scatter_add(1, i, m)", "m.index_fill(0, i[0], 2)", "m.index_copy(0, i[0], m[3:])",
    "torch.bucketize(x, v.sort()[0])", "torch.searchsorted(v.sort().values, m)", "i.flatten().bincount()", "x.nonzero()",
    "i.unique()",
    # casts and new values
    "x.float()", "x.double()", "x.half()", "x.long()", "x.int()", "x.bool()", "x.to(torch.float64)", "x.to(dtype=torch.int32)",
    "x.to(i)", "x.to('cpu')", "x.to('cpu', torch.float64)", "x.type_as(i)", "x.type(torch.float64)", "x.to(x.dtype)",
    "m.new_zeros(2, 3)", "m.new_ones((2, 3))", "m.new_full((2,), 3)", "torch.zeros_like(x)",
    "torch.ones_like(x, dtype=torch.int64)", "torch.full_like(x, 2)", "torch.arange(x.size(1))", "torch.arange(0, x.shape[1], 2)",
    "torch.zeros(x.shape)", "torch.ones(2, 3)", "x.new_empty(0)", "x.size(0) * x", "x / x.shape[-1] ** 0.5",
    "x.view(x.size(0), -1)", "x.reshape(*[2, 4], -1)", "x.view(x.shape[0], x.shape[1] // 2, -1)", "x * x.dim()", "x * x.ndim",
    "x.flatten(1).view(x.shape[:2] + (-1,))", "x + x.numel()", "x.real", "x.data", "torch.fft.rfft(m).abs()",
    "torch.complex(m, m)", "torch.view_as_real(torch.complex(m, m))", "x.sum().item() * x", "x.tolist()",
]
# fmt: on


class Expression(nn.Module):
    """One of the calls, as a model."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.steps = [_function(text) for text in texts]

    def forward(self, x: Tensor, m: Tensor, v: Tensor, i: Tensor) -> Any:
        for step in self.steps:
            x = step(x, m, v, i)
        return x


def _function(text: str) -> Callable[..., Any]:
    found: Callable[..., Any] = eval(f"lambda x, m, v, i: {text}", {"torch": torch, "F": F})
    return found


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values for x, m, v, i; small positive and negative numbers, none of them zero."""
    made = torch.Generator().manual_seed(3)

    def values(*shape: int) -> Tensor:
        size = (
            torch.randint(1, 5, shape, generator=made) if not dtype.is_floating_point else torch.rand(shape, generator=made) + 0.5
        )
        return (size * (torch.randint(0, 2, shape, generator=made) * 2 - 1)).to(dtype)

    return values(2, 4, 6, 6), values(6, 6), values(6), torch.tensor([[0, 2, 1], [3, 1, 0]])
