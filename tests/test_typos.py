"""mypy and pyright find what is misspelt in a user's script, before it runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.checkout]

SCRIPT = """\
import torch
from torch import nn

import normfuse
from normfuse.export import to_onnx, to_tensorrt

model, x = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), torch.randn(2, 64)
fast = normfuse.optimize(model, (x,), quantize="w4a8")
fast = normfuse.optimize(model, (x,), passes=["default", "compress"], verify="each")
spec = normfuse.ShiftQuant(weight_bits=4, activations="static")
written = to_onnx(fast, "model.onnx", target="portable", dtype="fp16")
print(normfuse.report(fast).applied, written.path, normfuse.nn.convert(model, "rms"))

normfuse.optimize(model, (x,), quantize="w4b8")  # typo
normfuse.optimize(model, (x,), verify="never")  # typo
normfuse.optimize(model, (x,), passes=["afine"])  # typo
normfuse.ShiftQuant(activations="dynamik")  # typo
to_onnx(fast, "model.onnx", target="onnxruntim")  # typo
to_onnx(fast, "model.onnx", optset=17)  # typo
to_tensorrt(fast, "model.engine", flavour="rtxx")  # typo
normfuse.nn.convert(model, "rsm")  # typo
normfuse.fold(model, verify="ends")  # typo
normfuse.optimise(model)  # typo
normfuse.report(fast).aplied  # typo
"""
WRONG = {i for i, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# typo")}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_mypy_finds_every_typo_and_nothing_else(script: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", "--follow-imports=silent", str(script)],
        capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
    )  # fmt: skip
    lines = {int(n) for n in re.findall(r"script\.py:(\d+): error", found.stdout)}
    assert lines == WRONG, found.stdout + found.stderr


def test_pyright_finds_every_typo_and_nothing_else(script: Path) -> None:
    name = next((n for n in ("pyright", "basedpyright") if shutil.which(n)), None)
    if name is None:
        pytest.skip("pyright is not installed")
    settings = {"include": [str(script)], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (script.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    found = subprocess.run(
        [name, "--outputjson", "--pythonpath", sys.executable, "--project", str(script.parent)],
        capture_output=True, text=True, cwd=script.parent, timeout=600, check=False,
    )  # fmt: skip
    told = json.loads(found.stdout)["generalDiagnostics"]
    lines = {d["range"]["start"]["line"] + 1 for d in told if d["severity"] == "error"}
    assert lines == WRONG, found.stdout
