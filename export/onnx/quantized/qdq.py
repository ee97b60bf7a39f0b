"""The QDQ form: QuantizeLinear and DequantizeLinear with constant scales around float products, for runtimes that fuse them.

    Q → DQ → MatMul(·, DQ(weight)) → Sum(·, bias)      ONNX Runtime: MatMulIntegerToFloat, bit for bit the integer product
    Q → DQ → Conv(·, DQ(weight), DQ(bias)) → Q → DQ    ONNX Runtime: QLinearConv

Sum and not Add: ONNX Runtime makes MatMul and Add a Gemm before it looks for quantization, and then finds none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.build import Build
from normfuse.export.onnx.quantized.integer import expand, take_over
from normfuse.export.onnx.quantized.sites import Site, sites
from normfuse.export.onnx.translate import MARKER_DOMAIN
from normfuse.export.ops.products import activated
from normfuse.export.ops.shiftquant_conv2d import conv_codes, conv_parts
from normfuse.export.ops.weights import SAFE, parts, stored

__all__ = ["check_static", "lower_qdq"]


def check_static(model: Any) -> None:
    """The QDQ form can express every layer.

    Raises:
        UsageError: the scale of an activation is found where the model runs.
    """
    layers = [s for s in sites(model) if s.has_weight or s.op.name in ("QuantizeRows", "NormQuantize")]
    dynamic = [s for s in layers if not s.static]
    if dynamic:
        raise UsageError(
            f"form='qdq' needs static scales, and {len(dynamic)} of {len(layers)} quantized layers find theirs at run time: "
            "quantize with ShiftQuant(activations='static') and calibration data, or use form='integer'"
        )


def lower_qdq(model: Any, *, unsigned: bool, int4: bool = False) -> int:
    """Write every marker with QuantizeLinear and DequantizeLinear, in place; returns their number.

    Args:
        model: the translated model.
        unsigned: weights with codes beyond `SAFE` as uint8 with zero point 128, which ONNX Runtime multiplies exactly on every
            CPU; else as int8 with zero point 0, which other runtimes expect.
        int4: weights of up to 4 bits as INT4 in the file, expanded by the runtime when it loads.
    """
    shared: dict[Any, Any] = {}
    count = 0
    for site in sites(model):
        if not site.has_weight:
            expand(model, site, shared)
        else:
            at = Build(model, site.node, shared)
            y = _linear(at, site, unsigned, int4) if site.op.name == "ShiftQuantLinear" else _conv(at, site, unsigned)
            y = activated(at, y, site.facts["epilogue"])
            old = site.node.outputs[0]
            take_over(old, at.op("Cast", y, to=int(old.dtype)) if old.dtype != at.ir.DataType.FLOAT else y)
            model.graph.remove(site.node, safe=True)
        count += 1
    return count


def _codes(at: Build, site: Site) -> tuple[Any, Any]:
    """x as int8 codes, and its scale; what reads the same x shares them."""
    x, static, bits = site.inputs[0], np.float32(site.facts["input_scale"]), site.facts["activation_bits"]
    if x.dtype == at.ir.DataType.DOUBLE:
        raise ExportError("form='qdq' computes in float32, and the model in float64; export it in float32 or with form='integer'")
    key = ("codes", id(x), float(static), bits)
    if key not in at.shared:
        scale, top = at.const(static), 2 ** (bits - 1) - 1
        if x.dtype != at.ir.DataType.FLOAT:
            x = at.op("Cast", x, to=1)
        if bits < 8:  # an int8 would hold more codes
            x = at.op("Clip", x, at.const(static * np.float32(-top)), at.const(static * np.float32(top)))
        at.shared[key] = at.op("QuantizeLinear", x, scale, at.const(np.int8(0))), scale
    found: tuple[Any, Any] = at.shared[key]
    return found


def _linear(at: Build, site: Site, unsigned: bool, int4: bool) -> Any:
    """Σ_parts DQ(codes) · DQ(operand · scale · 2^shift) + bias"""
    codes, static = _codes(at, site)
    scale, bits = site.array("scale"), site.facts["bits"]
    found = parts(site.array("weight"), site.array("exponents"), scale.size, bits)
    terms = []
    for values, factors, shift, columns in found:
        read = codes if len(found) == 1 else at.op("Gather", codes, at.const(columns), axis=-1)
        operand = values << factors
        zero = 128 if unsigned and np.abs(operand).max(initial=0) > SAFE else 0
        weight = stored(at, values, factors, zero, int4=int4 and bits <= 4)
        weight = _dequantized(at, weight, scale * np.float32(2**shift), zero, 1)
        terms.append(at.op("MatMul", at.op("DequantizeLinear", read, static, at.const(np.int8(0))), weight))
    if site.input("bias") is not None:
        terms.append(site.input("bias"))
    return terms[0] if len(terms) == 1 else at.op("Sum", *terms)


def _conv(at: Build, site: Site, unsigned: bool) -> Any:
    codes, static = _codes(at, site)
    scale, facts = site.array("scale"), site.facts
    values = conv_codes(site.array("weight"), site.array("exponents"), scale.size, facts["bits"], facts["group"], facts["kernel"])
    x = at.op("DequantizeLinear", codes, static, at.const(np.int8(0)))
    names = {"kernel": "kernel_shape", "strides": "strides", "pads": "pads", "dilations": "dilations", "group": "group"}
    attributes = {new: facts[old] for old, new in names.items()}
    bias = _conv_bias(at, site, scale * np.float32(facts["input_scale"]))
    terms: list[Any] = []
    for operand, shift in conv_parts(*values, facts["bits"]):
        zero = 128 if unsigned and np.abs(operand).max(initial=0) > SAFE else 0
        weight = at.const((operand + zero).astype(np.uint8 if zero else np.int8))
        weight = _dequantized(at, weight, scale * np.float32(2**shift), zero, 0)
        terms.append(at.op("Conv", x, weight, *([] if terms or bias is None else [bias]), **attributes))
    return terms[0] if len(terms) == 1 else at.op("Sum", *terms)


def _conv_bias(at: Build, site: Site, unit: np.ndarray[Any, Any]) -> Any:
    """In float; in units of the sums, rounded by at most half of one, where that makes a QLinearConv of it: in front of a Q."""
    value = site.input("bias")
    if value is None or site.facts["epilogue"] != "none" or not _read_as_codes(site.node.outputs[0]):
        return value
    bias = site.array("bias")
    units = np.rint(bias.astype(np.float64) / unit)
    if np.abs(units).max(initial=0) >= 2**31:
        return value
    return at.op("DequantizeLinear", at.const(units.astype(np.int32)), at.const(unit), axis=0)


def _read_as_codes(value: Any) -> bool:
    """Every reader is a quantized layer of 8 bits that is still to be written."""
    readers = list(value.uses())
    return bool(readers) and not value.is_graph_output() and all(
        i == 0 and u.domain == MARKER_DOMAIN and u.op_type in ("shiftquant_linear", "shiftquant_conv2d")
        and u.attributes["activation_bits"].value == 8
        for u, i in readers
    )  # fmt: skip


def _dequantized(at: Build, codes: Any, scale: np.ndarray[Any, Any], zero: int, axis: int) -> Any:
    points = [at.const(np.full(scale.size, zero, np.uint8))] if zero else []
    return at.op("DequantizeLinear", codes, at.const(scale), *points, axis=axis)
