"""`--quantize`, `--keep` and `--calibration` on the command line: what they do, and one clear line a mistake."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from normfuse.pt2 import load_program
from normfuse.reports.report import Report
from tests.cli_runner import Run, runner

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    with torch.no_grad():
        m[1].running_mean.normal_()
        m[1].running_var.uniform_(0.5, 2)
    return m, (torch.randn(2, 3, 8, 8),)

def data():
    for seed in range(3):
        yield torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

def other():
    m, x = build()
    with torch.no_grad():
        m[4].weight.copy_(m[4].weight.flip(0))
    return m, x

def number():
    return 3

def quiet():
    return build()[0]
"""

SIZE = ("--quantize", "w8a8,prefer=size")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process, in a folder with `models.py`; (exit code, standard output, standard error)."""
    with runner("models", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


def test_optimize_writes_a_program_that_loads_and_runs_alike(run: Run) -> None:
    np.save("data.npy", np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32))
    code, out, err = run("optimize", "models:build", *SIZE, "--calibration", "data.npy", "-o", "small.pt2", "--report", "r.json")
    assert (code, err) == (0, "")
    assert "quantized 2 of 2 layers" in out
    report = Report.from_json(Path("r.json").read_text())
    assert [(e.path, e.weight_bits) for e in report.quantization] == [("0", 8), ("4", 8), ("outputs", None)]
    module = load_program("small.pt2").module()
    assert any("shiftquant_conv2d" in str(n.target) for n in module.graph.nodes)
    import models  # type: ignore[import-not-found]

    model, (x,) = models.build()
    with torch.no_grad():
        y, found = model.eval()(x), module(x)
    assert float(10 * torch.log10(y.square().sum() / (y - found).square().sum())) > 30


def test_verify_and_json(run: Run) -> None:
    code, out, err = run("verify", "models:build", *SIZE, "--keep", "4", "--calibration", "models:data", "--json")
    assert (code, err) == (0, "")
    report = Report.from_json(json.dumps(json.loads(out)["report"]))
    kept = [e for e in report.quantization if e.kept]
    assert [(e.path, e.kept) for e in kept] == [("4", "kept in float by --keep '4'")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small.onnx", "small.pt2"])
def test_verify_holds_a_quantized_file_to_the_sqnr_that_it_states(run: Run, name: str) -> None:
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    command = ("export",) if name.endswith(".onnx") else ("optimize",)
    assert run(*command, "models:build", *SIZE, "--calibration", "models:data", "-o", name)[0] == 0
    code, out, err = run("verify", "models:build", name)
    assert (code, err) == (0, "")
    assert re.search(r"; quantized: \d+\.\d dB \(at least \d+\.\d dB\)$", " ".join(out.split()))
    code, out, err = run("verify", "models:build", name, "--json")
    told = json.loads(out)
    assert (code, told["holds"], told["bound"]) == (0, True, None)
    assert told["sqnr"] > told["least_sqnr"] > 10
    # of another model it is no file; and a bound that is stated is the one that counts
    code, out, err = run("verify", "models:other", name)
    assert code == 1
    assert "the SQNR is " in err
    code, out, err = run("verify", "models:build", name, "--tolerance", "1e-6")
    assert code == 1
    assert "the relative error is" in err


@pytest.mark.slow
def test_verify_asks_for_a_bound_where_a_quantized_file_states_no_sqnr(run: Run) -> None:
    onnx = pytest.importorskip("onnx")
    assert run("export", "models:build", *SIZE, "--calibration", "models:data", "-o", "small.onnx")[0] == 0
    proto = onnx.load("small.onnx")
    kept = [p for p in proto.metadata_props if p.key != "normfuse.sqnr"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, "silent.onnx")
    code, _, err = run("verify", "models:build", "silent.onnx")
    assert code == 1
    assert "does not state its SQNR" in err
    assert run("verify", "models:build", "silent.onnx", "--tolerance", "0.1")[0] == 0


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files_with_names(run: Run, kind: str) -> None:
    data = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32)
    if kind == "npz":
        np.savez("data.npz", data)
    else:
        save_file({"arr_0": data}, "data.safetensors")
    code, _, err = run("verify", "models:build", *SIZE, "--calibration", f"data.{kind}")
    assert (code, err) == (0, "")


MISTAKES = [
    pytest.param(("--quantize", "w4b8"), "'w4b8' is not understood", id="notation"),
    pytest.param((*SIZE, "--keep", "haed"), "keep: no layer matches 'haed'; there are 0, 4", id="keep"),
    pytest.param(("--keep", "4"), "pass --quantize as well", id="keep alone"),
    pytest.param(("--calibration", "one.npy"), "pass --quantize as well", id="calibration alone"),
    pytest.param(("--allow-random-calibration",), "pass --quantize as well", id="random calibration alone"),
    pytest.param((*SIZE, "--calibration", "empty.npy"), "--calibration empty.npy: it holds no samples", id="empty"),
    pytest.param((*SIZE, "--calibration", "nowhere.npy"), "--calibration nowhere.npy does not exist", id="no file"),
    pytest.param(
        (*SIZE, "--calibration", "nowhere"),
        "expected a folder of images, a file (.npz, .npy, .safetensors, .txt, .jsonl), package.module:factory or FILE.py:factory",
        id="no kind",
    ),
    pytest.param((*SIZE, "--calibration", "models:dta"), "models has no 'dta'; did you mean 'data'?", id="factory"),
    pytest.param((*SIZE, "--calibration", "modles:data"), "there is no module 'modles'", id="module"),
    pytest.param(
        (*SIZE, "--calibration", "models:number"), "the factory returned a int; expected an iterable of batches", id="number"
    ),
    pytest.param((*SIZE, "--calibration", "one.npy"), "it holds 1 samples, one batch of the example inputs has 2", id="few"),
    pytest.param((*SIZE, "--calibration", "narrow.npy"), "batch 0 ((2, 3, 4, 4)) does not run", id="shape"),
    pytest.param((*SIZE, "--calibration", "nan.npy"), "batch 1 ((2, 3, 8, 8)) holds NaN", id="NaN"),
    pytest.param((*SIZE, "--calibration", "two.npz"), "it holds a, b; the model takes input, and input is missing", id="names"),
    pytest.param((*SIZE, "--calibration", "ids.npy"), "is int64, the model takes float32", id="dtype"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_clear_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    np.save("one.npy", np.zeros((1, 3, 8, 8), np.float32))
    np.save("empty.npy", np.zeros((0, 3, 8, 8), np.float32))
    np.save("narrow.npy", np.zeros((2, 3, 4, 4), np.float32))
    np.save("nan.npy", np.stack([np.zeros((3, 8, 8), np.float32)] * 3 + [np.full((3, 8, 8), np.nan, np.float32)]))
    np.savez("two.npz", a=np.zeros((2, 3)), b=np.zeros((2, 3)))
    np.save("ids.npy", np.zeros((2, 3, 8, 8), np.int64))
    code, out, err = run("verify", "models:build", *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_a_file_needs_to_know_the_batch_size(run: Run) -> None:
    np.save("data.npy", np.zeros((4, 3, 8, 8), np.float32))
    code, _, err = run("verify", "models:quiet", *SIZE, "--calibration", "data.npy")
    assert code == 2
    assert "pass --shape or --input" in err


def test_static_scales_from_one_random_input_are_refused(run: Run) -> None:
    Path("real.py").write_text("from models import quiet as net", encoding="utf-8")
    static = ("--quantize", "w8a8,static,prefer=size")
    code, out, err = run("verify", "real.py:net", "--shape", "2x3x8x8", *static)
    assert (code, out) == (2, "")
    assert "all there is are random data: pass --calibration DATA" in err
    assert "--allow-random-calibration" in err
    code, out, _ = run("verify", "real.py:net", "--shape", "2x3x8x8", *static, "--allow-random-calibration")
    assert code == 0
    assert "against the original (SQNR), on random data (2 samples)" in " ".join(out.split())
    code, _, err = run("verify", "models:build", *static)
    assert code == 2
    assert "all there is are the example inputs" in err
    np.save("images.npy", np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32))
    code, out, _ = run("verify", "real.py:net", "--shape", "2x3x8x8", *static, "--calibration", "images.npy")
    assert code == 0
    assert "on 6 samples of images.npy" in " ".join(out.split())
    assert "drift" not in out


def test_labels_in_a_file_are_left_out_and_other_names_are_suggested(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    images = np.zeros((4, 3, 8, 8), np.float32) + np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    np.savez("labelled.npz", input=images, label=np.arange(4))
    code, out, _ = run("verify", "models:build", *SIZE, "--calibration", "labelled.npz")
    assert code == 0
    assert "on 4 samples of labelled.npz" in " ".join(out.split())
    assert any("label left out" in r.getMessage() for r in caplog.records)
    np.savez("misnamed.npz", inputs=images)
    code, _, err = run("verify", "models:build", *SIZE, "--calibration", "misnamed.npz")
    assert code == 2
    assert "it holds inputs; the model takes input, and input is missing; did you mean 'inputs'?" in err
    assert "np.savez('misnamed.npz', input=...)" in err


def test_quantized_file_says_what_it_is(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    quick = ("--calibration", "models:data", "--no-speed-check")
    code, out, _ = run("export", "models:build", "-o", "q.onnx", *SIZE, *quick, "--report", "q.html")
    assert code == 0
    assert "speed      " not in out
    table = out[out.index("normalizations") :]
    assert "SQNR of the outputs" in table
    assert table.index("weights  ") < table.index("file  ") < table.index("run it:")
    assert max(map(len, out.splitlines())) <= 80
    assert out.count(" dB against") == 1
    assert "q.onnx: onnxruntime" in Path("q.html").read_text(encoding="utf-8")
    code, out, _ = run("inspect", "q.onnx")
    assert "input   input: float32[2, 3, 8, 8]" in out
    assert "needs   " in out
    assert "normfuse.calibration: 6 samples of models:data" in out
    assert "normfuse.drift" not in out
    assert run("export", "models:build", "-o", "f.onnx", "-q")[0] == 0
    code, out, _ = run("inspect", "f.onnx", "q.onnx")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["f.onnx", "q.onnx"]
    assert ["Conv", "1", "-"] in [line.split() for line in lines]
    assert run("inspect", "f.onnx", "models:build")[0] == 2


@pytest.mark.slow
def test_fp32_original_is_measured_against_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("normfuse.cli.exporting.speed._SECONDS", 0.05)
    code, out, _ = run("export", "models:build", "-o", "q.onnx", *SIZE, "--calibration", "models:data", "--json")
    assert code == 0
    speed = json.loads(out)["speed"]
    assert speed["stock"]["a"]["name"] == "the float original"
    assert speed["stock"]["verdict"] in ("holds", "fails", "undecided")
