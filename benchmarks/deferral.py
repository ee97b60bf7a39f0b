"""What moving the scale of an RMSNorm behind the product costs in ONNX Runtime: Weightless() against Weightless(defer=True).

    python -m benchmarks.deferral [seconds]

A chain of pre-norm feed-forward blocks without attention, so that norms and products are all there is, exported twice and
timed against each other. Written to benchmarks/results/deferral.md.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import normfuse
from normfuse.api import DEFAULT
from normfuse.benchmark import Machine
from normfuse.export import to_onnx
from normfuse.files import atomic
from normfuse.passes.affine.weightless import Weightless

RESULTS = Path(__file__).parent / "results" / "deferral.md"
BLOCKS = 6
SHAPES = ((576, 1536), (768, 3072))  # features and hidden features: SmolLM2-135M's, GPT-2's
TOKENS = (1, 128, 1024)


class Chain(nn.Module):
    """x + V silu(W RMSNorm(x)), some times over."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(features, eps=1e-5), nn.Linear(features, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, features)
            )
            for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def measured(features: int, hidden: int, tokens: int, seconds: float) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    model, x = Chain(features, hidden).eval(), torch.randn(1, tokens, features)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, defer in (("norm", False), ("deferred", True)):
            fast = normfuse.optimize(model, (x,), passes=[*DEFAULT, Weightless(defer=defer)])
            files.append(Path(folder) / f"{name}.onnx")
            to_onnx(fast, files[-1], progress=False)
        found = normfuse.bench(files[0], files[1], (x,), names=("norm", "deferred"), seconds=seconds, threads=1, progress=False)
    print(found)
    ratio = found.speedup
    times = f"{found.a.median:.3f} | {found.b.median:.3f}"
    return f"| {features} → {hidden} | {tokens} | {times} | {ratio.value:.3f} | {ratio.low:.3f} … {ratio.high:.3f} |"


def main(seconds: float = 20.0) -> int:
    rows = [measured(features, hidden, tokens, seconds) for features, hidden in SHAPES for tokens in TOKENS]
    machine = Machine.here()
    doc = (__doc__ or "").split("\n\n")
    lines = ["# The scale of an RMSNorm behind the product", "", doc[0], "", doc[2].replace("\n", " ").strip(), ""]
    lines += [
        "| features → hidden | tokens | norm, ms | deferred, ms | speedup of deferring | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    lines += [*rows, "", f"Measured on: {machine.cpu}, {machine.cores} cores, 1 thread used."]
    text = "\n".join(lines) + "\n"
    RESULTS.parent.mkdir(exist_ok=True)
    with atomic(RESULTS, force=True) as path:
        path.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:2])))
