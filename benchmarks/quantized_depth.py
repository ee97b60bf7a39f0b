"""Why a deep quantized file and its module differ: `python -m benchmarks.quantized_depth`.

Each block of a random decoder stack, quantized to W8A8, is exported alone. File and module get the same input, and what they
round to integers is compared code by code; then each goes on with its own output. Beside them runs the module on an input that
differs by little.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normfuse
from normfuse.export import to_onnx
from normfuse.export.onnx.runtime import run, session
from normfuse.quant.integers import quantize_rows

__all__ = ["Block", "codes_of_file", "codes_of_module", "from_a_tie", "main", "stack"]

_PERTURBATIONS = (1e-7, 1e-6, 1e-5, 1e-4)


class Block(nn.Module):
    """A decoder block: RMSNorm, causal attention, RMSNorm, gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=1.2 / math.sqrt(p.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        h = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


def stack(layers: int, width: int, heads: int, tokens: int) -> tuple[list[nn.Module], list[Any], Tensor]:
    """Float blocks, the same quantized to W8A8, and an input."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, width)
    blocks: list[nn.Module] = [Block(width, heads).eval() for _ in range(layers)]
    spec = normfuse.ShiftQuant(weight_bits=8, activation_bits=8, prefer="size")
    return blocks, [normfuse.optimize(b, (x,), quantize=spec, verify="off") for b in blocks], x


class _Codes(TorchDispatchMode):
    """Collects what quantized layers round, once for each value that they read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []
        self.values: list[Tensor] = []
        self._seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.normfuse.shiftquant_linear.default and not any(args[0] is s for s in self._seen):
            self._seen.append(args[0])
            self.values.append(args[0])
            self.found.append(quantize_rows(args[0], args[7])[0])
        return func(*args, **(kwargs or {}))


def codes_of_module(gm: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output, every value that is rounded and its codes, in order."""
    with torch.no_grad(), _Codes() as codes:
        return gm(x), codes.values, codes.found


def from_a_tie(value: Tensor, codes: Tensor, others: Tensor) -> float:
    """How far the values with different codes are from the middle between two codes, at most, in steps."""
    steps = value.double() * (127 / value.double().abs().amax(-1, keepdim=True))
    return float((steps - steps.floor() - 0.5).abs()[codes != others].max())


def codes_of_file(file: Path) -> Any:
    """The same as a function of the input, from a file in the native form whose rounded values are made outputs."""
    model = onnx.load(file)
    output = model.graph.output[0].name
    names: list[tuple[str, bool]] = []
    for node in model.graph.node:
        if node.domain != "normfuse":
            continue
        if node.op_type.startswith(("NormQuantize", "ShiftQuantMatMulQuantize", "QuantizeRows")):
            names.append((node.output[0], True))
        elif node.op_type.startswith("ShiftQuantLinear") and (node.input[0], False) not in names:
            names.append((node.input[0], False))
    for name, integer in names:
        kind = onnx.TensorProto.INT8 if integer else onnx.TensorProto.FLOAT
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    shown = file.with_name("shown.onnx")
    onnx.save(model, shown)
    opened = session(shown, threads=1)

    def call(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        got = run(opened, {opened.get_inputs()[0].name: x})
        return got[output], [got[n] if integer else quantize_rows(got[n], 8)[0] for n, integer in names]

    return call


def decibels(a: Tensor, b: Tensor) -> float:
    noise = float((a.double() - b.double()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(a.double().square().sum()) / noise)


def _files(quantized: Sequence[Any], folder: Path) -> Iterator[Any]:
    for i, gm in enumerate(quantized):
        file = folder / f"{i}.onnx"
        to_onnx(gm, file, form="native", attention="decomposed", progress=False, verify=False)
        yield codes_of_file(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    blocks, quantized, x = stack(args.layers, args.width, 4, args.tokens)
    module, file, reference = x, x, x
    moved = [x * (1 + e * torch.randn_like(x).sign()) for e in _PERTURBATIONS]
    print("dB; `alone`: file and module get the same input; the others go on with their own output")
    print(
        "| block | alone | codes that differ | file / module | "
        + " | ".join(f"module, input ± {e:g}" for e in _PERTURBATIONS)
        + " | W8A8 / float |"
    )
    print("|---|---|---|---|" + "---|" * len(_PERTURBATIONS) + "---|")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for i, (block, gm, call) in enumerate(zip(blocks, quantized, _files(quantized, Path(folder)), strict=True)):
            want, values, codes = codes_of_module(gm, module)
            have, others = call(module)
            differ = sum(int((a != b).sum()) for a, b in zip(codes, others, strict=True))
            total = sum(c.numel() for c in codes)
            first = next((t for t in zip(values, codes, others, strict=True) if not torch.equal(t[1], t[2])), None)
            tie = "" if first is None else f" (the first {from_a_tie(*first):.1e} steps from a tie)"
            alone = decibels(want, have)
            module, file, reference, moved = want, call(file)[0], block(reference), [gm(m) for m in moved]
            chain = [decibels(module, m) for m in (file, *moved)]
            row = " | ".join(f"{v:.1f}" for v in chain)
            print(f"| {i} | {alone:.1f} | {differ} of {total}{tie} | {row} | {decibels(reference, module):.1f} |", flush=True)


if __name__ == "__main__":
    main()
