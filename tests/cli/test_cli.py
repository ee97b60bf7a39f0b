"""The command line: exit codes, one clear message a mistake, no partial file, JSON, and the whole way for a small model."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from normfuse.reports.report import Report
from tests.cli_runner import Run, runner

MODELS = """
import torch
from torch import nn

def build():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    with torch.no_grad():
        m[1].running_mean.normal_()
        m[1].running_var.uniform_(0.5, 2)
    return m, (torch.randn(2, 3, 8, 8),)

def of_dtype(dtype):
    m, (x,) = build()
    return m.to(dtype), (x.to(dtype),)

def bfloat16():
    return of_dtype(torch.bfloat16)

def float64():
    return of_dtype(torch.float64)

def bare():
    return build()[0]

def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def other():
    m, x = build()
    m[4].bias.data += 1
    return m, x

class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def untraceable():
    return Branches(), (torch.ones(2),)

def interrupted():
    raise KeyboardInterrupt

def normed():
    return nn.Sequential(nn.RMSNorm(8)), (torch.randn(2, 8),)

def large():
    return nn.Linear(256, 256), (torch.zeros(1, 256),)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process, in a folder with `models.py`; (exit code, standard output, standard error)."""
    with runner("models", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


def files() -> set[str]:
    return {p.name for p in Path().iterdir()} - {"models.py", "__pycache__"}


def command(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300, check=False, **options)  # type: ignore[call-overload,no-any-return]


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_optimized_model_is_saved_with_its_report_and_computes_the_same(run: Run) -> None:
    code, out, _ = run("optimize", "models:build", "-o", "fast.pt2", "--report", "report.html")
    assert code == 0
    assert "1 BatchNorm folded away" in out
    assert files() == {"fast.pt2", "report.html"}
    from normfuse.pt2 import read_report

    report = Report.from_json(read_report("fast.pt2") or "")
    assert report.norms_before == {"batch_norm": 1}
    assert report.exact is not None
    assert run("verify", "models:build", "fast.pt2")[0] == 0
    program = torch.export.load("fast.pt2")
    assert not any("batch_norm" in str(n.target) for n in program.graph.nodes)


def test_saved_model_can_be_optimized_again(run: Run) -> None:
    assert run("optimize", "models:build", "-o", "once.pt2", "-q")[0] == 0
    code, out, _ = run("optimize", "once.pt2", "-o", "twice.pt2", "--json")
    assert code == 0
    assert Report.from_json(out).applied == ()
    assert run("verify", "models:build", "twice.pt2")[0] == 0


def test_a_module_for_pytorch_says_what_was_measured(run: Run) -> None:
    code, out, _ = run("optimize", "models:normed", "-o", "here.pt2", "--target", "pytorch", "--json")
    assert code == 0
    names = [p["name"] for p in json.loads(out)["passes"]]
    assert names[-7:] == [
        "rms_norm_linear", "add_rms_norm", "rms_norm", "add_crms_norm", "crms_norm", "l1_norm", "two_pass_softmax",
    ]  # fmt: skip
    assert run("verify", "models:normed", "here.pt2")[0] == 0


def test_export_explains_each_site(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    code, out, _ = run("export", "models:normed", "-o", "explained.onnx", "--opset", "20", "--explain")
    assert code == 0
    assert "1 of 1 sites plainer than wanted" in out
    assert "what became of each site" in out
    assert "arithmetic; opset 20 has no RMSNormalization (would help: opset 23 or newer)" in out
    assert run("export", "models:normed", "-o", "explained.engine", "--explain")[0] == 2


@pytest.mark.slow
def test_exported_model_is_verified_and_inspected(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    code, out, _ = run("export", "models:build", "-o", "fast.onnx", "--json", "--report", "report.json")
    assert code == 0
    data = json.loads(out)
    assert data["export"]["norms"] == {}
    assert data["report"] == json.loads(Path("report.json").read_text())
    code, out, _ = run("verify", "models:build", "fast.onnx", "--json")
    assert code == 0
    assert json.loads(out)["holds"]
    code, out, _ = run("inspect", "fast.onnx", "--json")
    assert code == 0
    assert json.loads(out)["ops"]["Conv"] == 1
    assert "normfuse.version" in json.loads(out)["provenance"]
    code, out, _ = run("verify", "fast.onnx", "fast.onnx")
    assert code == 0
    assert "0.0e+00 relative" in out


@pytest.mark.parametrize(
    ("source", "options", "bound"),
    [
        ("models:bfloat16", (), "1e-01"),
        ("models:float64", (), "1e-04"),
        ("models:build", ("--dtype", "fp16"), "2e-02"),
        ("models:bfloat16", ("--dtype", "fp16", "--io-dtype", "low"), "1e-01"),
    ],
)
def test_a_file_in_another_dtype_is_verified_against_its_model(run: Run, source: str, options: tuple[str, ...], bound: str) -> None:
    pytest.importorskip("onnxruntime")
    assert run("export", source, "-o", "m.onnx", *options)[0] == 0
    code, out, err = run("verify", source, "m.onnx")
    assert (code, err) == (0, "")
    assert f"(bound {bound})" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    code, _, err = run("verify", source, "m.onnx", "--tolerance", "1e-12")
    assert code == 1
    assert "above 1e-12" in err


def test_a_repository_is_described_where_it_stands(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    code, out, _ = run("export", "models:bfloat16", "--repository", "served", "--runtime", "1.20")
    assert code == 0
    (line,) = (line for line in out.splitlines() if "model.onnx:" in line)
    assert Path(line.partition(":")[0]).is_file()
    assert "computes in bfloat16" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run("inspect", line.partition(":")[0])
    assert "normfuse.runtime: 1.18" in out
    assert max(map(len, out.splitlines())) <= 80


def test_dynamic_batch_reaches_the_file(run: Run) -> None:
    ort = pytest.importorskip("onnxruntime")
    assert run("export", "models:bare", "--shape", "2x3x8x8", "--dynamic", "batch", "-o", "fast.onnx", "-q")[0] == 0
    session = ort.InferenceSession("fast.onnx")
    name = session.get_inputs()[0].name
    assert session.run(None, {name: torch.randn(5, 3, 8, 8).numpy()})[0].shape == (5, 10)


def test_named_axes_with_limits_reach_the_file(run: Run) -> None:
    ort = pytest.importorskip("onnxruntime")
    axes = ("--dynamic", "input:0=n..64", "--dynamic", "height:5..40,input:3=w")
    assert run("export", "models:convolution", "--shape", "2x3x16x16", *axes, "-o", "fast.onnx", "-q")[0] == 0
    session = ort.InferenceSession("fast.onnx")
    assert session.get_inputs()[0].shape == ["n", 3, "height", "w"]
    assert session.run(None, {"input": torch.randn(5, 3, 9, 12).numpy()})[0].shape == (5, 4, 7, 10)


def test_axes_are_free_in_optimize_and_verify_alike(run: Run) -> None:
    axes = ("--shape", "2x3x16x16", "--dynamic", "height,input:3=w..40")
    assert run("optimize", "models:convolution", *axes, "-o", "fast.pt2", "-q")[0] == 0
    (x,) = (n for n in torch.export.load("fast.pt2").graph.nodes if n.name == "input")
    assert [isinstance(size, int) for size in x.meta["val"].shape] == [True, True, False, False]
    assert run("verify", "models:convolution", *axes, "-q")[0] == 0


def test_what_a_tokenizer_gives_can_be_fed(run: Run) -> None:
    ort = pytest.importorskip("onnxruntime")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=40, max_position_embeddings=32
    )
    transformers.BertModel(config).save_pretrained("bert")
    assert run("export", "hf:bert", "--dynamic", "batch,seq", "-o", "bert.onnx", "-q")[0] == 0
    session = ort.InferenceSession("bert.onnx")
    shapes = {i.name: i.shape for i in session.get_inputs()}
    assert shapes == {name: ["batch", "seq"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    encoded = {"input_ids": [[1, 5, 7, 2, 0]], "attention_mask": [[1, 1, 1, 1, 0]], "token_type_ids": [[0] * 5]}
    feed = {name: torch.tensor(ids) for name, ids in encoded.items()}
    expected = transformers.BertModel.from_pretrained("bert").eval()(**feed).last_hidden_state
    got = session.run(None, {name: ids.numpy() for name, ids in feed.items()})[0]
    torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=1e-4, atol=1e-4)


def test_verify_proves_the_rewrites(run: Run) -> None:
    code, out, _ = run("verify", "models:build", "--verify", "each", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["holds"]
    assert data["report"]["exact"]["max_rel"] <= 1e-9


def test_verify_fails_when_the_drift_is_above_the_tolerance(run: Run) -> None:
    code, _, err = run("verify", "models:build", "--tolerance", "0")
    assert code == 1
    assert err.startswith("failed: the drift in float32 is")


def test_verify_of_another_model_fails(run: Run) -> None:
    assert run("optimize", "models:other", "-o", "other.pt2", "-q")[0] == 0
    code, out, err = run("verify", "models:build", "other.pt2", "--json")
    assert code == 1
    assert not json.loads(out)["holds"]
    assert "relative error" in err


def test_verify_without_inputs_does_not_pretend(run: Run) -> None:
    code, _, err = run("verify", "models:bare")
    assert code == 1
    assert "without example inputs" in err


def test_inspect_says_what_would_happen_and_writes_nothing(run: Run) -> None:
    code, out, _ = run("inspect", "models:bare")
    assert code == 0
    assert "batch_norm" in out
    assert "1  folds into 0" in out
    assert files() == set()
    code, out, _ = run("inspect", "models:bare", "--json")
    data = json.loads(out)
    assert data["norms_before"] == {"batch_norm": 1}
    assert data["norms_after"] == {"batch_norm": 0}
    assert {site["path"] for site in data["applied"]} == {"1"}


def test_passes_are_listed_with_their_identities(run: Run) -> None:
    from normfuse.passes import PASSES

    code, out, _ = run("passes", "--json")
    assert code == 0
    listed = json.loads(out)
    assert [p["name"] for p in listed] == list(PASSES)
    assert all(p["identity"] for p in listed)
    code, out, _ = run("passes")
    assert all(name in out for name in PASSES)


def test_passes_can_be_chosen(run: Run) -> None:
    code, out, _ = run("inspect", "models:bare", "--passes", "cleanup", "--json")
    assert code == 0
    assert json.loads(out)["norms_after"] == {"batch_norm": 1}


@pytest.mark.slow
def test_bench_measures_and_judges(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    assert run("export", "models:build", "-o", "fast.onnx", "-q")[0] == 0
    common = ("bench", "models:build", "--engine", "fast.onnx", "--rounds", "2", "--warmup", "0", "--threads", "1", "--json")
    code, out, _ = run(*common, "--at-least", "0.000001")
    assert code == 0
    data = json.loads(out)
    assert (data["a"]["name"], data["b"]["name"]) == ("onnxruntime", "fast.onnx")
    assert data["verdict"] == "holds"
    code, out, err = run(*common, "--at-least", "1000000")
    assert code == 1
    assert json.loads(out)["verdict"] == "fails"
    assert err.splitlines()[-1].startswith("failed: fast.onnx is")


@pytest.mark.slow
def test_bench_and_export_tell_the_report_how_fast(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    quick = ("--rounds", "2", "--warmup", "0", "--threads", "1", "--at-least", "0.000001")
    assert run("bench", "models:build", *quick, "--report", "bench.json", "-q")[0] == 0
    report = Report.from_json(Path("bench.json").read_text())
    assert [(x.engine, x.against, x.threads) for x in report.latencies] == [("onnxruntime-optimized", "onnxruntime", 1)]
    assert report.latencies[0].low <= report.latencies[0].speedup <= report.latencies[0].high
    assert report.norms_before == {"batch_norm": 1}
    assert run("export", "models:build", "-o", "fast.onnx", "--report", "export.json", "-q")[0] == 0
    assert len(Report.from_json(Path("export.json").read_text()).latencies) == 1
    assert run("export", "models:build", "-o", "b.onnx", "--report", "b.json", "-q", "--no-speed-check")[0] == 0
    assert not Report.from_json(Path("b.json").read_text()).latencies


def test_quiet_prints_nothing(run: Run) -> None:
    assert run("optimize", "models:build", "-o", "fast.pt2", "-q") == (0, "", "")


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param("nonsense", "No such command", id="unknown verb"),
        pytest.param("optimize", "Missing argument", id="no source"),
        pytest.param("optimize models:build", "Missing option '-o'", id="no output"),
        pytest.param("optimize nowhere:build -o x.pt2", "no module 'nowhere'", id="no such module"),
        pytest.param("optimize /nowhere.pt2 -o x.pt2", "does not exist", id="missing file"),
        pytest.param("optimize models:build -o x.onnx", "ends in .pt2", id="wrong suffix"),
        pytest.param("optimize models:build -o models.py", "ends in .pt2", id="over a source"),
        pytest.param("optimize models:build -o there.pt2", "exists already", id="existing target"),
        pytest.param("optimize models:build -o nowhere/x.pt2", "does not exist", id="missing folder"),
        pytest.param("optimize models:build -o x.pt2 --report r.txt", ".html or .json", id="report of another kind"),
        pytest.param("optimize models:build -o x.pt2 --report there.json", "exists already", id="existing report"),
        pytest.param("optimize models:build -o x.pt2 --passes affin", "did you mean 'affine'", id="unknown pass"),
        pytest.param("optimize models:build -o x.pt2 --verify maybe", "Invalid value", id="unknown verification"),
        pytest.param("optimize models:bare -o x.pt2", "declares no inputs", id="no inputs"),
        pytest.param(
            "optimize models:bare -o x.pt2 --shape 2x3x9x9", "does not run on the example inputs", id="inputs that do not fit"
        ),
        pytest.param("optimize models:bare -o x.pt2 --shape two", "--shape 'two'", id="shape that cannot be read"),
        pytest.param("optimize models:untraceable -o x.pt2", "could not be captured", id="model that cannot be captured"),
        pytest.param("optimize models:build -o x.pt2 --dynamic time", "not known", id="unknown axis"),
        pytest.param("export models:build -o x.onnx --target phone", "unknown target", id="unknown target"),
        pytest.param("export models:build -o x.onnx --opset 5", "opset 5", id="impossible opset"),
        pytest.param("export models:build -o x.tflite", "ends in .onnx", id="export to another kind"),
        pytest.param(
            "bench models:build --engine eager --against eager --report r.html", "eager runs none", id="report of nothing"
        ),
        pytest.param("bench models:build --report there.json", "exists already", id="existing report of bench"),
        pytest.param("bench models:build --against magic", "unknown engine", id="unknown engine"),
        pytest.param("bench models:build --seconds 0 --against eager --engine eager", "seconds", id="no time"),
        pytest.param(
            "verify models:build x.txt",
            "expected a file that ends in .onnx, .engine, .xml or .pt2",
            id="comparison with another kind",
        ),
        pytest.param("verify models:build --verify off", "verify nothing", id="verification of nothing"),
        pytest.param("inspect missing.onnx", "missing.onnx", id="missing onnx file"),
    ],
)
def test_mistake_is_one_clear_message_and_exit_code_2(run: Run, args: str, message: str) -> None:
    Path("there.pt2").write_text("mine")
    Path("there.json").write_text("mine")
    code, out, err = run(*args.split())
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert files() == {"there.pt2", "there.json"}
    assert Path("there.pt2").read_text() == "mine"


def test_traceback_is_logged_on_demand(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "normfuse")
    assert run("optimize", "nowhere:build", "-o", "x.pt2", "-vv")[0] == 2
    assert any(r.exc_info for r in caplog.records)


def test_existing_target_is_replaced_on_demand(run: Run) -> None:
    Path("fast.pt2").write_text("old")
    assert run("optimize", "models:build", "-o", "fast.pt2", "--force", "-q")[0] == 0
    assert torch.export.load("fast.pt2") is not None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_an_error(run: Run) -> None:
    Path("locked").mkdir(mode=0o555)
    code, _, err = run("optimize", "models:build", "-o", "locked/x.pt2")
    assert code == 2
    assert "not writable" in err


def test_interrupt_while_loading(run: Run) -> None:
    code, _, err = run("optimize", "models:interrupted", "-o", "x.pt2")
    assert code == 130
    assert "interrupted" in err
    assert files() == set()


@pytest.mark.parametrize(
    ("target", "args"),
    [
        pytest.param("torch.export.save", ("optimize", "models:build", "-o", "x.pt2"), id="optimize"),
        pytest.param("normfuse.export.onnx.medium.append_metadata", ("export", "models:build", "-o", "x.onnx"), id="export"),
    ],
)
def test_interrupt_while_writing_leaves_no_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, target: str, args: tuple[str, ...]
) -> None:
    reached = []

    def interrupt(*_args: object, **_kwargs: object) -> None:
        reached.append(sorted(p.name for p in Path().iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(target, interrupt)
    code, _, _ = run(*args)
    assert code == 130
    assert any(name.startswith(".normfuse-") for name in reached[0]), "the temporary folder stood beside the target"
    assert files() == set()


def test_unexpected_error_asks_for_a_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr("normfuse.api.optimize", wrong)
    code, _, err = run("optimize", "models:build", "-o", "x.pt2")
    assert code == 2
    assert "ZeroDivisionError: by accident" in err
    assert "please report" in err


# -- in a process of its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [(), *((v,) for v in ("optimize", "export", "bench", "verify", "inspect", "passes", "demo"))], ids=str
)
def test_help_is_instant(args: tuple[str, ...]) -> None:
    code = f"import sys; from normfuse.cli import main; c = main([*{args!r}, '--help']); print('torch' in sys.modules); sys.exit(c)"
    found = command("-c", code)
    assert found.returncode == 0, found.stderr
    assert "Usage: normfuse" in found.stdout
    assert found.stdout.endswith("False\n"), "torch was imported for a help text"


def test_module_is_the_command() -> None:
    found = command("-m", "normfuse", "--version")
    assert found.returncode == 0
    assert found.stdout.startswith("normfuse, version ")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX locale")
def test_names_that_are_not_ascii_in_a_locale_that_is(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "models.py").write_text(MODELS, encoding="utf-8")
    paths = os.pathsep.join(p for p in sys.path if p)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    found = command("-m", "normfuse", "export", "models:build", "-o", "zwölf.onnx", cwd=tmp_path, env=os.environ | locale)
    assert found.returncode == 0, found.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"models.py", "zwölf.onnx"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("args", [("optimize", "-o", "x.pt2"), ("export", "-o", "x.onnx")], ids=["optimize", "export"])
def test_full_disk_is_an_error_without_a_partial_file(tmp_path: Path, args: tuple[str, ...]) -> None:
    import resource

    (tmp_path / "models.py").write_text(MODELS, encoding="utf-8")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    verb, *rest = args
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
    found = command("-m", "normfuse", verb, "models:large", *rest, cwd=tmp_path, preexec_fn=limit, env=environment)
    assert found.returncode == 2, found.stderr
    assert "cannot write x." in found.stderr
    assert "Traceback" not in found.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["models.py"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_signal_ends_the_process_with_130(tmp_path: Path, number: signal.Signals) -> None:
    # the factory raises the signal in its own process, so that it arrives while the command is at work
    (tmp_path / "models.py").write_text(
        f"import os\ndef build():\n    os.kill(os.getpid(), {int(number)})\n    import time; time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}

    def heard() -> None:
        signal.signal(
            number, signal.SIG_DFL
        )  # a shell that runs the tests in the background ignores SIGINT, and so would the child

    run = ("-m", "normfuse", "optimize", "models:build", "-o", "x.pt2")
    found = command(*run, cwd=tmp_path, env=environment, preexec_fn=heard)
    assert found.returncode == 130, found.stderr
    assert "Traceback" not in found.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["models.py"]
