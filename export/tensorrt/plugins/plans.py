"""Which kernel stands for a node, and what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.build import const_of, dims
from normfuse.export.ops import DOMAIN, OP_OF
from normfuse.export.tensorrt.builder import module_path
from normfuse.extras import need
from normfuse.gpu.blocks import FEW_ROWS
from normfuse.gpu.launch import Launch
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.planes import from_packed
from normfuse.gpu.product import plan_product
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.softmax import plan_softmax

__all__ = ["PLANS", "PLUGINS", "Planned", "Site"]

_UNKNOWN_ROWS = 128  # where an axis has no known size: blocks for more rows than a token, that lose little on many


@dataclass(frozen=True)
class Planned:
    """What a plugin node launches.

    Attributes:
        op_type: of the node.
        launch: of the kernel.
        few: the same kernel for up to `FEW_ROWS` rows, where their number varies; the same results.
        operands: by the names of the kernel's inputs: values of the graph, arrays, or the number of an output of `before`.
        before: a node in front of it.
    """

    op_type: str
    launch: Launch
    operands: Mapping[str, Any]
    before: Planned | None = None
    few: Launch | None = None


@dataclass(frozen=True)
class Site:
    """A node that a plugin is to take.

    Attributes:
        node: of an `onnx_ir` graph.
        dtype: of floats whose type the file does not say: "fp32", "fp16" or "bf16".
        sizes: typical size of a named axis, for the choice of a tile.
        arrays: weights in the layout of kernels, by the value that they were made of, since layers may share one.
    """

    node: Any
    dtype: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    arrays: dict[Any, dict[str, np.ndarray[Any, Any]]] = field(default_factory=dict)

    def inputs(self, count: int) -> tuple[Any, ...]:
        """The first `count` inputs, None for one that is missing."""
        return (*self.node.inputs, *[None] * count)[:count]

    def fact(self, name: str, default: Any = 0) -> Any:
        """An attribute."""
        found = self.node.attributes.get(name)
        value = default if found is None else found.value
        return value.decode() if isinstance(value, bytes) else value

    def float_of(self, value: Any) -> str:
        """Triton's name of the type of `value`."""
        ir = need("onnx_ir", extra="onnx")
        names = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16", None: self.dtype}
        if value.dtype not in names:
            raise self.refusal(f"its input {value.name} is {value.dtype.name.lower()}", "export with dtype fp32, fp16 or bf16")
        return names[value.dtype]

    def features(self, value: Any) -> int:
        """Size of the last axis.

        Raises:
            ExportError: it is not known, and a kernel is compiled for one size.
        """
        shape = dims(value)
        if not shape:
            raise self.refusal(f"nothing is known of the shape of its input {value.name}", "run ONNX's shape inference first")
        if not isinstance(shape[-1], int):
            raise self.refusal(
                f"the last axis of its input {value.name} is {shape[-1] or 'unknown'}, and kernels are compiled for one size",
                "make that axis static",
            )
        return shape[-1]

    def rows(self, value: Any) -> int:
        """A typical number of rows."""
        sizes = [d if isinstance(d, int) else self.sizes.get(str(d)) for d in (dims(value) or ())[:-1]]
        known = math.prod(size for size in sizes if size is not None)
        return max(_UNKNOWN_ROWS if None in sizes else 1, known)

    def launches(self, value: Any, plan: Callable[[int], Launch]) -> tuple[Launch, Launch | None]:
        """Launches for many rows and, where their number varies, for few: a layer may see a prompt first and then token by token.

        Args:
            plan: makes a launch for about as many rows.
        """
        rows, static = self.rows(value), all(isinstance(d, int) for d in (dims(value) or ("?", 0))[:-1])
        if static:
            return plan(rows), None
        many, few = plan(max(rows, _UNKNOWN_ROWS)), plan(FEW_ROWS)
        return many, None if few == many else few

    def array(self, value: Any, what: str) -> np.ndarray[Any, Any]:
        """The numbers of a weight."""
        found = const_of(value)
        if found is None:
            raise self.refusal(f"its {what} is computed in the graph", "bake weights into constants before exporting")
        return np.asarray(found)

    def refusal(self, found: str, remedy: str) -> ExportError:
        name = self.node.name or "?"
        return ExportError(
            f"no plugin for {self.node.op_type} in {module_path(name) or 'the model itself'} (node {name}): {found}; {remedy}, or "
            f"leave {next(p for p, ops in PLUGINS.items() if self.node.op_type in ops)} out of plugins"
        )

    def plan(self) -> Planned:
        """The launch.

        Raises:
            ExportError: no kernel is made for such a node; the message names its module and says what to do.
        """
        try:
            return PLANS[self.node.domain, self.node.op_type](self)
        except UsageError as e:  # of a planning function, which knows nothing of graphs
            raise self.refusal(str(e), "use another setting") from e


def _norm(kind: str) -> Callable[[Site], Planned]:
    def plan(site: Site) -> Planned:
        x, gain, *shift, residual = site.inputs(4 if kind == "l1" else 3)
        return _normalized(site, kind, {"x": x, "residual": residual, "gain": gain, "shift": shift[0] if shift else None})

    return plan


