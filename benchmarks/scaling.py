"""Time and peak memory of `optimize` with verification: ViT-B/16, and a small ViT of growing depth.

    python -m benchmarks.scaling

Each run is a process of its own, so that its peak is its own. Memory is counted from before the model is built, in units
of its fp32 weights; the weights of the original are in it.
"""

import gc
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import click
from rich.console import Console

from normfuse.benchmark import Machine
from normfuse.files import atomic

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
DEPTHS = (12, 24, 48, 96)
_console = Console(stderr=True)


def _one(kind: str) -> dict[str, Any]:
    """Optimize one model in this process; seconds and memory."""
    import timm
    import torch

    import normfuse
    from normfuse.app.random_norms import randomise_norms

    torch.manual_seed(0)
    # everything that is imported on first use belongs to the libraries and not to the model
    warm = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).eval()
    normfuse.optimize(warm, (torch.randn(2, 4),))
    gc.collect()
    before = _resident()
    if kind == "vit_base":
        model = timm.create_model("vit_base_patch16_224")
        x = torch.randn(1, 3, 224, 224)
    else:
        depth = int(kind.removeprefix("depth_"))
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, num_heads=2, depth=depth)
        x = torch.randn(1, 3, 32, 32)
    model = randomise_norms(model.eval(), seed=0)
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    start, cpu = perf_counter(), process_time()
    fast = normfuse.optimize(model, (x,))
    seconds, cpu = perf_counter() - start, process_time() - cpu
    found = normfuse.report(fast)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "kind": kind,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "weights_bytes": weights,
        "peak_bytes": peak - before,
        "norms_before": found.norms_before,
        "norms_after": found.norms_after,
        "exact": None if found.exact is None else found.exact.max_rel,
    }


def _resident() -> int:
    """Bytes of this process in memory now; its peak so far where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _measured(kind: str, repeats: int) -> dict[str, Any]:
    runs = []
    for i in range(repeats):
        with _console.status(f"{kind}, run {i + 1} of {repeats}"):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.scaling", "--one", kind], check=True, capture_output=True, text=True
            )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    best = dict(runs[0])
    best["seconds"] = statistics.median(r["seconds"] for r in runs)
    best["cpu_seconds"] = statistics.median(r["cpu_seconds"] for r in runs)
    best["peak_bytes"] = statistics.median(r["peak_bytes"] for r in runs)
    best["all_seconds"] = [r["seconds"] for r in runs]
    _console.print(f"{kind}: {best['seconds']:.1f} s, peak {best['peak_bytes'] / best['weights_bytes']:.1f} x weights")
    return best


@click.command()
@click.option("--one", metavar="KIND", hidden=True, help="Run one model in this process and print JSON.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs of each model; the median counts.")
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True, help="Folder of the results."
)
def command(one: str | None, repeats: int, results: Path) -> None:
    """Measure time and peak memory of `optimize` and write scaling.json and scaling.md."""
    if one is not None:
        print(json.dumps(_one(one)))
        return
    results.mkdir(parents=True, exist_ok=True)
    large = _measured("vit_base", repeats)
    depths = [_measured(f"depth_{d}", repeats) for d in DEPTHS]
    data = {"schema": 1, "machine": vars(Machine.here()), "vit_base": large, "depths": depths}
    with atomic(results / "scaling.json", force=True) as path:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (results / "scaling.md").write_text(_table(large, depths), encoding="utf-8")
    _console.print(f"wrote {results / 'scaling.md'}")


def _table(large: dict[str, Any], depths: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Time and memory of `optimize` with verification",
        "",
        "Median of the runs: wall time, and CPU time of all threads, which a busy machine changes less. Peak memory in units",
        "of the fp32 weights, the original's own included. Made by `python -m benchmarks.scaling`.",
        "",
        "| model | seconds | against depth 12 | CPU seconds | against depth 12 | weights MB | peak / weights |",
        "|---|---|---|---|---|---|---|",
        f"| ViT-B/16, 224 px | {large['seconds']:.1f} | | {large['cpu_seconds']:.1f} | | {large['weights_bytes'] / 1e6:.0f} "
        f"| {large['peak_bytes'] / large['weights_bytes']:.2f} |",
    ]
    lines += [
        f"| ViT of width 64, depth {d['kind'].removeprefix('depth_')} "
        f"| {_times(d, depths[0], 'seconds')} | {_times(d, depths[0], 'cpu_seconds')} | {d['weights_bytes'] / 1e6:.1f} | |"
        for d in depths
    ]
    m = Machine.here()
    return "\n".join([*lines, "", f"Measured on: {m.cpu}, {m.cores} cores; torch {m.libraries.get('torch', '?')}", ""])


def _times(this: dict[str, Any], first: dict[str, Any], key: str) -> str:
    return f"{this[key]:.2f} | {this[key] / first[key]:.1f} x"


def main(args: Sequence[str] | None = None) -> int:
    try:
        command.main(args=None if args is None else list(args), prog_name="python -m benchmarks.scaling", standalone_mode=False)
    except click.ClickException as e:
        e.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except subprocess.CalledProcessError as e:
        _console.print(f"a run failed: {e.stderr.strip().splitlines()[-1] if e.stderr.strip() else e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
