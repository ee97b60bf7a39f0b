"""What `normfuse bench` measures on a GPU, as far as a machine without one can tell; the rest runs where there is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.app.cuda import Placement, in_dtype, on_device
from normfuse.app.engines import bench, tensorrt_engine
from normfuse.app.source_options import Options
from normfuse.app.sources import Source
from normfuse.benchmark import Engine, Schedule, measure
from normfuse.benchmark.engine import take_turn
from normfuse.cli.bench import Settings, Workshop
from normfuse.cli.options import Model, Pipeline
from normfuse.errors import NormfuseError, UsageError
from normfuse.gpu.device import DeviceCall, Gpu, as_graph, find_gpu
from normfuse.pt2 import load_program, save_program
from tests.cli_runner import Run, runner

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU())
    nn.init.normal_(m[1].bias)
    return m, (torch.randn(4, 16),)
"""

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, torch is built without CUDA."""
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process, in a folder with `gpu_models.py`; (exit code, standard output, standard error)."""
    with runner("gpu_models", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(("--device", "cuda"), id="default-engines"),
        pytest.param(("--device", "cuda", "--against", "eager", "--engine", "compile-optimized"), id="torch"),
        pytest.param(("--against", "tensorrt"), id="tensorrt"),
        pytest.param(("--against", "a.engine", "--engine", "b.engine", "--dtype", "bf16"), id="files"),
    ],
)
def test_without_a_gpu_one_line_says_what_was_looked_for(run: Run, no_gpu: None, args: tuple[str, ...]) -> None:
    code, out, err = run("bench", "gpu_models:build", *args)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "no NVIDIA GPU" in err
    assert f"torch {torch.__version__} is built without CUDA" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param("--against onnxruntime --engine tensorrt-optimized", "not on one device", id="two-devices"),
        pytest.param("--device cuda --against onnxruntime", "not on one device", id="onnxruntime-on-cuda"),
        pytest.param("--against eager --engine eager-optimized --dtype fp16", "--dtype is for engines on a GPU", id="dtype-on-cpu"),
        pytest.param("--device cuda --plugins rms_norm", "--plugins is for the engine tensorrt-optimized", id="plugins"),
        pytest.param("--device tpu", "Invalid value", id="another-device"),
        pytest.param("--against eager --engine magic", "unknown engine 'magic': expected eager,", id="unknown"),
    ],
)
def test_engines_that_do_not_go_together(run: Run, no_gpu: None, args: str, message: str) -> None:
    code, out, err = run("bench", "gpu_models:build", *args.split())
    assert code == 2
    assert message in err
    assert out == ""


def test_kernels_are_an_engine_on_the_cpu_too(run: Run, tmp_path: Path) -> None:
    model = Model("gpu_models:build", Options())
    workshop = Workshop(model, Pipeline(None, "end"), tmp_path)
    expected = workshop.engine("eager").open(1)()
    found = workshop.engine("kernels-optimized").open(1)()
    torch.testing.assert_close(found, expected)
    (program,) = tmp_path.glob("*-kernels.pt2")
    targets = {str(n.target) for n in load_program(program).graph.nodes}
    assert any(t.startswith("normfuse.rms_norm") for t in targets)


def test_a_model_is_optimized_in_the_dtype_that_it_runs_in(run: Run, tmp_path: Path) -> None:
    settings = Settings(Placement("cpu", "bf16"))
    workshop = Workshop(Model("gpu_models:build", Options()), Pipeline(None, "end"), tmp_path, settings=settings)
    outputs = [workshop.engine(name).open(1)() for name in ("eager", "eager-optimized", "kernels-optimized")]
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=0.05, atol=0.05)


