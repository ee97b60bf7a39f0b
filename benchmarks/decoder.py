"""A decoder of GPT-2 small's shape with a cache of keys and values, in the forms that the decode benchmark compares.

All forms have one interface, so that one binding serves them: `token` int64 [1, 1] and `position` (or what the attention operator
wants instead) in, `logits` [1, 1, vocabulary] out, and for each layer a buffer of keys and one of values [1, heads, room, features]
that are input and output at once. Weights are random: speed does not depend on them, and agreement is measured, not accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from normfuse.benchmark.engine import Call
from normfuse.quant.packing import pack, pack_multipliers
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.spec import ShiftQuant

__all__ = [
    "GPT2_SMALL",
    "Decoder",
    "Shape",
    "Weights",
    "float_model",
    "open_decoder",
    "quantized",
    "random_weights",
    "shiftquant_model",
]

_MICROSOFT, _OURS = "com.microsoft", "normfuse"
_EPS = 1e-5
_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        room: tokens that the buffers hold.
        tied: the head is the token embedding.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    room: int = 256
    tied: bool = True

    @property
    def features(self) -> int:
        return self.width // self.heads


GPT2_SMALL = Shape()
Weights = dict[str, Tensor]


def random_weights(shape: Shape, seed: int = 0) -> Weights:
    """Linear weights as [out, in], of unit gain; norms with lively statistics."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    d, w = shape.width, {}
    w["tokens"] = normal(shape.vocabulary, d, std=d**-0.5)
    w["positions"] = normal(shape.room, d, std=d**-0.5)
    for i in range(shape.layers):
        for name, out, inputs in (("qkv", 3 * d, d), ("out", d, d), ("up", 4 * d, d), ("down", d, 4 * d)):
            w[f"{i}.{name}"] = normal(out, inputs, std=inputs**-0.5)
            w[f"{i}.{name}.bias"] = normal(out, std=0.05)
        for name in ("norm1", "norm2"):
            w[f"{i}.{name}"] = 1 + normal(d, std=0.2)
            w[f"{i}.{name}.shift"] = normal(d, std=0.1)
    w["norm"] = 1 + normal(d, std=0.2)
    w["norm.shift"] = normal(d, std=0.1)
    w["head"] = w["tokens"] if shape.tied else normal(shape.vocabulary, d, std=d**-0.5)
    return w


# -- references in PyTorch ----------------------------------------------------------------------------------------------------


@dataclass
class Decoder:
    """One token at a time, in PyTorch; `linear(name, x, gelu)` and `normed(name, x)` are the layers.

    The float model has `normed` give floats; the quantized one gives (codes, scales), which its `linear` takes.
    """

    shape: Shape
    weights: Weights
    normed: Callable[[str, Tensor], Any]
    linear: Callable[[str, Any, str], Any]

    def __post_init__(self) -> None:
        s = self.shape
        self.keys = [torch.zeros(s.heads, s.room, s.features) for _ in range(s.layers)]
        self.values = [torch.zeros(s.heads, s.room, s.features) for _ in range(s.layers)]

    @classmethod
    def of(cls, shape: Shape, w: Weights) -> "Decoder":
        def normed(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, (shape.width,), w[name], w[f"{name}.shift"], _EPS)

        def linear(name: str, x: Tensor, epilogue: str) -> Tensor:
            y = F.linear(x, w[name], w.get(f"{name}.bias"))
            return F.gelu(y, approximate="tanh") if epilogue else y

        return cls(shape, w, normed, linear)

    def step(self, token: int, position: int) -> Tensor:
        """Logits [vocabulary] after `token` at `position`."""
        s = self.shape
        x = (self.weights["tokens"][token] + self.weights["positions"][position]).reshape(1, 1, s.width)
        for i in range(s.layers):
            qkv = self.linear(f"{i}.qkv", self.normed(f"{i}.norm1", x), "").reshape(3, s.heads, s.features)
            self.keys[i][:, position], self.values[i][:, position] = qkv[1], qkv[2]
            past = slice(0, position + 1)
            y = F.scaled_dot_product_attention(qkv[0][:, None], self.keys[i][:, past], self.values[i][:, past])
            x = x + self.linear(f"{i}.out", y.reshape(1, 1, s.width), "")
            x = x + self.linear(f"{i}.down", self.linear(f"{i}.up", self.normed(f"{i}.norm2", x), "gelu_tanh"), "")
        return torch.as_tensor(self.linear("head", self.normed("norm", x), "")).reshape(-1)


def _linears(shape: Shape) -> list[str]:
    return [f"{i}.{name}" for i in range(shape.layers) for name in ("qkv", "out", "up", "down")] + ["head"]


@dataclass(frozen=True)
class Packed:
    """A linear layer as the operators take it."""

    weight: Tensor
    exponents: Tensor
    scale: Tensor
    bias: Tensor | None
    bits: int
    multipliers: Tensor | None = None


