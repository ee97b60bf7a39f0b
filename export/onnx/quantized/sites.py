"""What stands in a translated graph for operators of `torch.ops.normfuse`, and which op of `normfuse.export.ops` each is."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from normfuse.errors import ExportError
from normfuse.export.onnx.build import const_of, dims
from normfuse.export.onnx.quantized.translate import NAMES
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN
from normfuse.export.ops import OPS, Op

__all__ = ["Site", "sites"]


@dataclass(frozen=True)
class Site:
    """One node.

    Attributes:
        node: the marker.
        op: what it is.
        inputs: in the order of `op.inputs`, None where one is missing.
        facts: attributes of `op`, and its `structure`.
    """

    node: Any
    op: Op
    inputs: tuple[Any, ...]
    facts: dict[str, Any]

    @property
    def layer(self) -> str:
        """Where in the module tree it stands; the name of the node if that is not known."""
        names = ast.literal_eval(self.node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        return next((n for n in reversed(names[:-1]) if n), None) or self.node.name or self.op.name

    @property
    def static(self) -> bool:
        """Activations have a scale that is fixed."""
        return bool(self.facts.get("input_scale"))

    @property
    def count(self) -> int:
        """Outputs that mean something: without a residual the sum of `NormQuantize` is empty in torch."""
        return 2 if self.op.name == "NormQuantize" and self.input("residual") is None else len(self.node.outputs)

    @property
    def has_weight(self) -> bool:
        """A linear or a convolution that reads floats."""
        return self.op.name in ("ShiftQuantLinear", "ShiftQuantConv2d")

    def input(self, name: str) -> Any:
        """The input of that name."""
        names = [n.removesuffix("?") for n in self.op.inputs]
        return self.inputs[names.index(name)]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The input of that name as numbers.

        Raises:
            ExportError: it is computed when the model runs.
        """
        found = const_of(self.input(name))
        if found is None:
            raise ExportError(f"{self.layer}: {name} of {self.op.name} is no constant; quantized weights must be")
        return np.asarray(found)


def sites(model: Any) -> Iterator[Site]:
    """Every marker of the graph, in its order; nodes may be added and removed between two of them."""
    for node in list(model.graph):
        if node.domain == MARKER_DOMAIN and node.op_type in NAMES:
            yield _READ[node.op_type](node)


def _tensors(node: Any, count: int) -> tuple[Any, ...]:
    return (*node.inputs, *[None] * count)[:count]


def _attributes(node: Any) -> dict[str, Any]:
    return {k: list(a.value) if isinstance(a.value, (list, tuple)) else a.value for k, a in node.attributes.items()}


def _groups(exponents: Any) -> int:
    found = const_of(exponents)
    if found is None:
        raise ExportError("the exponents of a quantized weight are no constant")
    return int(found.max(initial=0)) + 1


def _static(scale: Any) -> float:
    if scale is None:
        return 0.0
    found = const_of(scale)
    if found is None or found.size != 1:
        raise ExportError("the static scale of an activation is not one constant number")
    return float(found.reshape(-1)[0])


def _linear(node: Any) -> Site:
    x, weight, exponents, scale, bias, static = _tensors(node, 6)
    facts = _attributes(node) | {"input_scale": _static(static), "groups": _groups(exponents)}
    return Site(node, OPS["ShiftQuantLinear"], (x, weight, exponents, scale, bias, None), facts)


def _conv2d(node: Any) -> Site:
    x, weight, exponents, scale, bias, static = _tensors(node, 6)
    given = _attributes(node)
    pads = given["padding"] * 2 if len(given["padding"]) == 2 else given["padding"]
    facts = {k: given[k] for k in ("bits", "activation_bits", "kernel", "epilogue")} | {
        "strides": given["stride"],
        "pads": pads,
        "dilations": given["dilation"],
        "group": given["groups"],
        "input_scale": _static(static),
        "groups": _groups(exponents),
    }
    return Site(node, OPS["ShiftQuantConv2d"], (x, weight, exponents, scale, bias), facts)


def _embedding(node: Any) -> Site:
    return Site(node, OPS["ShiftQuantEmbedding"], _tensors(node, 3), _attributes(node))


def _rows(node: Any) -> Site:
    return Site(node, OPS["QuantizeRows"], _tensors(node, 1), _attributes(node))


def _norm_quantize(node: Any) -> Site:
    x, residual, gain, shift = _tensors(node, 4)
    return Site(node, OPS["NormQuantize"], (x, gain, shift, residual), _attributes(node))


def _matmul(node: Any) -> Site:
    inputs = _tensors(node, 7)
    return Site(node, OPS["ShiftQuantMatMul"], inputs, _attributes(node) | {"groups": _groups(inputs[3])})


def _matmul_quantize(node: Any) -> Site:
    inputs = _tensors(node, 7)
    if inputs[6] is not None:
        raise ExportError("shiftquant_matmul_quantize with a residual has no form in ONNX")
    return Site(node, OPS["ShiftQuantMatMulQuantize"], inputs[:6], _attributes(node) | {"groups": _groups(inputs[3])})


def _norm(name: str) -> Callable[[Any], Site]:
    def read(node: Any) -> Site:
        op = OPS[name]
        return Site(node, op, (*_tensors(node, len(op.inputs) - 1), None), _attributes(node))

    return read


def _added_norm(name: str) -> Callable[[Any], Site]:
    def read(node: Any) -> Site:
        x, residual, gain = _tensors(node, 3)
        return Site(node, OPS[name], (x, gain, residual), _attributes(node))

    return read


def _norm_linear(node: Any) -> Site:
    return Site(node, OPS["RmsNormLinear"], _tensors(node, 3), _attributes(node))


def _softmax(node: Any) -> Site:
    return Site(node, OPS["TwoPassSoftmax"], _tensors(node, 1), {})


def _attention(node: Any) -> Site:
    """Heads first, as torch has them."""
    q, k = (dims(v) for v in node.inputs[:2])
    if q is None or k is None or not (isinstance(q[1], int) and isinstance(k[1], int)):
        raise ExportError(f"{node.name}: the numbers of heads of {node.op_type} are not known")
    given = _attributes(node)
    facts = {"scale": given["scale"], "causal": given["causal"], "heads": q[1], "kv_heads": k[1], "layout": "bhtd"}
    return Site(node, OPS["Attention"], _tensors(node, 4), facts | {"bits": given.get("bits", 0)})


_READ: dict[str, Callable[[Any], Site]] = {
    "add_crms_norm": _added_norm("CrmsNorm"),
    "add_rms_norm": _added_norm("RmsNorm"),
    "attention": _attention,
    "crms_norm": _norm("CrmsNorm"),
    "l1_norm": _norm("L1Norm"),
    "norm_quantize": _norm_quantize,
    "quantize_rows": _rows,
    "rms_norm": _norm("RmsNorm"),
    "rms_norm_linear": _norm_linear,
    "shiftquant_attention": _attention,
    "shiftquant_conv2d": _conv2d,
    "shiftquant_embedding": _embedding,
    "shiftquant_linear": _linear,
    "shiftquant_matmul": _matmul,
    "shiftquant_matmul_quantize": _matmul_quantize,
    "two_pass_softmax": _softmax,
}
