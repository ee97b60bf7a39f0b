"""The page that compares, from figures."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.comparison import PAGE, RESULTS, WAYS, _apart
from benchmarks.comparison_page import Row, page
from normfuse.quant.words import parse_quantize

pytestmark = pytest.mark.checkout


def _row(title: str, speedup: float, *, exact: bool = True) -> Row:
    row = Row(title, "a command", exact, 10, 2, 1.5, error=2e-7)
    row.timed(4.0, speedup, speedup - 0.01, speedup + 0.01)
    return row


def _data(*rows: Row) -> dict[str, Any]:
    model = {"name": "m", "title": "A model", "noise": 0.01, "rows": [asdict(row) for row in rows]}
    machine = {"cpu": "a CPU", "cores": 2, "system": "Linux", "python": "3.11", "libraries": {}}
    return {"date": "2026-11-30", "threads": 2, "machine": machine, "tools": {"onnxslim": "0.1"}, "models": [model]}


def test_the_page_says_plainly_where_others_are_faster() -> None:
    first, ours = _row("the original", 1.0), _row("**normfuse, fp32**", 1.05)
    text = page(_data(first, ours, _row("OpenVINO", 1.2)))
    assert (
        "Of the same function the fastest was OpenVINO (1.20 times); ours was **normfuse, fp32** (1.05), which is slower." in text
    )
    text = page(_data(first, ours, _row("onnxslim", 1.06)))
    assert "which cannot be told from it" in text
    text = page(_data(first, ours, _row("onnxslim", 1.0)))
    assert "the fastest was **normfuse, fp32** (1.05 times)." in text


def test_what_could_not_run_is_named_with_its_reason() -> None:
    text = page(_data(_row("the original", 1.0), Row("onnxsim", "onnxsim a b", True, why_not="ModuleNotFoundError: no | onnxsim")))
    assert "| onnxsim | not run: ModuleNotFoundError: no / onnxsim |" in text
    assert "* onnxsim: `onnxsim a b`" in text


def test_every_way_names_what_anybody_runs() -> None:
    assert all(way.title and way.command for way in WAYS)
    for way in WAYS:
        if "--quantize" in way.command:
            parse_quantize(way.command.split("--quantize ")[1].split()[0])  # it is what the command line understands


@pytest.mark.parametrize(
    "found",
    [
        pytest.param([np.full((1, 2), 1.1, np.float32)], id="ONNX Runtime"),
        pytest.param(torch.full((1, 2), 1.1), id="a tensor"),
        pytest.param({"y": torch.full((1, 2), 1.1)}, id="an output of transformers"),
    ],
)
def test_difference_is_a_share_of_the_outputs(found: Any) -> None:
    assert _apart(np.ones((1, 2), np.float32), found) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.skipif(not RESULTS.exists(), reason="nothing was measured")
def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULTS.read_text(encoding="utf-8")))
