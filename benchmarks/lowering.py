"""What files hold before and after a change of the exporter: nodes by op, bytes, error, of models with attention and integers.

    python -m benchmarks.lowering write before.json      # in one checkout
    python -m benchmarks.lowering write after.json       # in the other
    python -m benchmarks.lowering compare before.json after.json

No time is measured: files that differ are what is worth timing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse.export import to_onnx

__all__ = ["main"]


class Block(nn.Module):
    """A Pre-LN block; `apart` projects queries, keys and values each on its own."""

    def __init__(
        self, d: int, heads: int, *, causal: bool = False, apart: bool = False, norm: type[nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(d), norm(d)
        self.qkv = nn.ModuleList(nn.Linear(d, d) for _ in range(3)) if apart else nn.Linear(d, 3 * d)
        self.out, self.up, self.down = nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        y = self.norm1(x)
        if isinstance(self.qkv, nn.ModuleList):
            q, k, v = (f(y).view(b, n, self.heads, -1).transpose(1, 2) for f in self.qkv)
        else:
            q, k, v = self.qkv(y).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


class Stack(nn.Module):
    """Blocks on tokens, or on words with a mask."""

    def __init__(self, d: int = 64, depth: int = 2, words: int = 0, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, d) if words else nn.Linear(d, d)
        self.blocks = nn.ModuleList(Block(d, 4, **options) for _ in range(depth))
        self.norm, self.head = options.get("norm", nn.LayerNorm)(d), nn.Linear(d, 10)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        mask = None if seen is None else seen[:, None, None, :]
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        out: Tensor = self.head(self.norm(x))
        return out


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randn(2, 9, 64),)


def _words() -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (2, 9)),)


def _masked() -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (2, 9)), torch.rand(2, 9) > 0.2)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "packed": (Stack, _tokens),
    "apart": (lambda: Stack(apart=True), _tokens),
    "causal": (lambda: Stack(words=50, causal=True), _words),
    "masked": (lambda: Stack(words=50, apart=True), _masked),
    "rms": (lambda: Stack(norm=nn.RMSNorm), _tokens),
    "batch": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        lambda: (torch.randn(2, 3, 12, 12),),
    ),
}
FORMS: dict[str, dict[str, Any]] = {
    **{f"ort {a}": {"attention": a} for a in ("auto", "decomposed", "attention23", "mha", "qkv")},
    "ort 17": {"opset": 17},
    "ort fp16": {"dtype": "fp16"},
    "portable": {"target": "portable"},
    "tensorrt": {"target": "tensorrt"},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    **{f"int {f}": {"form": f} for f in ("native", "integer")},
    "int native own attention": {"form": "native", "attention": "native"},
    "int native 20": {"form": "native", "opset": 20},
    "int trt": {"target": "tensorrt"},
}


def _files(asked: Sequence[str]) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    for name in asked or MODELS:
        make, inputs = MODELS[name]
        torch.manual_seed(0)
        model, example = make().eval(), inputs()
        for norm in (m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d))):
            for p in norm.parameters():
                nn.init.normal_(p, 1, 0.2)
        fast = normfuse.optimize(model, example, verify="off")
        yield from ((f"{name}: {form}", fast, options) for form, options in FORMS.items())
        for bits in (4, 8):
            spec = normfuse.ShiftQuant(weight_bits=bits, prefer="size", exponents="range")
            fast = normfuse.optimize(model, example, quantize=spec, verify="off")
            yield from ((f"{name} w{bits}: {form}", fast, options) for form, options in QUANTIZED.items())


def _written(model: nn.Module, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        file = to_onnx(model, folder / "model.onnx", force=True, progress=False, threads=1, tolerance=1e9, **options)
    except normfuse.NormfuseError as e:
        return {"refused": str(e)}
    error = None if file.error is None else file.error.max_rel
    return {
        "ops": dict(sorted(file.ops.items())),
        "bytes": file.bytes,
        "weights": file.weight_bytes,
        "error": error,
        "runtime": file.runtime,
    }


def _compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs; the number of files that do."""
    found = 0
    for name in sorted(before.keys() & after.keys()):
        a, b = before.get(name, {}), after.get(name, {})
        lines = []
        for op in sorted(a.get("ops", {}).keys() | b.get("ops", {}).keys()):
            counts = a.get("ops", {}).get(op, 0), b.get("ops", {}).get(op, 0)
            if counts[0] != counts[1]:
                lines.append(f"{op} {counts[0]} -> {counts[1]}")
        lines += [f"{k} {a.get(k)} -> {b.get(k)}" for k in ("runtime", "refused", "weights") if a.get(k) != b.get(k)]
        if a.get("bytes") and b.get("bytes") and abs(a["bytes"] / b["bytes"] - 1) > 0.02:
            lines.append(f"bytes {a['bytes']} -> {b['bytes']}")
        if (a.get("error") or 0) * 2 + 1e-7 < (b.get("error") or 0):
            lines.append(f"error {a['error']:.1e} -> {b['error']:.1e}")
        if lines:
            found += 1
            print(f"{name}: {', '.join(lines)}")
    print(f"{found} of {len(before.keys() & after.keys())} files differ")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="what files hold, before and after a change of the exporter")
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write")
    write.add_argument("file", type=Path)
    write.add_argument("models", nargs="*", help=", ".join(MODELS))
    compare = verbs.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    asked = parser.parse_args()
    if asked.verb == "compare":
        return int(_compare(*(json.loads(f.read_text(encoding="utf-8")) for f in (asked.before, asked.after))) > 0)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: _written(model, options, Path(folder)) for name, model, options in _files(asked.models)}
    asked.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
