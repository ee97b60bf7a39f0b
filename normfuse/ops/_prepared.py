"""What is derived from constant weights, kept as long as the weight lives.

Entries hang on the identity of the packed weight. An attribute on the tensor would be shorter, but would travel with it
into copies and files.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.gpu import planes as gpu
from normfuse.ops._shapes import input_scale_value
from normfuse.quant.packing import packed_bytes, unpack, unpack_multipliers
from normfuse.quant.weight import are_multipliers, largest_multiplier

__all__ = [
    "GpuWeight", "Packed", "conv_operands", "conv_weights", "gpu_weight", "known_linear", "known_weights", "linear_weight",
    "operand_of", "state",
]  # fmt: skip

_KEPT = 1 << 22  # values of the int32 operands that are kept for the definitions, in all


class _Entry(NamedTuple):
    owner: weakref.ref[Tensor]
    key: tuple[Any, ...]
    exponents: Tensor  # as they were
    value: Any


class Packed(NamedTuple):
    """One matrix as the operators of linear layers take it.

    Attributes:
        weight: packed codes, uint8.
        exponents: uint8 [K].
        scale: [N].
        bits: of a code.
        multipliers: of blocks, packed, or None.
        bias: [N] or None; what only needs the integers leaves it out.
    """

    weight: Tensor
    exponents: Tensor
    scale: Tensor
    bits: int
    multipliers: Tensor | None = None
    bias: Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What entries made of it hang on."""
        return (
            *_key(self.weight, self.exponents, self.scale, self.bias, self.bits, 1, 1),
            None if self.multipliers is None else state(self.multipliers),
        )


class GpuWeight(NamedTuple):
    """A weight as `normfuse.gpu.product` reads it.

    Attributes:
        planes, shifts: see `normfuse.gpu.planes`.
        scale, bias: float32 [N].
        groups: the largest shift and one.
        static: the scale of the inputs, or None where each row has its own.
    """

    planes: Tensor
    shifts: Tensor
    scale: Tensor
    bias: Tensor | None
    groups: int
    static: float | None


_structs: dict[int, _Entry] = {}
_on_gpu: dict[int, _Entry] = {}
_operands: OrderedDict[int, _Entry] = OrderedDict()


def linear_weight(p: Packed) -> native.Weight:
    """`nf_weight` of one matrix.

    Raises:
        UsageError: sizes, dtypes, devices or values do not belong together.
    """
    if p.multipliers is None:
        return conv_weights(p.weight, p.exponents, p.scale, p.bias, p.bits, 1, 1)[0]
    found = known_linear(p)
    if found is not None:
        return found
    _on_cpu(("weight", p.weight), ("exponents", p.exponents), ("scale", p.scale), ("bias", p.bias), ("multipliers", p.multipliers))
    _, block = _multipliers(p)
    ((exponents,), (codes,)) = _split(p.weight, p.exponents, p.scale.numel(), p.bits, 1, 1)
    scale, bias = p.scale.detach().float().contiguous(), None if p.bias is None else p.bias.detach().float().contiguous()
    value = native.weight(codes, exponents, scale, bias, p.bits, p.multipliers.detach().contiguous(), block)
    number = id(p.weight)
    owner = weakref.ref(p.weight, lambda _: _structs.pop(number, None))
    _structs[number] = _Entry(owner, p.key, p.exponents.clone(), (value,))
    return value


def known_linear(p: Packed) -> native.Weight | None:
    """What `linear_weight` made of these very tensors before, which were found to belong together then."""
    if p.multipliers is None:
        found = known_weights(p.weight, p.exponents, p.scale, p.bias, p.bits, 1, 1)
        return None if found is None else found[0]
    known = _structs.get(id(p.weight))
    if known is None or not _valid(known, p.key, p.weight, p.exponents):
        return None
    value: native.Weight = known.value[0]
    return value


