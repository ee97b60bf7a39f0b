"""The QDQ form: QuantizeLinear and DequantizeLinear with constant scales around float products, for runtimes that fuse them.

    Q → DQ → MatMul(·, DQ(weight)) → Sum(·, bias)      ONNX Runtime: MatMulIntegerToFloat, bit for bit the integer product
    Q → DQ → Conv(·, DQ(weight), DQ(bias)) → Q → DQ    ONNX Runtime: QLinearConv
    Relu(Conv(...)) → Q → DQ                            the same; ONNX Runtime: with Q to uint8, see `_codes`

Sum and not Add: ONNX Runtime makes MatMul and Add a Gemm before it looks for quantization, and then finds none. And it fuses a
DequantizeLinear that has one reader only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.errors import ExportError
from normfuse.export.lowering.layers import Layer
from normfuse.export.onnx.build import Build, Numbers, Shared, const_of, dims, take_over
from normfuse.export.onnx.program import Program
from normfuse.export.onnx.quantized.as_coded import as_coded
from normfuse.export.onnx.quantized.between import chain_of, narrowed
from normfuse.export.onnx.quantized.form import Form, Wanted
from normfuse.export.onnx.quantized.integer import expand
from normfuse.export.onnx.quantized.pairs import read_pair, write_pairs
from normfuse.export.onnx.quantized.sites import Site, sites
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN
from normfuse.export.ops.activations import ZERO
from normfuse.export.ops.products import activated
from normfuse.export.ops.shiftquant_conv2d import conv_codes, conv_parts
from normfuse.export.ops.weights import SAFE, linear_parts, stored, unit_of
from normfuse.export.targets import Target

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Qdq"]

_WIDEST = 9
_CODES = ("QuantizeRows", "NormQuantize", "ShiftQuantMatMul", "ShiftQuantMatMulQuantize")


class Qdq(Form):
    """Codes with constant scales around float products; what the target says decides which codes.

    Unsigned ones, with a zero point of 128 for activations and for weights beyond `SAFE`, are what ONNX Runtime multiplies exactly
    on every CPU; int8 with a zero point of 0 is what other runtimes expect. TensorRT wants one scale for a weight: it then
    multiplies integers where q, k and v are cut from the product, too; else it cuts the weight first, and multiplies halves.
    """

    name = "qdq"

    def refuses(self, layers: Sequence[Layer], wanted: Wanted) -> str | None:
        """Where a scale is found at run time, or the codes of a weight are wider than the int8 that a target takes (ONNX Runtime,
        which has to run the file once, does not take such a weight in parts either)."""
        instead = f"form={wanted.instead_of('native', 'qdq')!r}"
        scaled = [s for s in layers if s.has_weight or s.op.name in _CODES]
        dynamic = [s for s in scaled if not s.static]
        if dynamic:
            return (
                f"form='qdq' needs static scales, and {len(dynamic)} of {len(scaled)} quantized layers find theirs at run time, "
                f"{dynamic[0].layer} among them: quantize with ShiftQuant(activations='static') and calibration data, or use "
                f"{instead}"
            )
        wide = [s for s in scaled if s.has_weight and s.facts["bits"] + s.facts["groups"] > _WIDEST]
        if wide and not wanted.target.unsigned_codes:
            bits, groups = wide[0].facts["bits"], wide[0].facts["groups"]
            return (
                f"form='qdq' for this target needs weights that fit in 8 bits, weight_bits + groups <= {_WIDEST}, and "
                f"{wide[0].layer} has {bits} bits and {groups} groups: quantize with ShiftQuant(groups={max(1, _WIDEST - bits)}), "
                f"or use {instead}"
            )
        attention = [s for s in layers if s.op.name == "Attention" and s.facts["bits"]]
        if attention:
            return (
                f"form='qdq' needs static scales, and the attention at {attention[0].layer} finds those of its queries and keys at "
                f"run time: quantize with ShiftQuant(attention=False), or use {instead}"
            )
        return None

    def write(self, model: ir.Model, wanted: Wanted) -> None:
        shared: Shared = {}
        unsigned = wanted.target.unsigned_codes
        if wanted.program is not None and wanted.target.codes_between:
            write_pairs(model, chain_of(wanted.program))
        for site in sites(model):
            if not site.has_weight:
                expand(model, site, shared)
                continue
            at = Build(model, site.node, shared)
            if site.op.name == "ShiftQuantConv2d":
                y = _conv(at, site, unsigned)
            else:
                y = _gemm(at, site) if _is_gemm(site) else _linear(at, site, wanted)
            y = activated(at, y, site.facts["epilogue"])
            if site.has_residual:
                y = at.op("Add", y, _float(at, site.input("residual")), dtype=y.dtype, shape=dims(site.node.outputs[0]))
            old = site.node.outputs[0]
            take_over(old, at.op("Cast", y, to=int(site.dtype())) if old.dtype != at.ir.DataType.FLOAT else y)
            model.graph.remove(site.node, safe=True)

    def meant(self, program: Program, target: Target, kept: Collection[str] = ()) -> Program:
        return as_coded(program, chain_of(program)) if target.codes_between else program

    def deviates(self, program: Program, target: Target) -> str:
        chain = target.codes_between and bool(chain_of(program))
        said = "layers hand on codes of 8 bits, which use all 255 steps behind a ReLU, and weights are one int8"
        return said if chain else ""

    def at_last(self, model: ir.Model) -> None:
        """A DequantizeLinear of its own for each node that reads one."""
        for node in list(model.graph):
            if node.op_type != "DequantizeLinear" or node.domain:
                continue
            out = node.outputs[0]
            for reader, i in list(out.uses())[1:]:
                copy = Build(model, reader).op("DequantizeLinear", *node.inputs, dtype=out.dtype, shape=dims(out), **_axis(node))
                reader.replace_input_with(i, copy)


def _axis(node: ir.Node) -> dict[str, Any]:
    return {k: a.value for k, a in node.attributes.items()}


def _codes(at: Build, site: Site, unsigned: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
    """x as codes, their scale and zero point; what reads the same x shares them.

    For ONNX Runtime uint8: on an x86 it fuses int8 only if nothing else reads the codes. Behind a Relu the zero point is 0, so
    that it takes the Relu into the layer in front; elsewhere it is 128. Behind the QuantizeLinear a Clip keeps the bytes within the
    codes, where it is in no one's way. Other runtimes expect int8, and fuse that with a Relu and with a Clip of floats in front.
    """
    pair = read_pair(site)
    if pair is not None:
        return pair
    x, static, bits = site.x, np.float32(site.facts["input_scale"]), site.facts["activation_bits"]
    if x.dtype == at.ir.DataType.DOUBLE:
        raise ExportError("form='qdq' computes in float32, and the model in float64; export it in float32 or with form='integer'")
    key = ("codes", id(x), float(static), bits)
    if key not in at.shared:
        scale, top = at.const(static), 2 ** (bits - 1) - 1
        if x.dtype != at.ir.DataType.FLOAT:
            x = at.op("Cast", x, to=1, dtype=at.ir.DataType.FLOAT, shape=dims(x))
        maker = x.producer()
        if unsigned and maker is not None and maker.op_type == "Relu" and not maker.domain:
            zero = at.const(np.uint8(0))
            codes = at.op("QuantizeLinear", x, scale, zero, dtype=zero.dtype, shape=dims(x))
            codes = _clipped(at, codes, 0, top)
        else:
            zero = at.const(ZERO if unsigned else np.int8(0))
            if bits < 8 or not unsigned:  # an int8 holds more codes, -128 among them
                bounds = at.const(static * np.float32(-top)), at.const(static * np.float32(top))
                x = at.op("Clip", x, *bounds, dtype=at.ir.DataType.FLOAT, shape=dims(x))
            codes = at.op("QuantizeLinear", x, scale, zero, dtype=zero.dtype, shape=dims(x))
            if unsigned and bits == 8:
                codes = _clipped(at, codes, 1, 255)  # no -128: the codes are those of every other form
        at.shared[key] = codes, scale, zero
    found: tuple[ir.Value, ir.Value, ir.Value] = at.shared[key]
    return found


def _clipped(at: Build, codes: ir.Value, low: int, high: int) -> ir.Value:
    """The codes, uint8, within bounds; Min and Max of bytes came to ONNX Runtime in 1.24."""
    bounds = at.const(np.uint8(low)), at.const(np.uint8(high))
    return at.op("Clip", codes, *bounds, dtype=codes.dtype, shape=dims(codes))


def _linear(at: Build, site: Site, wanted: Wanted) -> ir.Value:
    """Σ_parts DQ(codes) · DQ(operand · scale · 2^shift) + bias"""
    unsigned = wanted.target.unsigned_codes
    codes, static, point = _codes(at, site, unsigned)
    scale, bits, full, shape = site.array("scale"), site.facts["bits"], at.ir.DataType.FLOAT, dims(site.node.outputs[0])
    found = linear_parts(site.packed, bits)
    terms = []
    for values, factors, shift, columns in found:
        read = codes if len(found) == 1 else at.op("Gather", codes, at.const(columns), axis=-1, dtype=codes.dtype)
        operand = values * factors
        zero = 128 if unsigned and np.abs(operand).max(initial=0) > SAFE else 0
        weight = stored(at, values, factors, zero, int4=wanted.int4 and bits <= 4)
        each = scale * np.float32(2**shift)
        unit = unit_of(each) if wanted.target.one_scale_tensors else each
        weight = _dequantized(at, weight, unit, zero, 1)
        x = at.op("DequantizeLinear", read, static, point, dtype=full, shape=dims(read))
        y = at.op("MatMul", x, weight, dtype=full, shape=shape)
        terms.append(y if (unit == each).all() else at.op("Mul", y, at.const(each / unit), dtype=full, shape=shape))
    bias = _float(at, site.input("bias"))
    if bias is not None:
        terms.append(bias)
    return terms[0] if len(terms) == 1 else at.op("Sum", *terms, dtype=full, shape=shape)


def _is_gemm(site: Site) -> bool:
    """It reads a matrix of codes that a pair made, and its weight is one int8."""
    shape = dims(site.x)
    return read_pair(site) is not None and shape is not None and len(shape) == 2


def _gemm(at: Build, site: Site) -> ir.Value:
    """DQ(codes) · DQ(operand)ᵀ + DQ(bias), which runtimes know as the last layer of a classifier."""
    codes, static, point = _codes(at, site, unsigned=True)
    scale, full, shape = site.array("scale"), at.ir.DataType.FLOAT, dims(site.node.outputs[0])
    found = linear_parts(site.packed, site.facts["bits"])
    wide = np.zeros((scale.size, sum(columns.size for *_, columns in found)), np.int32)
    for values, factors, shift, columns in found:
        wide[:, columns] = (values * factors << shift).T
    operand, factor = narrowed(wide)
    each = scale * factor
    x = at.op("DequantizeLinear", codes, static, point, dtype=full, shape=dims(codes))
    # ONNX Runtime fuses a Gemm only where the zero point of its weight is spelt out
    weight = at.op(
        "DequantizeLinear", at.const(operand), at.const(each), at.const(np.zeros(scale.size, np.int8)), axis=0, dtype=full,
        shape=operand.shape,
    )  # fmt: skip
    bias = _bias_in_units(at, site, each * np.float32(const_of(static)))
    return at.op("Gemm", x, weight, *([] if bias is None else [bias]), transB=1, dtype=full, shape=shape)


def _conv(at: Build, site: Site, unsigned: bool) -> ir.Value:
    if read_pair(site) is not None:
        return _conv_of_codes(at, site)
    codes, static, point = _codes(at, site, unsigned)
    scale, facts, full, shape = site.array("scale"), site.facts, at.ir.DataType.FLOAT, dims(site.node.outputs[0])
    values = conv_codes(site.array("weight"), site.array("exponents"), scale.size, facts["bits"], facts["group"], facts["kernel"])
    x = at.op("DequantizeLinear", codes, static, point, dtype=full, shape=dims(codes))
    attributes = _attributes(site)
    unit = scale * np.float32(const_of(static))
    bias = _conv_bias(at, site, unit) if unsigned else _float(at, site.input("bias"))
    terms: list[ir.Value] = []
    for operand, shift in conv_parts(*values, facts["bits"]):
        zero = 128 if unsigned and np.abs(operand).max(initial=0) > SAFE else 0
        weight = at.const((operand + zero).astype(np.uint8 if zero else np.int8))
        weight = _dequantized(at, weight, scale * np.float32(2**shift), zero, 0)
        terms.append(at.op("Conv", x, weight, *([] if terms or bias is None else [bias]), dtype=full, shape=shape, **attributes))
    return terms[0] if len(terms) == 1 else at.op("Sum", *terms, dtype=full, shape=shape)


def _conv_of_codes(at: Build, site: Site) -> ir.Value:
    """DQ(codes) * DQ(operand) + DQ(bias), the operand one int8."""
    codes, static, point = _codes(at, site, unsigned=True)
    scale, facts, full = site.array("scale"), site.facts, at.ir.DataType.FLOAT
    values, shifts = conv_codes(
        site.array("weight"), site.array("exponents"), scale.size, facts["bits"], facts["group"], facts["kernel"]
    )
    operand, factor = narrowed(values << shifts)
    x = at.op("DequantizeLinear", codes, static, point, dtype=full, shape=dims(codes))
    weight = _dequantized(at, at.const(operand), scale * factor, 0, 0)
    bias = _bias_in_units(at, site, scale * factor * np.float32(const_of(static)))
    given = (x, weight) if bias is None else (x, weight, bias)
    return at.op("Conv", *given, dtype=full, shape=dims(site.node.outputs[0]), **_attributes(site))


def _attributes(site: Site) -> dict[str, Any]:
    names = {"kernel": "kernel_shape", "strides": "strides", "pads": "pads", "dilations": "dilations", "group": "group"}
    return {new: site.facts[old] for old, new in names.items()}


def _conv_bias(at: Build, site: Site, unit: Numbers) -> ir.Value | None:
    """In float; in units of the sums, rounded by at most half of one, where that makes a QLinearConv of it: in front of a Q, with
    a Relu or nothing between."""
    into_codes = site.facts["epilogue"] in ("none", "relu") and _read_as_codes(site.node.outputs[0])
    return _bias_in_units(at, site, unit) if into_codes else _float(at, site.input("bias"))


def _bias_in_units(at: Build, site: Site, unit: Numbers) -> ir.Value | None:
    """The bias as int32 in units of the sums; in float where it does not fit."""
    value = site.input("bias")
    if value is None:
        return None
    bias = site.array("bias")
    units = np.rint(bias.astype(np.float64) / unit)
    if np.abs(units).max(initial=0) >= 2**31:
        return _float(at, value)
    return at.op("DequantizeLinear", at.const(units.astype(np.int32)), at.const(unit), axis=0, dtype=at.ir.DataType.FLOAT)


def _float(at: Build, value: ir.Value | None) -> ir.Value | None:
    """`value` in float32, in which the form computes."""
    return value if value is None or value.dtype == at.ir.DataType.FLOAT else at.op("Cast", value, to=1, dtype=at.ir.DataType.FLOAT)


def _read_as_codes(value: ir.Value) -> bool:
    """Every reader is a quantized layer of 8 bits that is still to be written."""
    readers = list(value.uses())
    return bool(readers) and not value.is_graph_output() and all(
        i == 0 and u.domain == MARKER_DOMAIN and u.op_type in ("shiftquant_linear", "shiftquant_conv2d")
        and u.attributes["activation_bits"].value == 8
        for u, i in readers
    )  # fmt: skip


def _dequantized(at: Build, codes: ir.Value, scale: Numbers, zero: int, axis: int) -> ir.Value:
    points = [at.const(np.full(scale.shape, zero, np.uint8))] if zero else []
    how: dict[str, Any] = {"axis": axis} if scale.ndim else {}
    return at.op("DequantizeLinear", codes, at.const(scale), *points, **how, dtype=at.ir.DataType.FLOAT, shape=dims(codes))