def _normalized(site: Site, kind: str, values: dict[str, Any], eps: str = "eps") -> Planned:
    there = {name: value for name, value in values.items() if value is not None}
    launch = plan_norm(
        kind,
        site.features(there["x"]),
        site.float_of(there["x"]),
        gain=site.float_of(there["gain"]) if "gain" in there else None,
        shift=site.float_of(there["shift"]) if "shift" in there else None,
        residual="residual" in there,
        eps=float(site.fact(eps)),
        scale_const=float(site.fact("scale_const", 1.0)),
    )
    return Planned(OP_OF[f"{kind}_norm"].name, launch, there)


def _standard_rms(site: Site) -> Planned:
    """ONNX's own op, which has no residual."""
    x, gain = site.inputs(2)
    if site.fact("axis", -1) not in (-1, len(dims(x) or ()) - 1):
        raise site.refusal(f"it normalizes from axis {site.fact('axis')} on", "normalize over the last axis")
    return _normalized(site, "rms", {"x": x, "gain": gain}, eps="epsilon")


def _norm_linear(site: Site) -> Planned:
    """y = act((W x) / ρ + b)"""
    x, weight, bias = site.inputs(3)
    launch, few = site.launches(
        x,
        lambda rows: plan_norm_linear(
            "rms",
            site.features(x),
            _outputs(site, weight),
            site.float_of(x),
            bias=bias is not None,
            eps=float(site.fact("eps")),
            epilogue=site.fact("epilogue", "none"),
            rows_hint=rows,
        ),
    )
    return Planned("RmsNormLinear", launch, {"x": x, "weight": weight, "bias": bias}, few=few)


def _outputs(site: Site, weight: Any) -> int:
    shape = dims(weight) or (None,)
    if not isinstance(shape[0], int):
        raise site.refusal(f"its weight {weight.name} has no static shape", "export with static weights")
    return shape[0]


def _softmax(site: Site) -> Planned:
    (x,) = site.inputs(1)
    return Planned("TwoPassSoftmax", plan_softmax(site.features(x), site.float_of(x)), {"x": x})


def _rows(site: Site) -> Planned:
    (x,) = site.inputs(1)
    launch = plan_rows(site.features(x), site.float_of(x), int(site.fact("bits")), static=None)
    return Planned("QuantizeRows", launch, {"x": x})


def _quantized_linear(site: Site) -> Planned:
    """Two launches: the rows are quantized once, and read by every block of outputs."""
    x, *rest = site.inputs(7)
    static = float(site.fact("input_scale", 0.0))
    rows = plan_rows(site.features(x), site.float_of(x), int(site.fact("activation_bits")), static=static or None)
    first = Planned("QuantizeRows", rows, {"x": x})
    return _product(site, x, {"q": 0, "row_scale": 1}, rest, first)


def _matmul(site: Site) -> Planned:
    q, row_scale, *rest = site.inputs(8)
    if not dims(row_scale):
        raise site.refusal("one scale serves all rows", "quantize with activations='dynamic'")
    return _product(site, q, {"q": q, "row_scale": row_scale}, rest, None)


def _product(site: Site, x: Any, codes: Mapping[str, Any], rest: list[Any], before: Planned | None) -> Planned:
    """y = act(s[m] · scale[n] · Σ_k q[m, k] · (C[n, k] << (E − e[k])) + bias[n]) + residual"""
    weight, exponents, scale, bias, residual, multipliers = rest
    if multipliers is not None:
        raise site.refusal("its weight has blocks, which the kernel does not know", "quantize with block=0")
    bits, n = int(site.fact("bits")), site.array(scale, "scale").size
    e = site.array(exponents, "exponents")
    launch, few = site.launches(
        x,
        lambda rows: plan_product(
            e.size,
            n,
            site.float_of(site.node.outputs[0]),
            bits,
            int(e.max(initial=0)) + 1,
            bias=bias is not None,
            residual=residual is not None,
            epilogue=site.fact("epilogue", "none"),
            rows_hint=rows,
        ),
    )
    key = (weight, exponents)
    if key not in site.arrays:
        found = from_packed(site.array(weight, "weight"), e, n, bits)
        # as int8: TensorRT makes int32 of uint8 weights, and kernels read bytes
        site.arrays[key] = {name: a.view(np.int8) for name, a in zip(("planes", "shifts"), found, strict=True)}
    operands = {**codes, **site.arrays[key], "scale": scale, "bias": bias, "residual": residual}
    return Planned("ShiftQuantMatMul", launch, operands, before, few)


_STATED: dict[str, dict[tuple[str, str], Callable[[Site], Planned]]] = {
    "rms_norm": {(DOMAIN, "RmsNorm"): _norm("rms"), ("", "RMSNormalization"): _standard_rms},
    "crms_norm": {(DOMAIN, "CrmsNorm"): _norm("crms")},
    "l1_norm": {(DOMAIN, "L1Norm"): _norm("l1")},
    "rms_norm_linear": {(DOMAIN, "RmsNormLinear"): _norm_linear},
    "shiftquant_linear": {
        (DOMAIN, "ShiftQuantLinear"): _quantized_linear,
        (DOMAIN, "QuantizeRows"): _rows,
        (DOMAIN, "ShiftQuantMatMul"): _matmul,
    },
    "two_pass_softmax": {(DOMAIN, "TwoPassSoftmax"): _softmax},
}

#: By what a user names: the op types that it stands for, those of `DOMAIN` first.
PLUGINS = {name: tuple(op for _, op in plans) for name, plans in _STATED.items()}

#: By domain and op type.
PLANS = {key: plan for plans in _STATED.values() for key, plan in plans.items()}
