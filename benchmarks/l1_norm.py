"""L1 against L2 layer normalization at the same implementation level.

    python -m benchmarks.l1_norm

One pair of implementations a row of the table, alike but for the statistic: chains of ATen operators run one by one, the
same chains under `torch.compile`, and one C++ kernel with the statistic for a template parameter. Two more rows are no such
pairs: the layers as they are shipped (torch's L2 layer is one native kernel), and the C++ L2 kernel against that of torch,
which says whether the C++ kernels are any good.

Rounds are interleaved, each engine has a process of its own, and the ratio is time of L2 over time of L1 with its bootstrap
interval: above 1, L1 has the higher throughput. Written to l1_norm.json and l1_norm.md.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.command import exit_code
from normfuse.app.engines import bench, compiled
from normfuse.benchmark import Comparison, Engine, Machine
from normfuse.errors import NormfuseError
from normfuse.files import atomic

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
SHAPE = (4096, 768)
EPS = 1e-5
BAR = 1.35
_console = Console(stderr=True)

KERNEL = r"""
#include <cmath>

// mean, statistic and result of one row at a time; a row stays in the first cache
struct L1 {
    static float term(float d) { return std::fabs(d); }
    static float scale(float mean, float eps) { return 1.0f / (1.2533141373155003f * mean + eps); }
};
struct L2 {
    static float term(float d) { return d * d; }
    static float scale(float mean, float eps) { return 1.0f / std::sqrt(mean + eps); }
};

template <class Statistic>
void normalize(const float* x, const float* gamma, const float* beta, float* y, long rows, long n, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; ++row) {
        const float* in = x + row * n;
        float* out = y + row * n;
        float sum = 0;
        for (long i = 0; i < n; ++i) sum += in[i];
        const float mean = sum / n;
        float total = 0;
        for (long i = 0; i < n; ++i) total += Statistic::term(in[i] - mean);
        const float scale = Statistic::scale(total / n, eps);
        for (long i = 0; i < n; ++i) out[i] = (in[i] - mean) * scale * gamma[i] + beta[i];
    }
}

extern "C" {
void l1(const float* x, const float* g, const float* b, float* y, long rows, long n, float eps, int threads) {
    normalize<L1>(x, g, b, y, rows, n, eps, threads);
}
void l2(const float* x, const float* g, const float* b, float* y, long rows, long n, float eps, int threads) {
    normalize<L2>(x, g, b, y, rows, n, eps, threads);
}
}
"""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of the table: an implementation of L2 and one of L1.

    Attributes:
        level: how both are implemented.
        task: what one call does.
        l2, l1: name of the implementation and whether a call is a training step, as `_open` takes them.
        alike: do they differ in the statistic alone? Else the ratio says nothing about it.
    """

    level: str
    task: str
    l2: tuple[str, bool]
    l1: tuple[str, bool]
    alike: bool = True


PAIRS = (
    Pair("ATen operators", "forward", ("chain l2", False), ("chain l1", False)),
    Pair("ATen operators", "forward and backward", ("chain l2", True), ("chain l1", True)),
    Pair("torch.compile", "forward", ("compiled l2", False), ("compiled l1", False)),
    Pair("C++ kernel", "forward", ("kernel l2", False), ("kernel l1", False)),
    Pair("L2 and L1 layer as shipped", "forward", ("layer l2", False), ("layer l1", False), alike=False),
    Pair("L2 and L1 layer as shipped", "forward and backward", ("layer l2", True), ("layer l1", True), alike=False),
    Pair("L2 of torch, L2 of the C++ kernel", "forward", ("layer l2", False), ("kernel l2", False), alike=False),
)

# -- implementations -----------------------------------------------------------------------------------------------------


def _module(name: str, features: int) -> Any:
    """The L1 or the L2 layer as a chain of ATen operators, or as it is shipped."""
    import torch
    from torch import Tensor, nn

    from normfuse.nn.l1 import L1LayerNorm

    class L2Chain(nn.LayerNorm):
        """Operator by operator what L1LayerNorm does in eval mode."""

        def forward(self, input: Tensor) -> Tensor:
            centered = input - input.mean(-1, keepdim=True)
            y = centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
            return y * self.weight + self.bias

    form, kind = name.split()
    makers: dict[tuple[str, str], Callable[..., nn.Module]] = {
        ("layer", "l2"): nn.LayerNorm,
        ("layer", "l1"): L1LayerNorm,
        ("chain", "l2"): L2Chain,
        ("chain", "l1"): L1LayerNorm,
    }
    layer = makers["layer" if form == "layer" else "chain", kind](features, eps=EPS)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
    # in training mode L1LayerNorm has a backward of its own, in eval mode that of its operators
    return layer.train(form == "layer")