def _multipliers(p: Packed) -> tuple[Tensor, int]:
    """int8 [N, blocks], and channels of a block.

    Raises:
        UsageError: shapes or values are not those of such a weight.
    """
    assert p.multipliers is not None
    m, block = unpack_multipliers(p.multipliers.detach(), p.scale.numel(), p.exponents.numel())
    most = largest_multiplier(p.bits)
    if not are_multipliers(m, p.bits) or int(p.exponents.max()) > 0:
        raise UsageError(
            f"multipliers from {int(m.min())} to {int(m.max())} with exponents up to {int(p.exponents.max())}: expected ±1 to "
            f"±{most} for codes of {p.bits} bits, and exponents of 0"
        )
    return m, block


def _on_cpu(*named: tuple[str, Tensor | None]) -> None:
    for name, tensor in named:
        if tensor is not None and tensor.device.type != "cpu":
            raise UsageError(f"{name} is on {tensor.device}, the input on cpu; expected all on one device")


def conv_weights(
    weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, bits: int, groups: int, taps: int
) -> tuple[native.Weight, ...]:
    """`nf_weight` of each group of a convolution: `taps` columns read each channel, the channel runs fastest."""
    found = known_weights(weight, exponents, scale, bias, bits, groups, taps)
    if found is not None:
        return found
    _on_cpu(("weight", weight), ("exponents", exponents), ("scale", scale), ("bias", bias))
    columns, parts = _split(weight, exponents, scale.numel(), bits, groups, taps)
    scales = scale.detach().float().contiguous().chunk(groups)
    biases = [None] * groups if bias is None else bias.detach().float().contiguous().chunk(groups)
    # the parts share the memory of the weight and are other objects, so that the entry does not keep its owner alive
    value = tuple(native.weight(*of_group, bits) for of_group in zip(parts, columns, scales, biases, strict=True))
    number, key = id(weight), _key(weight, exponents, scale, bias, bits, groups, taps)
    _structs[number] = _Entry(weakref.ref(weight, lambda _: _structs.pop(number, None)), key, exponents.clone(), value)
    return value


def known_weights(
    weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, bits: int, groups: int, taps: int
) -> tuple[native.Weight, ...] | None:
    """What `conv_weights` made of these very tensors before, which were found to belong together then."""
    known = _structs.get(id(weight))
    if known is None or not _valid(known, _key(weight, exponents, scale, bias, bits, groups, taps), weight, exponents):
        return None
    found: tuple[native.Weight, ...] = known.value
    return found


def gpu_weight(
    weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None, bits: int
) -> GpuWeight | None:
    """The weight laid out for GPU kernels, on its device, once for each weight; None if they cannot take it.

    The first call waits for the device, later ones do not, so that they can be captured in a CUDA graph.

    Raises:
        UsageError: sizes, dtypes or devices do not belong together.
    """
    key = (*_key(weight, exponents, scale, bias, bits, 1, 1), None if input_scale is None else state(input_scale))
    known = _on_gpu.get(id(weight))
    if known is not None and _valid(known, key, weight, exponents):
        found: GpuWeight | None = known.value
        return found
    value = _gpu_weight(weight, exponents, scale, bias, input_scale, bits)
    number = id(weight)
    _on_gpu[number] = _Entry(weakref.ref(weight, lambda _: _on_gpu.pop(number, None)), key, exponents.clone(), value)
    return value


