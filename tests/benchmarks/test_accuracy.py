"""The arithmetic of the accuracy table; its models are measured by the benchmark itself."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.accuracy", reason="the benchmarks are in the repository, not in the package")

from benchmarks import accuracy
from benchmarks.accuracy_subjects import Subject

ROW = accuracy.Row("net", "a net", "W8A8", 200, 199, 180, 181, None, 30.0, {}, 4, 0, 1.0)


def test_wilson_against_published_values():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert accuracy.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert accuracy.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, True, id="agreement"),
        pytest.param({"same": 197}, False, id="too-little-agreement"),
        pytest.param({"setting": "W4A8 ends W8A8", "right": 179}, True, id="one-point"),
        pytest.param({"setting": "W4A8", "right": 178}, False, id="more-than-a-point"),
        pytest.param({"setting": "W4A4", "right": 90}, None, id="no-bar-before-tuning"),
        pytest.param({"setting": "W4A4 +200", "right": 90}, False, id="after-tuning"),
        pytest.param({"perplexity": 1.009}, True, id="text"),
        pytest.param({"perplexity": 1.031, "setting": "W4A8"}, False, id="text-4-bit"),
        pytest.param({"perplexity": 2.0, "setting": "W6A8"}, None, id="text-without-bar"),
    ],
)
def test_bars(change, expected):
    assert accuracy.holds(dataclasses.replace(ROW, **change)) is expected


def test_a_model_is_held_against_its_own_outputs_and_the_table_says_so(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(400, 16)
    best = model(x).topk(2, 1).values
    x = x[(best[:, 0] - best[:, 1]).argsort(descending=True)[:60]]  # no close calls
    subject = Subject("a small net", model, torch.randn(64, 16).split(16), x, model(x).argmax(1), batch=25)
    monkeypatch.setattr(accuracy, "SUBJECTS", {"small": lambda cache: subject})
    monkeypatch.setattr(accuracy.command.params[0].type, "choices", ("small",))
    arguments = ["--subjects", "small", "--settings", "W8A8", "--settings", "W4A8 +200", "--out", str(tmp_path)]
    assert accuracy.main([*arguments, "--threads", str(torch.get_num_threads())]) == 0
    first, second = (line.split("|") for line in (tmp_path / "accuracy.md").read_text().splitlines() if "a small net" in line)
    assert first[4].strip() == second[4].strip() == "100.00%"
    assert first[2].strip() == "W8A8"
    assert first[10].strip() == "yes"
    assert float(first[8]) > 30
