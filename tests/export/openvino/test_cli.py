"""OpenVINO from the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_runner import Run, runner

pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("onnxscript")

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    return net.eval(), (torch.randn(4, 16),)

def other():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 8)).eval(), (torch.randn(4, 16),)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with runner("openvino_models_of_cli", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


SOURCE = "openvino_models_of_cli:build"


@pytest.mark.slow
def test_export_verify_and_bench(run: Run) -> None:
    code, out, err = run("export", SOURCE, "-o", "m.xml", "--target", "openvino")
    assert code == 0, err
    assert "m.xml: openvino" in out
    assert "compile_model(" in out
    assert all(len(line) <= 80 for line in out.split("m.xml: openvino")[1].splitlines())
    assert Path("m.bin").is_file()
    code, out, err = run("verify", SOURCE, "m.xml")
    assert code == 0, err
    assert "m.xml against" in out
    code, _, err = run("verify", "openvino_models_of_cli:other", "m.xml")
    assert code == 1
    assert "relative error" in err
    code, out, err = run("bench", SOURCE, "--engine", "m.xml", "--against", "openvino", "--rounds", "2", "--warmup", "0", "--json")
    assert code in (0, 1, 3), err
    assert json.loads(out)["b"]["name"] == "m.xml"


def test_the_suffix_is_enough_and_json_tells_all(run: Run) -> None:
    code, out, err = run("export", SOURCE, "-o", "m.xml", "--json", "--dynamic", "batch", "--explain")
    assert code == 0, err
    told = json.loads(out)["export"]
    assert told["target"] == "openvino"
    assert told["norms"] == {"RMS": 1}
    assert told["ran"]["products"] == [2, 0]
    code, out, err = run("run", str(next(Path().glob("*.xml"))))
    assert (code, err) == (0, "")
    assert "float32[1, 8]" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(("-o", "m.xml", "--target", "tensorrt"), "--target is tensorrt: leave --target out", id="target"),
        pytest.param(("-o", "m.xml", "--tune"), "--tune has no meaning for a model of OpenVINO", id="tune"),
        pytest.param(("-o", "m.xml", "--runtime", "1.20"), "--runtime has no meaning", id="runtime"),
        pytest.param(("-o", "m.xml", "--capability", "8.6"), "--capability", id="engine"),
        pytest.param(("-o", "m.xml", "--form", "native"), "no quantized layers", id="form"),
        pytest.param(("-o", "m.ir"), ".xml (a model of OpenVINO)", id="suffix"),
    ],
)
def test_mistakes_are_one_line(run: Run, args: tuple[str, ...], message: str) -> None:
    code, _, err = run("export", SOURCE, *args)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not list(Path().glob("m.*"))
