"""The weight-only form: weights stay integers in the file, activations stay floats.

    INT4   y = (f ⊙ x) · DequantizeLinear(C, S) + b                   up to 4 bits, from opset 21 on; scales in blocks
    INT8   y = (f ⊙ x) · DequantizeLinear(C, u) ⊙ (S / u) + b         one scale u for the whole weight

    f[k] = 2^(-e[k]),   S[n] = scale[n] · 2^E

Where C << (E − e) fits as well, f is left out and the weight holds it; else f goes into the constants in front of x where it can,
and is one Mul where it cannot. Multipliers of blocks are in the scales of blocks, S[n] · m[n, block]. Both spellings are those that
TensorRT makes one kernel of, which reads integers. A convolution has
a scale for each output; a table of rows is Gather(DequantizeLinear(C, S)).

This is another function than the module's, whose activations are rounded: `quantized.weights_alone` says which.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from normfuse.errors import ExportError
from normfuse.export.lowering.attention.floats import FloatAttention
from normfuse.export.lowering.layers import Layer
from normfuse.export.onnx.build import Build, Numbers, Shared, dims, take_over
from normfuse.export.onnx.program import Program
from normfuse.export.onnx.quantized.absorb import absorbed
from normfuse.export.onnx.quantized.form import INT4_OPSET, Form, Wanted
from normfuse.export.onnx.quantized.integer import expand
from normfuse.export.onnx.quantized.sites import Site, sites
from normfuse.export.onnx.quantized.weights_alone import weights_alone
from normfuse.export.ops.products import activated
from normfuse.export.ops.shiftquant_conv2d import conv_codes
from normfuse.export.ops.weights import linear_parts, unit_of
from normfuse.export.targets import Target
from normfuse.quant.packing import unpack, unpack_rows
from normfuse.quant.weight import BLOCK_BITS

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["WeightOnly", "block_size"]

#: Sizes of a block of input channels that share a row of scales, the best first.
_BLOCKS = (128, 64, 32, 16)
_CODES = (
    "NormQuantize", "QuantizeRows", "ShiftQuantMatMul", "ShiftQuantMatMulQuantize", "QuantizeCodes", "DequantizeCodes",
    "CodesConv2d",
)  # fmt: skip


def block_size(k: int, n: int) -> int:
    """How many of k input channels share a row of scales of an INT4 weight [k, n]; 0: it is better stored as INT8.

    TensorRT multiplies by an INT4 weight without unpacking it first if k and n are even and it has at least two blocks of one size;
    its documentation names the sizes 64 and 128.
    """
    if k % 2 or n % 2 or k < 4:
        return 0
    return next((b for b in _BLOCKS if k % b == 0 and k > b), k // 2)


class WeightOnly(Form):
    """Packed weights and float activations."""

    name = "weight_only"
    packs = True
    rounds = False
    passes = (FloatAttention(),)

    def refuses(self, layers: Sequence[Layer], wanted: Wanted) -> str | None:
        """Where a layer reads or writes codes of activations, which this form has none of."""
        found = [s for s in layers if s.op.name in _CODES]
        if not found:
            return None
        remedy = ", or use form='integer'" if "integer" in wanted.target.quantized else ""
        return (
            f"form='weight_only' leaves activations in float, and {found[0].layer} ({found[0].op.name}) reads or writes their "
            f"codes: export what normfuse.optimize(quantize=...) returned{remedy}"
        )

    def write(self, model: ir.Model, wanted: Wanted) -> None:
        shared: Shared = {}
        for site in sites(model):
            make = _MAKE.get(site.op.name)
            if make is None:
                if site.op.name == "Attention":
                    site.facts["bits"] = 0
                expand(model, site, shared)
            else:
                at = Build(model, site.node, shared)
                y = make(at, model, site, wanted.opset)
                take_over(site.node.outputs[0], y)
                model.graph.remove(site.node, safe=True)

    def meant(self, program: Program, target: Target, kept: Collection[str] = ()) -> Program:
        return weights_alone(program, kept)


def _linear(at: Build, model: ir.Model, site: Site, opset: int) -> ir.Value:
    scale, e, bits = site.array("scale"), site.array("exponents").astype(np.int32), site.facts["bits"]
    if site.input("multipliers") is not None:
        wide, scales, block = _blocks(site, bits if opset >= INT4_OPSET else 8)
        factor = None
    else:
        codes = unpack(torch.tensor(site.array("weight")), bits, torch.tensor(e), scale.size).numpy().T  # (K, N)
        block = block_size(*codes.shape) if _is_int4(bits, opset) else 0
        wide, scale, factor = _spread(codes, (e.max(initial=0) - e)[:, None], scale, e, 7 if block else 127)
        scales = np.broadcast_to(scale, (wide.shape[0] // block if block else 1, scale.size))
    x = _times(at, model, site, factor, -1)
    shape = dims(site.node.outputs[0])
    if block:
        weight = _dequantized(at, wide, scales, x.dtype, int4=True, axis=0, block_size=block)
        y = at.op("MatMul", x, weight, dtype=x.dtype, shape=shape)
    else:
        unit = unit_of(scale)
        y = at.op("MatMul", x, _dequantized(at, wide, unit, x.dtype), dtype=x.dtype, shape=shape)
        if (scale != unit).any():
            y = at.op("Mul", y, _as(at, scale / unit, x.dtype), dtype=x.dtype, shape=shape)
    if site.input("bias") is not None:
        y = at.op("Add", y, _as(at, site.input("bias"), x.dtype), dtype=x.dtype, shape=shape)
    y = activated(at, y, site.facts["epilogue"])
    if site.has_residual:
        y = at.op("Add", y, _as(at, site.input("residual"), x.dtype), dtype=x.dtype, shape=shape)
    return y


def _blocks(site: Site, bits: int) -> tuple[Numbers, Numbers, int]:
    """Codes [K, N] with a scale for each block [K / block, N], which a MatMulNBits of that block size holds as they are; or, where
    blocks do not come out even or codes are to have 8 bits, codes times multipliers, and 0."""
    ((codes, factors, _, _),) = linear_parts(site.packed, site.facts["bits"])
    block, scale = site.facts["block"], site.array("scale")
    if bits > BLOCK_BITS or len(codes) % block:
        return codes * factors, scale[None], 0
    return codes, scale * factors[::block].astype(np.float32), block


def _conv(at: Build, model: ir.Model, site: Site, opset: int) -> ir.Value:
    scale, e, facts = site.array("scale"), site.array("exponents").astype(np.int32), site.facts
    codes, shifts = conv_codes(site.array("weight"), e, scale.size, facts["bits"], facts["group"], facts["kernel"])
    wide, scale, factor = _spread(codes, shifts, scale, e, 127, facts["group"])
    x = _times(at, model, site, factor, -3)
    weight = _dequantized(at, wide, scale, x.dtype, axis=0)
    names = {"kernel": "kernel_shape", "strides": "strides", "pads": "pads", "dilations": "dilations", "group": "group"}
    bias = [] if site.input("bias") is None else [_as(at, site.input("bias"), x.dtype)]
    attributes = {new: facts[old] for old, new in names.items()}
    y = at.op("Conv", x, weight, *bias, dtype=x.dtype, shape=dims(site.node.outputs[0]), **attributes)
    out: ir.Value = activated(at, y, facts["epilogue"])
    return out


def _embedding(at: Build, model: ir.Model, site: Site, opset: int) -> ir.Value:
    """TensorRT makes one kernel of both, which unpacks the rows that are asked for."""
    codes, bits = unpack_rows(torch.tensor(site.array("codes")), site.facts["dim"], site.facts["bits"]).numpy(), site.facts["bits"]
    dtype = site.node.outputs[0].dtype
    table = _dequantized(at, codes, site.array("scale"), dtype, int4=_is_int4(bits, opset), axis=0)
    return at.op("Gather", table, site.x, axis=0)


_MAKE = {"ShiftQuantConv2d": _conv, "ShiftQuantEmbedding": _embedding, "ShiftQuantLinear": _linear}


def _is_int4(bits: int, opset: int) -> bool:
    return bits <= 4 and opset >= INT4_OPSET


def _spread(
    codes: Numbers, shifts: Numbers, scale: Numbers, e: Numbers, top: int,
    group: int = 1,
) -> tuple[Numbers, Numbers, Numbers | None]:  # fmt: skip
    """The codes and scales of the file, and the factors of the input channels.

    Codes are shifted where that fits; else the factors are 2^(-e), at most 1, so that no half overflows, and the scales 2^E larger.
    """
    wide = codes.astype(np.int32) << shifts
    if np.abs(wide).max(initial=0) <= top:
        return wide, scale, None
    highest = np.repeat([each.max() for each in np.split(e, group)], scale.size // group)
    return codes, np.ldexp(scale, highest), np.exp2(-e.astype(np.float32))


def _dequantized(at: Build, codes: Numbers, scale: Numbers, dtype: Any, *, int4: bool = False, **how: Any) -> ir.Value:
    if int4:
        import ml_dtypes

        stored = at.const(codes.astype(np.int8).astype(ml_dtypes.int4))
    else:
        stored = at.const(codes.astype(np.int8))
    return at.op("DequantizeLinear", stored, _as(at, scale, dtype), dtype=dtype, shape=codes.shape, **how)


def _times(at: Build, model: ir.Model, site: Site, factor: Numbers | None, axis: int) -> ir.Value:
    """f ⊙ x; layers with the same exponents share it."""
    x = site.x
    if x.dtype == at.ir.DataType.DOUBLE:
        raise ExportError(
            f"{site.layer}: form='weight_only' computes in float32 or less, and the model in float64; export it in float32"
        )
    if factor is None or (len(list(x.uses())) == 1 and absorbed(model, x, factor, axis)):
        return x
    key = ("times", id(x), factor.tobytes())
    if key not in at.shared:
        vector = _as(at, factor.reshape(-1, *[1] * (-axis - 1)), x.dtype)
        at.shared[key] = at.op("Mul", x, vector, dtype=x.dtype, shape=dims(x))
    scaled: ir.Value = at.shared[key]
    return scaled


def _as(at: Build, value: ir.Value | Numbers | None, dtype: ir.DataType | None) -> ir.Value:
    """A constant, or a value, in the dtype that the layer computes in."""
    assert dtype is not None
    if isinstance(value, np.ndarray):
        return at.const(np.ascontiguousarray(value, dtype.numpy()))
    assert value is not None
    return value if value.dtype == dtype else at.op("Cast", value, to=int(dtype), dtype=dtype, shape=dims(value))
