"""`benchmarks/gpu` as far as a machine without a GPU runs it: checks in Triton's interpreter, every part on the CPU, the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from normfuse.errors import NormfuseError
from tests.places import ROOT

if not (ROOT / "benchmarks" / "gpu").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the interpreter replaces Triton's compiler for good."""
    found = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=found
    )


def test_kernels_are_checked_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = python("-m", "benchmarks.gpu", "--interpret", "--quick")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert {r[0].strip("| ") for r in rows} == {
        "layer norm", "rms norm", "crms norm", "l1 norm", "softmax", "quantize rows", "product", "norm + linear",
    }  # fmt: skip
    assert {r[1] for r in rows} == {"fp32", "fp16"}
    assert all(r[-1] == "ok |" for r in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_line() -> None:
    done = python("benchmarks/gpu/run.py")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("no NVIDIA GPU to run on: torch ")
    assert done.stderr.count("\n") == 1


def test_unknown_part_is_a_mistake() -> None:
    done = python("-m", "benchmarks.gpu", "--only", "norms,magic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "no part is called 'magic': expected checks, probe, norms, products, models\n"


# Every part with its real functions on the CPU, where contenders are called once instead of timed.
ON_CPU = """
import json, sys
import torch
from torch import nn
from benchmarks.gpu.asked import Asked
from benchmarks.gpu import checks, clock, models, norms, products, tables

def compare(calls, count, seconds):
    found, failed = [], {}
    for i, (name, call) in enumerate(calls.items()):
        try:
            call(count - 1)
            found.append(clock.Timing(name, i + 2.0, i + 1.0, i + 3.0, (0.5, 2 / (i + 2.0), 2.0), 10))
        except Exception as e:
            failed[name] = str(e)
    return found, failed

for part in (norms, products, models):
    part.DEVICE, part.compare = "cpu", compare
norms.bandwidth, norms.copies, products.copies = lambda seconds: 1e9, lambda size: 2, lambda size: 2
norms.cached = products.cached = lambda size, count: size < 1000
norms.SHAPES, products.SIZES = ((3, 16),) * 4, ((3, 32, 24), (17, 32, 24), (17, 64, 16))
torch.compile = lambda f, dynamic=None: f
models._models = lambda quick: [("tiny", tiny, ("bf16",)), ("broken", broken, ("fp16",))]

def tiny():
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU()), (torch.randn(3, 16),)

def broken():
    raise RuntimeError("no memory")

facts = {"device": {"name": "NVIDIA Test", "capability": "8.0", "driver": "1", "cuda": "13"}, "versions": {"torch": "2"},
         "date": "today", "command": "x"}
facts["norms"] = norms.measure(Asked(True))
facts["products"] = products.measure(Asked(True))
facts["models"] = models.measure(Asked(True))

# one kernel that is wrong and one that does not compile
checks._norms = checks._rows = checks._norm_linears = lambda *args: iter(())
real = checks.run
def run(launch, inputs):
    if launch.kernel == "product.product":
        raise RuntimeError("does not compile")
    return tuple(y + (launch.kernel == "softmax.softmax") for y in real(launch, inputs))
checks.run = run
facts["checks"] = checks.check("cpu", quick=True)
print()
print(json.dumps(facts))
tables.page(facts)
"""


def test_every_part_runs() -> None:
    pytest.importorskip("triton")
    done = python("-c", ON_CPU, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert [r["failed"] for r in facts["norms"]["rows"]] == [{}] * len(facts["norms"]["rows"])
    assert {r["name"] for r in facts["norms"]["rows"]} >= {"RMSNorm", "add + RMSNorm", "softmax", "quantize rows"}
    assert all(set(r["timings"]) == {"normfuse", "torch", "compile"} for r in facts["norms"]["rows"])
    # ours took 2, the others 3 and 4: the best other is 1.5 times as slow
    assert facts["norms"]["rows"][0]["best"][1] == pytest.approx(1.5)
    assert [r["failed"] for r in facts["products"]] == [{}, {}]
    assert facts["products"][0]["cached"] == ["int8 weights, fp16 products, compiled"]
    assert "torch._int_mm" in facts["products"][1]["timings"]
    assert "torch._int_mm" not in facts["products"][0]["timings"]
    tiny, broken = facts["models"]
    assert tiny["failed"] == {}
    assert set(tiny["errors"]) == {"eager", "optimized", "norm kernels", "all kernels"}
    assert max(tiny["errors"].values()) < 0.1
    assert broken["failed"] == {"all": "no memory"}
    wrong = {(r["kernel"], r["dtype"]): r["failed"] for r in facts["checks"]}
    assert set(wrong) == {(kernel, dtype) for kernel in ("softmax", "product") for dtype in ("fp32", "fp16")}
    assert wrong["product", "fp16"][0] == "3x40x24, 8 bits, 1 groups, none: RuntimeError: does not compile"
    assert wrong["softmax", "fp32"][-1].startswith("3x100: ")


class Stepped:
    """A device whose contenders take what they say, in microseconds."""

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __call__(self) -> None:
        self.launch()

    def seconds(self) -> float:
        return float(sum(self.launch()) / 1e6)


def test_contenders_are_compared_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import clock

    def as_graph(name: str, call: Any) -> Any:
        if name == "waiting":
            raise NormfuseError("waiting cannot be captured")
        return call

    monkeypatch.setattr(clock, "DeviceCall", Stepped)
    monkeypatch.setattr(clock, "as_graph", as_graph)
    found, failed = clock.compare({"ours": lambda i: 2.0, "waiting": lambda i: 6.0, "broken": lambda i: 1 / 0}, 3, 0.0)
    assert [(t.name, t.rounds) for t in found] == [("ours", 10), ("waiting", 10)]
    assert [t.median for t in found] == [pytest.approx(2.0), pytest.approx(6.0)]
    assert found[1].speedup == (pytest.approx(1 / 3),) * 3
    assert list(failed) == ["waiting as a graph", "broken"]
    assert failed["broken"].startswith("ZeroDivisionError")
    (alone,), _ = clock.compare({"broken": lambda i: 1 / 0, "ours": lambda i: 2.0}, 1, 0.0)
    assert alone.speedup is None


# -- the page ----------------------------------------------------------------------------------------------------------


def _timing(median: float, speedup: float) -> dict[str, Any]:
    return {
        "median": median,
        "low": median * 0.9,
        "high": median * 1.1,
        "speedup": [0.9 * speedup, speedup, 1.1 * speedup],
        "rounds": 12,
    }


FACTS: dict[str, Any] = {
    "schema": 1,
    "device": {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory": 1, "driver": "580.1", "cuda": "13.0"},
    "versions": {"torch": "2.14", "triton": "3.8"},
    "date": "2026-11-24 04:00 UTC",
    "command": "python -m benchmarks.gpu --quick",
    "checks": [
        {"kernel": "softmax", "dtype": "bf16", "cases": 9, "error": 2e-3, "bound": 8e-3, "failed": []},
        {"kernel": "product", "dtype": "fp16", "cases": 2, "error": 0.5, "bound": 1e-3, "failed": ["3x4x5, 8 bits: 5.0e-01"]},
    ],
    "probe": {"works": False, "version": "1.7.1", "error": "it was not built for this GPU"},
    "norms": {
        "copy": 2.9e12,
        "floor": 2.1,
        "rows": [
            {
                "name": "RMSNorm", "dtype": "fp16", "shape": [4096, 4096], "cached": False, "bytes": 6.7e7, "bandwidth": 0.93,
                "best": [1.1, 1.2, 1.3],
                "timings": {"normfuse": _timing(25.0, 1), "torch": _timing(40.0, 0.6)}, "failed": {"compile": "no compiler"},
            },
            {
                "name": "softmax", "dtype": "fp16", "shape": [1, 4096], "cached": True, "bytes": 1.6e4,
                "bandwidth": None, "best": None,
                "timings": {}, "failed": {"normfuse": "does not compile"},
            },
        ],
    },
    "products": [
        {"size": [1, 4096, 4096], "operations": 2 * 4096**2, "failed": {}, "cached": ["w4a8"], "beside": "torchao",
         "timings": {"fp16 linear": _timing(20.0, 1), "w4a8": _timing(8.0, 2.5)}},
    ],
    "models": [
        {"name": "ViT", "dtype": "fp16", "timings": {"eager": _timing(3000.0, 1), "optimized": _timing(2000.0, 1.5)}, "failed": {},
         "errors": {"eager": 2e-3}},
        {"name": "GPT-2", "dtype": "fp16", "failed": {"eager": "no"}, "errors": {},
         "timings": {"kernels": _timing(1000.0, 1) | {"speedup": None}}},
    ],
}  # fmt: skip


def test_page_holds_every_part(tmp_path: Path) -> None:
    from benchmarks.gpu.tables import write

    data, page = write(FACTS, tmp_path / "results", "gpu-test")
    assert json.loads(data.read_text()) == FACTS
    text = page.read_text()
    assert text.startswith("# NVIDIA H100 80GB HBM3\n")
    assert "driver 580.1, CUDA 13.0. 2026-11-24 04:00 UTC." in text
    assert "torch 2.14, triton 3.8." in text
    assert "    python -m benchmarks.gpu --quick" in text
    assert "| product | fp16 | 2 | 5.0e-01 | 1e-03 | FAILED |" in text
    assert "- product, fp16: 3x4x5, 8 bits: 5.0e-01" in text
    assert "TensorRT for RTX 1.7.1: it was not built for this GPU" in text
    assert (
        "| RMSNorm | fp16 | 4096x4096 | 25.000 [22.500, 27.500] | 40.000 [36.000, 44.000] | — | 1.20 [1.10, 1.30] | 93% |" in text
    )
    assert "| softmax | fp16 | 1x4096 * | — | — | — | — | — |" in text
    assert "- softmax fp16 1x4096, normfuse: does not compile" in text
    assert "To add to one number takes 2.1 µs" in text
    assert "| fp16 linear | 20.000" in text
    assert "### 1x4096x4096, beside torchao\n" in text
    assert "| w4a8 * | 8.000 [7.200, 8.800] | 2.50 | 4.2 |" in text
    assert "| kernels | 1.000 [0.900, 1.100] | — |  |" in text
    assert "| optimized | 2.000 [1.800, 2.200] | 1.50 |  |" in text
    write(FACTS, tmp_path / "results", "gpu-test")


def test_part_that_was_not_run_is_not_on_the_page() -> None:
    from benchmarks.gpu.tables import page

    text = page({k: v for k, v in FACTS.items() if k not in ("norms", "models")} | {"left_out": ["ViT, fp16", "GPT-2, fp16"]})
    assert "## Products" in text
    assert "## Memory-bound kernels" not in text
    assert "## Models" not in text
    assert "the time was over: ViT, fp16; GPT-2, fp16." in text


def test_what_does_not_begin_in_time_is_noted() -> None:
    from benchmarks.gpu.asked import Asked

    asked = Asked(end=float("-inf"))
    assert asked.late("ViT")
    assert asked.left_out == ["ViT"]
    assert not Asked().late("ViT")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3", id="h100"),
        pytest.param("NVIDIA GeForce RTX 4090", "geforce-rtx-4090", id="rtx"),
        pytest.param("", "unknown", id="none"),
    ],
)
def test_device_gives_the_file_its_name(name: str, expected: str) -> None:
    from benchmarks.gpu.tables import slug

    assert slug(name) == expected