def _gpu_weight(
    weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None, bits: int
) -> GpuWeight | None:
    for name, tensor in (("exponents", exponents), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise UsageError(f"{name} is on {tensor.device}, the weight on {weight.device}; expected all on one device")
    if exponents.numel() > gpu.LARGEST_K or int(exponents.max()) >= gpu.GROUPS:
        return None
    codes = unpack(weight.detach(), bits, exponents.detach(), scale.numel())
    return GpuWeight(
        gpu.planes(codes, bits),
        gpu.shifts(exponents.detach()),
        scale.detach().float().contiguous(),
        None if bias is None else bias.detach().float().contiguous(),
        int(exponents.max()) + 1,
        input_scale_value("static scale", input_scale) or None,
    )


def operand_of(p: Packed) -> Tensor:
    """C << (E − e), or C · m: int32 [n, K]."""
    n = p.scale.numel()
    if p.multipliers is None:
        return conv_operands(p.weight, p.exponents, n, p.bits, 1, 1)[0]
    known = _operands.get(id(p.weight))
    if known is not None and _valid(known, p.key, p.weight, p.exponents):
        found: Tensor = known.value
        return found
    _split(p.weight, p.exponents, n, p.bits, 1, 1)
    m, block = _multipliers(p)
    codes = unpack(p.weight.detach(), p.bits, p.exponents.detach(), n)
    value = codes.int() * m.int().repeat_interleave(block, 1)[:, : codes.shape[1]]
    _keep_operand(p.weight, p.exponents, p.key, value)
    return value


def _keep_operand(weight: Tensor, exponents: Tensor, key: tuple[Any, ...], value: Tensor) -> None:
    """As long as there is room."""
    if value.numel() > _KEPT or weight.is_inference():
        return
    number = id(weight)
    _operands[number] = _Entry(weakref.ref(weight, lambda _: _operands.pop(number, None)), key, exponents.clone(), value)
    while sum(entry.value.numel() for entry in list(_operands.values())) > _KEPT:
        _operands.popitem(last=False)


def conv_operands(weight: Tensor, exponents: Tensor, n: int, bits: int, groups: int, taps: int) -> Tensor:
    """C << (E − e) of each group of channels, E that of the group: int32 [groups, n / groups, taps · channels]."""
    key = (state(weight), state(exponents), n, bits, groups, taps)
    known = _operands.get(id(weight))
    if known is not None and _valid(known, key, weight, exponents):
        found: Tensor = known.value
        return found
    columns, parts = _split(weight, exponents, n, bits, groups, taps)
    value = torch.stack(
        [
            unpack(part, bits, e, n // groups).to(torch.int32) << (e.max() - e).to(torch.int32)
            for part, e in zip(parts, columns, strict=True)
        ]
    )
    _keep_operand(weight, exponents, key, value)
    return value


def _split(weight: Tensor, exponents: Tensor, n: int, bits: int, groups: int, taps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The exponents of the columns, and the packed bytes, of each group."""
    columns = [e.repeat(taps) for e in exponents.detach().chunk(groups)]
    lengths = [packed_bytes(n // groups, bits, torch.bincount(e.int()).tolist()) for e in columns]
    if weight.dtype != torch.uint8 or weight.ndim != 1 or not weight.is_contiguous() or sum(lengths) != weight.numel():
        raise UsageError(
            f"weight: {tuple(weight.shape)} of {weight.dtype}; {groups} x [{n // groups}, {columns[0].numel()}] in {bits} bits "
            f"with these exponents is {sum(lengths)} bytes, one after the other (see normfuse.quant.packing.pack)"
        )
    return columns, list(weight.detach().split(lengths))


def _key(
    weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, bits: int, groups: int, taps: int
) -> tuple[Any, ...]:
    return state(weight), state(exponents), state(scale), None if bias is None else state(bias), bits, groups, taps


def _valid(known: _Entry, key: tuple[Any, ...], weight: Tensor, exponents: Tensor) -> bool:
    if known.owner() is not weight or known.key != key:
        return False
    # elsewhere than on the CPU the comparison would wait for the device, on every call
    return not exponents.is_inference() or exponents.device.type != "cpu" or torch.equal(known.exponents, exponents)


def state(tensor: Tensor) -> tuple[int, int, torch.dtype, int | None]:
    """Where its values are, and how often they were written; tensors made in inference mode do not count that."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, None if tensor.is_inference() else tensor._version