def test_help_fits_into_80_columns(run: Run) -> None:
    code, out, _ = run("bench", "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert all(name in out for name in ("--device", "--dtype", "--plugins", "kernels-optimized", "tensorrt"))


def test_engine_file_that_is_missing() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.engine does not exist"):
        tensorrt_engine("mine", "nowhere.engine", ())
    with pytest.raises(UsageError, match=r"only \.onnx, .* files"):
        bench("model.tflite", "other.tflite")


# -- the GPU and its clock ---------------------------------------------------------------------------------------------


def test_no_device_is_told_apart_from_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(UsageError, match=r"for CUDA 12\.8 finds no device; CUDA_VISIBLE_DEVICES='-1'"):
        find_gpu()


def test_gpu_is_one_line_and_plain_data() -> None:
    gpu = Gpu("NVIDIA H100 80GB HBM3", "9.0", 85 * 10**9, "580.1", "13.0")
    assert str(gpu) == "NVIDIA H100 80GB HBM3 (sm_90), driver 580.1, CUDA 13.0"
    assert json.loads(json.dumps(gpu.to_dict()))["capability"] == "9.0"


class Clocked:
    """A call whose device takes 5 ms, whatever the wall clock says."""

    def __call__(self) -> None:
        raise AssertionError("a turn asks the device")

    def seconds(self) -> float:
        return 0.005


def test_a_turn_takes_the_time_of_the_device() -> None:
    turn = take_turn(Clocked(), 0.001)
    assert set(turn.seconds) == {0.005}


def test_a_measurement_takes_the_time_of_the_device() -> None:
    class Opened(Clocked):
        def __call__(self) -> None:
            """The warm-up."""

    engines = [Engine(n, lambda threads: Opened()) for n in ("a", "a", "b")]
    found = measure(engines, Schedule(seconds=0.01, turn=0.001, warmup=0.0, rounds=2, threads=1, isolate=False, restarts=1))
    assert found.medians == ((0.005,) * 3,) * 2


@gpu_only
def test_a_graph_replays_on_new_values() -> None:
    x = torch.ones(8, device="cuda")
    y = torch.empty_like(x)
    call = DeviceCall(as_graph("product", lambda: torch.mul(x, 3, out=y)))
    x.fill_(2)
    call()
    assert torch.equal(y.cpu(), torch.full((8,), 6.0))
    assert call.seconds() > 0


@gpu_only
def test_what_waits_for_the_device_is_no_graph() -> None:
    x = torch.ones(8, device="cuda")
    with pytest.raises(NormfuseError, match=r"waiting cannot be captured as a CUDA graph.*--no-graph"):
        as_graph("waiting", lambda: x.sum().item())


# -- models on another device and in another dtype ---------------------------------------------------------------------


class Positions(nn.Module):
    """Makes a tensor of its own, whose device stands in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + torch.arange(4, device=x.device, dtype=x.dtype)
        return y


def test_tensors_that_a_graph_makes_move_along() -> None:
    gm = normfuse.optimize(Positions().eval(), (torch.randn(2, 4),), passes=[])
    assert on_device(gm, "meta") is gm
    with torch.inference_mode():
        assert gm(torch.empty(2, 4, device="meta")).device.type == "meta"
    devices = [v for n in gm.graph.nodes for v in n.kwargs.values() if isinstance(v, torch.device)]
    assert devices == [torch.device("meta")]


def test_saved_program_moves_along(tmp_path: Path) -> None:
    save_program(normfuse.optimize(Positions().eval(), (torch.randn(2, 4),)), tmp_path / "m.pt2")
    module = on_device(load_program(tmp_path / "m.pt2").module(), "meta")
    with torch.inference_mode():
        assert module(torch.empty(2, 4, device="meta")).device.type == "meta"


def test_dtype_changes_a_copy_of_the_model() -> None:
    model, ids = nn.Sequential(nn.Linear(4, 4)).eval(), torch.arange(3)
    source = Source("m", model, (torch.randn(2, 4),), {"ids": ids})
    halved = in_dtype(source, "bf16")
    assert {p.dtype for p in halved.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (halved.args[0].dtype, halved.kwargs["ids"].dtype) == (torch.bfloat16, torch.int64)
    assert in_dtype(source, "fp32") is source


def test_exported_program_keeps_its_dtype() -> None:
    x = torch.randn(2, 4)
    source = Source("m.pt2", torch.export.export(nn.Linear(4, 4), (x,)), (x,))
    with pytest.raises(UsageError, match=r"m\.pt2 is an exported program, whose dtype is fixed: pass --dtype fp32"):
        in_dtype(source, "fp16")
