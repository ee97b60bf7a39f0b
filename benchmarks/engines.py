"""What TensorRT builds of a ViT before and after, on a machine without a GPU.

    python -m benchmarks.engines [model ...]

Layers, norms, fused attention, bytes and seconds of each engine, and what one cold call of the command line costs. Nothing is run:
there is no GPU. Written to benchmarks/results/engines.md.
"""

import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import timm
import torch

import normfuse
from normfuse.benchmark import Machine
from normfuse.export import to_onnx
from normfuse.export.tensorrt import Engine, build_onnx
from normfuse.files import atomic

RESULTS = Path(__file__).parent / "results" / "engines.md"
MODELS = ("vit_tiny_patch16_224", "vit_base_patch16_224")
SIZES = "1x3x224x224:8x3x224x224:64x3x224x224"
HEAD = (
    "| model | dtype | engine of the | layers | LayerNorm | RMSNorm | fused attention | weights | file | build |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def row(model: str, dtype: str, which: str, engine: Engine) -> str:
    kinds = engine.kinds
    counted = (kinds.get(k, 0) for k in ("LayerNormalization", "RMSNormalization", "fused attention"))
    sizes = (f"{size / 1e6:.1f} MB" for size in (engine.weight_bytes or 0, engine.bytes))
    cells = (model, dtype, which, len(engine.layers), *counted, *sizes, f"{sum(engine.seconds.values()):.1f} s")
    return f"| {' | '.join(map(str, cells))} |"


def engines(model: str, folder: Path) -> list[str]:
    """Rows of one model: three dtypes, before and after."""
    torch.manual_seed(0)
    original, inputs = timm.create_model(model).eval(), (torch.randn(2, 3, 224, 224),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    modules = {"original": original, "optimized": normfuse.optimize(original, inputs, dynamic_shapes=shapes)}
    rows = []
    for which, module in modules.items():
        file = folder / f"{which}.onnx"
        to_onnx(
            module, file, target="tensorrt", attention="attention23", example_inputs=inputs, dynamic_shapes=shapes, force=True
        )  # fmt: skip
        for dtype in ("fp32", "fp16", "bf16"):
            built = build_onnx(file, folder / "model.engine", dtype=dtype, shapes={"x": SIZES}, force=True)
            rows.append(row(model, dtype, which, built))
            print(rows[-1], flush=True)
    return rows


def cold_start(model: str, folder: Path) -> str:
    """Time and memory of one call of the command line, the process of the builder included."""
    command = ["export", f"timm:{model}", "-o", "model.engine", "--dtype", "fp16", "--shapes", f"x={SIZES}", "--force"]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "normfuse", *command, "-q"], cwd=folder)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"normfuse {' '.join(command)} ended with {status}")
    seconds = time.perf_counter() - start
    return f"`normfuse {' '.join(command)}`: {seconds:.0f} s, {used.ru_maxrss / 1e6:.2f} GB in the largest process."


def main(models: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        cold = []
        for model in models:
            cold.append(cold_start(model, Path(name)))
            print(cold[-1], flush=True)
        rows = [line for model in models for line in engines(model, Path(name))]
    machine = Machine.here()
    page = f"""# Engines built without a GPU

`python -m benchmarks.engines` on {machine.cpu}, {machine.cores} cores, {date.today()}. Random weights. Nothing here was
run on a GPU.

{HEAD}
{chr(10).join(rows)}

From a cold start, in one command: load, optimize, prove, export, compare in ONNX Runtime, convert, build.

{chr(10).join(f"* {line}" for line in cold)}
"""
    with atomic(RESULTS, force=True) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(MODELS)))
