"""Facts about the operators of ATen, each stated once: what moves values, what works element by element, what keeps shapes.

Sets of overloads say how arguments are read; sets of names (`name`) say what all overloads of an operator have in common.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def name(target: Any) -> str:
    """`conv2d` of `aten.conv2d.padding`; empty for what is no operator of PyTorch's own."""
    space, _, short = target._schema.name.partition("::") if isinstance(target, torch._ops.OpOverload) else ("", "", "")
    return str(short) if space == "aten" else ""


# -- by name -----------------------------------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    "relu relu6 hardtanh gelu silu hardswish hardsigmoid leaky_relu elu selu celu sigmoid tanh mish softplus hardshrink threshold "
    "log_sigmoid neg abs exp log sqrt rsqrt reciprocal square erf bitwise_not"
)
"""Each element of the result is a function of one element of the only tensor."""

DROPOUTS = _names("dropout feature_dropout alpha_dropout")

SAME_SHAPE = ELEMENTWISE | DROPOUTS | _names("softmax log_softmax cumsum cumprod tril triu roll flip prelu")
"""The result has the shape of the first operand, whatever else there is."""

CONVOLUTIONS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
NORMS = _names("batch_norm layer_norm group_norm instance_norm rms_norm")
POOLS = frozenset(f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg") for n in (1, 2, 3))
INTERPOLATIONS = _names(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d"
)

SAME_RANK = SAME_SHAPE | CONVOLUTIONS | NORMS | POOLS | INTERPOLATIONS
SAME_RANK |= _names(
    "linear clone contiguous alias detach to pad reflection_pad2d transpose slice narrow pixel_shuffle pixel_unshuffle "
    "channel_shuffle zeros_like ones_like glu"
)
"""The result and the first operand have as many dimensions as each other."""

BROADCAST = _names(
    "add sub rsub mul div pow eq ne lt le gt ge maximum minimum where clamp clamp_min clamp_max masked_fill lerp addcmul addcdiv "
    "floor_divide remainder __xor__ __and__ __or__ scaled_dot_product_attention"
)
"""The result has as many dimensions as the operand with most."""

REDUCTIONS = _names("mean sum amax amin var std linalg_vector_norm")
"""Axes that are named go, or are of size one."""

PARTS = _names("chunk split split_with_sizes tensor_split unsafe_chunk hsplit vsplit dsplit")
"""Several pieces of the operand, of its rank (`unbind` gives pieces of one less)."""


# -- by overload -------------------------------------------------------------------------------------------------------

RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
}
PERMUTES = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.intlist,
    aten.movedim.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.mT.default,
    aten.numpy_T.default,
}
EXPANSIONS = {aten.expand.default, aten.expand_as.default}
MOVEMENTS = EXPANSIONS | {
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.roll.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.tile.default,
    aten.flip.default,
    aten.rot90.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.unfold.default,
}
SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}
RESIZES = {
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec,
    aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec, aten.upsample_bicubic2d.vec,
    aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
}  # fmt: skip
TAKES = {aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.take_along_dim.default}

CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.lift_fresh_copy.default,
}

CHECKS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.sym_constrain_range_for_size.default}
"""They compute nothing: what torch.export checks while a graph runs."""


def is_cast(node: fx.Node) -> bool:
    """A cast to another floating dtype, as far as the graph tells."""
    if node.target not in CASTS:
        return False
    dtypes = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return all(d.is_floating_point for d in dtypes)