def quantized(shape: Shape, w: Weights, spec: ShiftQuant) -> dict[str, Packed]:
    """All linear layers; the gain and shift of a norm in front are in them."""
    found = {}
    for name in _linears(shape):
        norm = {"qkv": "norm1", "up": "norm2"}.get(name.rpartition(".")[2])
        norm = "norm" if name == "head" else norm and f"{name.partition('.')[0]}.{norm}"
        weight, bias = w[name], w.get(f"{name}.bias")
        if norm is not None:
            moved = weight @ w[f"{norm}.shift"]
            weight, bias = weight * w[norm], moved if bias is None else bias + moved
        q = quantize_weight(weight, spec)
        blocks = None if q.multipliers is None else pack_multipliers(q.multipliers)
        found[name] = Packed(pack(q), q.exponents, q.scale, bias, q.bits, blocks)
    return found


def reference(shape: Shape, w: Weights, layers: dict[str, Packed]) -> Decoder:
    """The quantized decoder by the definitions of the operators, in PyTorch."""
    from normfuse.ops import norm_quantize, shiftquant_linear, shiftquant_matmul, shiftquant_matmul_quantize

    def normed(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        q, scale, _ = norm_quantize(x, None, None, None, "layer", _EPS, 1.0, 8)
        return q, scale

    def linear(name: str, x: Any, epilogue: str) -> Any:
        p = layers[name]
        if isinstance(x, Tensor):
            return shiftquant_linear(x, p.weight, p.exponents, p.scale, p.bias, None, p.bits, 8, multipliers=p.multipliers)
        q, scale = x
        if epilogue:
            return shiftquant_matmul_quantize(
                q, scale, p.weight, p.exponents, p.scale, p.bias, None, p.bits, epilogue, 8, p.multipliers
            )
        return shiftquant_matmul(q, scale, p.weight, p.exponents, p.scale, p.bias, None, p.bits, "none", p.multipliers)

    return Decoder(shape, w, normed, linear)


# -- graphs -------------------------------------------------------------------------------------------------------------------


class _Graph:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.count = 0

    def constant(self, name: str, value: Tensor) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(value.detach().contiguous().numpy(), name)
        return name

    def node(self, op: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **attributes: Any) -> Any:
        if isinstance(outputs, int):
            outputs = [f"v{self.count + i}" for i in range(outputs)]
            self.count += len(outputs)
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    def embedded(self, w: Weights) -> str:
        tokens = self.node("Gather", [self.constant("tokens", w["tokens"]), "token"])
        positions = self.node("Gather", [self.constant("positions", w["positions"]), "position"])
        return str(self.node("Add", [tokens, positions]))

    def model(self, scalars: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        s = self.shape
        cache = [1, s.heads, s.room, s.features]
        names = [f"{kind}_{i}" for i in range(s.layers) for kind in ("key", "value")]
        inputs = [helper.make_tensor_value_info("token", TensorProto.INT64, [1, 1]), *scalars]
        inputs += [helper.make_tensor_value_info(f"past_{n}", TensorProto.FLOAT, cache) for n in names]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, s.vocabulary])]
        outputs += [helper.make_tensor_value_info(f"present_{n}", TensorProto.FLOAT, cache) for n in names]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MICROSOFT, 1), helper.make_opsetid(_OURS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _cache(i: int, end: str) -> list[str]:
    return [f"{end}_key_{i}", f"{end}_value_{i}"]


def float_model(shape: Shape, w: Weights) -> onnx.ModelProto:
    """fp32 with com.microsoft's GroupQueryAttention: what the quantizers of ONNX Runtime start from."""
    g = _Graph(shape)
    x = g.embedded(w)

    def normed(name: str, x: str) -> str:
        gain, shift = g.constant(name, w[name]), g.constant(f"{name}.shift", w[f"{name}.shift"])
        return str(g.node("LayerNormalization", [x, gain, shift], axis=-1, epsilon=_EPS))

    def linear(name: str, x: str, outputs: int | list[str] = 1) -> str:
        bias = w.get(f"{name}.bias")
        y = g.node("MatMul", [x, g.constant(f"{name}.weight", w[name].T)], outputs if bias is None else 1)
        return str(y if bias is None else g.node("Add", [y, g.constant(f"{name}.bias", bias)], outputs))

    for i in range(shape.layers):
        y = linear(f"{i}.qkv", normed(f"{i}.norm1", x))
        y = g.node(
            "GroupQueryAttention", [y, "", "", *_cache(i, "past"), "position32", "total"], [f"attended_{i}", *_cache(i, "present")],
            _MICROSOFT, num_heads=shape.heads, kv_num_heads=shape.heads, do_rotary=0,
        )[0]  # fmt: skip
        x = g.node("Add", [x, linear(f"{i}.out", y)])
        y = g.node("Gelu", [linear(f"{i}.up", normed(f"{i}.norm2", x))], approximate="tanh")
        x = g.node("Add", [x, linear(f"{i}.down", y)])
    linear("head", normed("norm", x), ["logits"])
    scalars = [("position", TensorProto.INT64, [1]), ("position32", TensorProto.INT32, [1]), ("total", TensorProto.INT32, [])]
    return g.model([helper.make_tensor_value_info(*scalar) for scalar in scalars])


def shiftquant_model(shape: Shape, w: Weights, layers: dict[str, Packed]) -> onnx.ModelProto:
    """The quantized layers as operators of normfuse's library: norms give integers, products add the residual."""
    g = _Graph(shape)
    x = g.embedded(w)

    def product(op: str, name: str, inputs: list[str], outputs: int | list[str] = 1, residual: str = "", **attributes: Any) -> Any:
        p = layers[name]
        parts = {"weight": p.weight, "exponents": p.exponents, "scale": p.scale, "folded": p.bias}
        given = ["" if v is None else g.constant(f"{name}.{k}", v) for k, v in parts.items()]
        if residual or (p.multipliers is not None and op != "ShiftQuantMatMulQuantize"):
            given.append(residual)
        if p.multipliers is not None:
            given.append(g.constant(f"{name}.multipliers", p.multipliers))
        return g.node(op, [*inputs, *given], outputs, _OURS, bits=p.bits, **attributes)

    def normed(x: str) -> list[str]:
        return list(g.node("NormQuantize", [x], 2, _OURS, kind="layer", eps=_EPS, bits=8))

    for i in range(shape.layers):
        qkv = product("ShiftQuantMatMul", f"{i}.qkv", normed(x))
        y = g.node(
            "CachedAttention", [qkv, qkv, qkv, *_cache(i, "past"), "mask"], [f"attended_{i}", *_cache(i, "present")],
            _OURS, scale=shape.features**-0.5, packed=1,
        )[0]  # fmt: skip
        x = product("ShiftQuantLinear", f"{i}.out", [y], residual=x, activation_bits=8)
        up = product("ShiftQuantMatMulQuantize", f"{i}.up", normed(x), 2, epilogue="gelu_tanh", out_bits=8)
        x = product("ShiftQuantMatMul", f"{i}.down", up, residual=x)
    product("ShiftQuantMatMul", "head", normed(x), ["logits"])
    scalars: list[tuple[str, list[int | str | None]]] = [("position", [1]), ("mask", [1, "slots"])]
    return g.model([helper.make_tensor_value_info(name, TensorProto.INT64, size) for name, size in scalars])


# -- running ------------------------------------------------------------------------------------------------------------------


class Session:
    """A file of one of the forms above in ONNX Runtime, everything bound to buffers of ours, past and present to the same ones."""

    def __init__(self, path: Path, shape: Shape, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        domains = {node.domain for node in onnx.load(str(path), load_external_data=False).graph.node}
        if _OURS in domains:
            from normfuse import native

            options.register_custom_ops_library(str(native.path()))
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.scalars: dict[str, Any] = {}
        self.caches: dict[str, Any] = {}
        self.masked = "mask" in [given.name for given in self.session.get_inputs()]
        for given in self.session.get_inputs():
            if given.name == "mask":  # as long as the text so far
                continue
            value = ort.OrtValue.ortvalue_from_shape_and_type(tuple(given.shape), _DTYPES[given.type])
            self.binding.bind_ortvalue_input(given.name, value)
            if given.name.startswith("past_"):
                value.update_inplace(np.zeros(value.shape(), np.float32))
                self.caches[given.name] = value
                self.binding.bind_ortvalue_output(given.name.replace("past_", "present_"), value)
            else:
                self.scalars[given.name] = value
        self.logits = ort.OrtValue.ortvalue_from_shape_and_type((1, 1, shape.vocabulary), np.float32)
        self.binding.bind_ortvalue_output("logits", self.logits)

    def at(self, token: int, position: int) -> None:
        values = {"token": token, "position": position, "position32": position, "total": position + 1}
        for name, value in self.scalars.items():
            value.update_inplace(np.full(value.shape(), values[name], value.numpy().dtype))
        if self.masked:
            self.mask = np.ones((1, position + 1), np.int64)
            self.binding.bind_cpu_input("mask", self.mask)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def step(self, token: int, position: int) -> Tensor:
        """Logits [vocabulary] after `token` at `position`."""
        self.at(token, position)
        self.run()
        return torch.from_numpy(self.logits.numpy().copy()).reshape(-1)


def open_decoder(path: str, shape: Shape, past: int, threads: int) -> Call:
    """A call that decodes one token behind `past` others."""
    session = Session(Path(path), shape, threads)
    generator = np.random.default_rng(0)
    for value in session.caches.values():
        value.update_inplace(generator.standard_normal(value.shape(), np.float32))
    session.at(7, past)
    return session.run