def _open(name: str, step: bool, shape: tuple[int, int], library: str, threads: int) -> Callable[[], Any]:
    """A call of the named implementation on normal values; with `step`, forward and backward."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    x = torch.randn(shape) * 2 + 1
    layer = _module(name.replace("kernel", "chain").replace("compiled", "chain"), shape[1])
    if name.startswith("kernel"):
        return _kernel(name.split()[1], layer, x, library, threads)
    if step:
        x.requires_grad_()
        grad = torch.randn(shape)

        def train() -> Any:
            x.grad = None
            layer.zero_grad()
            return layer(x).backward(grad)

        return train
    call = compiled(layer) if name.startswith("compiled") else layer

    def infer() -> Any:
        with torch.inference_mode():
            return call(x)

    return infer


def _kernel(kind: str, layer: Any, x: Any, library: str, threads: int) -> Callable[[], Any]:
    import torch

    function = getattr(ctypes.CDLL(library), kind)
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 2 + [ctypes.c_float, ctypes.c_int]
    function.restype = None
    y, gamma, beta = torch.empty_like(x), layer.weight.detach(), layer.bias.detach()
    rows, features = x.shape

    def run() -> Any:
        function(x.data_ptr(), gamma.data_ptr(), beta.data_ptr(), y.data_ptr(), rows, features, EPS, threads)
        return y

    return run


def _build(folder: Path) -> str:
    """The C++ kernels as a library in `folder`.

    Raises:
        NormfuseError: there is no compiler, or it fails.
    """
    source, library = folder / "norms.cpp", folder / "norms.so"
    source.write_text(KERNEL, encoding="utf-8")
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
    try:
        done = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise NormfuseError(f"there is no compiler {compiler!r}; install g++, or name another one in CXX") from e
    if done.returncode:
        raise NormfuseError(f"{compiler} could not compile the kernels: {done.stderr.strip()[:500]}")
    return str(library)


def _check(shape: tuple[int, int], library: str) -> None:
    """All implementations of a statistic agree.

    Raises:
        NormfuseError: one does not.
    """
    import torch

    threads = torch.get_num_threads()
    for kind in ("l1", "l2"):
        expected = _open(f"chain {kind}", False, shape, library, threads)()
        for form in ("compiled", "kernel", "layer"):
            found = _open(f"{form} {kind}", False, shape, library, threads)()
            far = float((found - expected).abs().max())
            if not far < 1e-4:
                raise NormfuseError(f"{form} {kind} is {far:.1e} away from the chain of operators; expected less than 1e-4")


# -- the table -----------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--seconds", type=click.FloatRange(0.1), default=20.0, show_default=True, help="Measuring time of each row.")
@click.option("--rounds", type=click.IntRange(2), default=None, help="Exact number of rounds of each row instead.")
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1, 2), show_default=True, help="Threads; repeatable.")
@click.option("--shape", type=(int, int), default=SHAPE, show_default=True, help="Rows and features.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True, help="Folder.")
def command(seconds: float, rounds: int | None, threads: tuple[int, ...], shape: tuple[int, int], out: Path) -> None:
    """Measure L1 against L2 layer normalization and write l1_norm.json and l1_norm.md."""
    found: list[tuple[Pair, int, Comparison]] = []
    with tempfile.TemporaryDirectory() as folder:
        library = _build(Path(folder))
        _check(shape, library)
        for pair in PAIRS:
            for count in threads:
                a, b = (Engine(f"{n}{' step' * step}", partial(_open, n, step, shape, library)) for n, step in (pair.l2, pair.l1))
                comparison = bench(a, b, seconds=seconds, rounds=rounds, threads=count, isolate=False)
                _console.print(f"{pair.level}, {pair.task}, {count} threads: {comparison.speedup}")
                found.append((pair, count, comparison))
    out.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(pair) | {"threads": count, **comparison.to_dict()} for pair, count, comparison in found]
    data = {"schema": 1, "shape": shape, "bar": BAR, "machine": dataclasses.asdict(Machine.here()), "rows": rows}
    for name, text in (("l1_norm.json", json.dumps(data, indent=2) + "\n"), ("l1_norm.md", _table(found, shape))):
        with atomic(out / name, force=True) as path:
            path.write_text(text, encoding="utf-8")
    _console.print(f"wrote {out / 'l1_norm.md'}")


def _table(found: Sequence[tuple[Pair, int, Comparison]], shape: tuple[int, int]) -> str:
    lines = [
        "# L1 against L2 layer normalization",
        "",
        f"Input {shape[0]} x {shape[1]}, float32. Ratio: time of L2 over time of L1 (above 1, L1 is faster), median and 95 %",
        "interval; noise: how far the first engine differs from itself. Made by `python -m benchmarks.l1_norm`.",
        "",
        "| level | call | threads | L2 ms | L1 ms | ratio | noise |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(pair, count, c) for pair, count, c in found if pair.alike]
    lines += ["", "Not the same implementation level, or not the same question; for comparison:", ""]
    lines += ["| first, second | call | threads | first ms | second ms | ratio | noise |", lines[6]]
    lines += [_row(pair, count, c) for pair, count, c in found if not pair.alike]
    pairs = [c.speedup for pair, _, c in found if pair.alike]
    reached = sum(i.low >= BAR for i in pairs)
    machine = Machine.here()
    lines += [
        "",
        f"A ratio of {BAR} or more is reached in {reached} of {len(pairs)} rows at the same level.",
        "",
        "Operators over the whole tensor are as many for either statistic: in a chain of ATen operators a mean, a subtraction,",
        "an absolute value or a square, a mean, a division, γ and β. What L1 saves is one root a row, for a product with c. In a",
        "vectorized kernel an absolute value and an addition stand against one fused multiply-add.",
        "",
        f"Measured on: {machine.cpu}, {machine.cores} cores; torch {machine.libraries.get('torch', '?')}",
        "",
    ]
    return "\n".join(lines)


def _row(pair: Pair, threads: int, c: Comparison) -> str:
    times = f"{c.a.median:.3f} | {c.b.median:.3f}"
    return f"| {pair.level} | {pair.task} | {threads} | {times} | {c.speedup} | {c.noise:.1%} |"


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.l1_norm", args)


if __name__ == "__main__":
    # the processes of the engines import this module by its name
    from benchmarks.l1_norm import main as imported

    sys.exit(imported())
