"""Weights in blocks of one scale: `MatMulNBits` of ONNX Runtime, which stock runtimes have fast kernels for.

A block is 32 weights along the contraction, stored as integers q; the weight is s (q − z), with z the middle or, of 4 bits, any
code. The scale of a block is
searched: the largest weight may be cut where the others gain more by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.export.onnx.build import Build, const_of

__all__ = ["BLOCK", "Blocks", "Stored", "block_weights", "parse_blocks", "to_blocks"]

BLOCK = 32
_LEVEL = 4  # products in int8: without it the runtime expands the weights to floats each time
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_AT_ONCE = 2**22  # weights that are searched together, a dozen floats each


@dataclass(frozen=True)
class Blocks:
    """What becomes of the products with weights.

    Attributes:
        bits: 4 or 8, of each weight.
        keep: patterns of module paths that stay in float, e.g. ("lm_head", "*.mlp.*").
    """

    bits: int
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.bits} bits in blocks of {BLOCK} (MatMulNBits)"


def parse_blocks(text: str) -> Blocks | None:
    """`w4` and `w8` as blocks; None for anything else."""
    found = re.fullmatch("w([48])", text)
    return None if found is None else Blocks(int(found[1]))


def to_blocks(model: Any, blocks: Blocks) -> int:
    """Write the products of a finished graph with constant matrices as MatMulNBits; how many there are.

    Raises:
        UsageError: there is no such product.
    """
    shared: dict[Any, Any] = {}
    count = 0
    for node in list(model.graph):
        found = _product(node)
        if found is None or any(fnmatchcase(path, pattern) for path in found.paths for pattern in blocks.keep):
            continue
        _write(model, node, found, blocks, shared)
        count += 1
    if not count:
        raise UsageError(f"no product has a matrix with rows of a multiple of {BLOCK}, so that nothing can be stored in blocks")
    model.opset_imports["com.microsoft"] = 1
    for node in [n for n in model.graph if n.op_type == "Transpose" and not n.domain]:
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():  # of a matrix that is in blocks now
            model.graph.remove(node, safe=True)
    for value in list(model.graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[value.name]
    return count


@dataclass(frozen=True)
class _Product:
    """x W + b: the weight [in, out] as a value, whether it is stored [out, in], and the bias."""

    name: str
    weight: Any
    transposed: bool
    bias: Any

    @property
    def paths(self) -> tuple[str, str]:
        """Of the module: in the graph, whose outermost module holds the model, and in the model."""
        path = self.name.rpartition(".")[0]
        return path, path.removeprefix("model.")


def _product(node: Any) -> _Product | None:
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    facts = {k: a.value for k, a in node.attributes.items()}
    if facts.get("transA", 0) or facts.get("alpha", 1.0) != 1.0 or facts.get("beta", 1.0) != 1.0:
        return None
    weight, transposed = node.inputs[1], bool(facts.get("transB", 0))
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and not producer.domain:
        weight, transposed = producer.inputs[0], not transposed
    held = const_of(weight)
    if held is None or held.ndim != 2 or held.dtype != np.float32 or held.shape[1 if transposed else 0] % BLOCK:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (bias.shape is None or len(bias.shape) != 1):
        return None
    return _Product(str(weight.name), weight, transposed, bias)


def _write(model: Any, node: Any, product: _Product, blocks: Blocks, shared: dict[Any, Any]) -> None:
    at = Build(model, node, shared)
    key = ("blocks", product.weight, product.transposed)
    if key not in shared:
        held = np.asarray(const_of(product.weight))
        stored = block_weights(held if product.transposed else held.T, blocks.bits)
        parts: dict[str, NDArray[Any] | None] = {"codes": stored.codes, "scales": stored.scales, "zeros": stored.zeros}
        shared[key] = {k: None if v is None else _named(at, v, f"{product.name}.{k}") for k, v in parts.items()}
    found = shared[key]
    inputs = [node.inputs[0], found["codes"], found["scales"], found["zeros"], None, product.bias]
    while inputs[-1] is None:
        inputs.pop()
    out, size = found["codes"].shape[0], found["codes"].shape[1] * BLOCK
    facts = {"N": out, "K": size, "bits": blocks.bits, "block_size": BLOCK, "accuracy_level": _LEVEL}
    made = at.ir.node("MatMulNBits", inputs, facts, domain="com.microsoft", num_outputs=1)
    made.name, made.outputs[0].name = node.name.replace(node.op_type, "MatMulNBits"), node.outputs[0].name
    made.outputs[0].dtype, made.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
    model.graph.insert_before(node, [made])
    node.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _named(at: Build, array: NDArray[Any], name: str) -> Any:
    n, free = 1, name
    while free in at.graph.initializers:
        n, free = n + 1, f"{name}_{n}"
    value = at.ir.Value(name=free, const_value=at.ir.tensor(array, name=free))
    value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
    at.graph.register_initializer(value)
    return value


@dataclass(frozen=True)
class Stored:
    """A matrix [out, in] in blocks.

    Attributes:
        codes: [out, blocks, 4 x bits bytes].
        scales: [out, blocks].
        zeros: [out, bytes], the code of a weight that is 0, two blocks a byte; None where it is the middle everywhere.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None


def block_weights(weight: NDArray[Any], bits: int) -> Stored:
    """`weight` [out, in] in blocks of `bits` bits."""
    rows = max(1, _AT_ONCE // weight.shape[1])
    parts = [_searched(torch.from_numpy(np.array(weight[i : i + rows], np.float32)), bits) for i in range(0, len(weight), rows)]
    codes, scales, zeros = (torch.cat(found).numpy() for found in zip(*parts, strict=True))
    if bits == 8:
        return Stored(codes, scales, None)
    padded = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return Stored(_in_pairs(codes), scales, _in_pairs(padded))


def _in_pairs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4, np.uint8)


def _searched(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, blocks, 32], scales and zeros [out, blocks] that are closest to the weights, of those that were tried."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    best = torch.full_like(blocks[..., :1], torch.inf)
    kept = (torch.zeros_like(blocks), torch.ones_like(best), torch.zeros_like(best))
    for start, zero in _grids(blocks, bits):
        for factor in _SHRUNK if bits == 4 else _SHRUNK[:1]:
            codes = (blocks / (start * factor) + zero).round().clamp(0, (1 << bits) - 1)
            steps = codes - zero
            power = steps.square().sum(-1, keepdim=True)
            scale = torch.where(power == 0, start, (blocks * steps).sum(-1, keepdim=True) / power.clamp(min=1))  # least squares
            error = (blocks - scale * steps).square().sum(-1, keepdim=True)
            new = (codes, scale, zero.expand_as(scale))
            better = error < best
            codes, scale, zeros = (torch.where(better, n, old) for n, old in zip(new, kept, strict=True))
            kept = (codes, scale, zeros)
            best = torch.minimum(error, best)
    codes, scale, zeros = kept
    return codes.to(torch.uint8), scale.squeeze(-1), zeros.squeeze(-1).to(torch.uint8)


def _grids(blocks: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales, and the codes of 0, [out, blocks, 1]: around the middle, and with 4 bits from the smallest to the largest weight."""
    middle = float(1 << (bits - 1))
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    # the largest weight is on the side that has one code more
    yield torch.where(peak == 0, 1.0, peak / -middle), torch.full_like(peak, middle)
    if bits == 4:
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 15
        scale = torch.where(scale == 0, 1.0, scale)
        yield scale, (-low / scale).round().clamp(0, 15)
