"""`python -m benchmarks.gpu.first_light`: every step on a device that does nothing, and what becomes of steps that fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "gpu").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)

from benchmarks.gpu.first_light import command, page  # noqa: E402
from benchmarks.gpu.first_light.children import Ended, run_child  # noqa: E402
from benchmarks.gpu.first_light.record import Record, read  # noqa: E402
from benchmarks.gpu.first_light.steps import STEPS, Step  # noqa: E402

DEVICE = {"name": "NVIDIA H200", "capability": "9.0", "memory": 1, "driver": "580.1", "cuda": "13.0"}

SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift 2; done
"$@"
echo "========= ERROR SUMMARY: 0 errors"
exit 0
"""


@pytest.mark.slow
@pytest.mark.checkout
def test_every_step_runs_without_a_device(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(SANITIZER)
    (tools / "compute-sanitizer").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "NORMFUSE_CACHE": str(tmp_path)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    start = [sys.executable, "-m", "benchmarks.gpu.first_light", "--rehearse", "--minutes", "30"]
    start += ["--out", str(tmp_path / "out")]
    done = subprocess.run(start, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800, check=False)
    assert done.returncode == 1, done.stderr
    records = {record.step: record for record in read(tmp_path / "out")}
    assert list(records) == [step.name for step in STEPS]
    # nothing is computed, so that only what compares results finds them wrong, and the model that cannot be made is missed
    wrong = {name for name, record in records.items() if record.status == "wrong"}
    assert wrong == {*(n for n in records if n.startswith("checks: ")), "carried", "models"}
    other = {name: record.status for name, record in records.items() if name not in wrong}
    torchao = importlib.util.find_spec("torchao") is not None
    assert other == dict.fromkeys(other, "ok") | {"products: torchao": "ok" if torchao else "left out"}
    assert all(r.device["name"] == page.REHEARSED and r.versions["torch"] and r.date.endswith("UTC") for r in records.values())

    (warm,) = records["warm"].rows
    assert warm["failed"] == []
    assert warm["compiled"] > 100
    checked = [row for name in records if name.startswith("checks: ") for row in records[name].rows]
    assert {row["dtype"] for row in checked} == {"fp32", "fp16", "bf16"}
    assert len({row["kernel"] for row in checked}) == 8
    assert not [row["failed"] for row in checked if "Error" in row["failed"]]
    assert {row["image"] for row in records["carried"].rows} == {"sm_80", "sm_90a"}
    assert not [row["failed"] for row in records["carried"].rows if "Error" in row["failed"]]
    for row in (*records["products: few rows"].rows, *records["products: many rows"].rows):
        assert row["failed"] == {}
        assert {"fp16 linear", "fp16 linear, compiled", "w8a8", "w4a8, 4 groups", "RMSNorm + linear"} <= set(row["timings"])
    copied, *norms = records["norms"].rows
    assert copied["copy"] > 0
    assert all(row["failed"] == {} and set(row["timings"]) == {"normfuse", "torch", "compile"} for row in norms)
    assert [row["name"] for row in records["models"].rows] == ["small", "broken"]

    text = (tmp_path / "out" / "page.md").read_text()
    assert text.startswith(f"{page.HEADING}\n\nstand-in (sm_90)")
    assert all(f"\n### {name}\n" in text for name in ("Kernels against float64", "Memory-bound kernels", "Products", "Models"))
    assert "26 images: 0 right" in text
    assert "compute-sanitizer, memcheck: ERROR SUMMARY: 0 errors." in text
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n\n{page.HEADING}\n\nNothing yet.\n")
    assert page.put(tmp_path / "out", document) == 2
    assert "Nothing yet." in document.read_text()


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = run_child(["sh", "-c", "sleep 61.37 & echo begun; sleep 61.37"], 4.0, tmp_path / "log", tmp_path)
    assert (ended.code, ended.said) == (None, "begun")
    assert time.monotonic() - start < 50
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert "\nsleep 61.37\n" not in running


@pytest.mark.parametrize(("code", "found"), [("import os; os.abort()", -6), ("raise SystemExit(4)", 4), ("1 / 0", 1), ("", 0)])
def test_a_process_that_ends_by_itself_says_how(code: str, found: int, tmp_path: Path) -> None:
    assert run_child([sys.executable, "-c", code], 30.0, tmp_path / "log", tmp_path).code == found


def _performed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Ended], seconds: float = 100.0) -> list[Record]:
    """`perform` with processes that leave a row each and end as they are told to."""
    limits: dict[str, float] = {}

    def run(arguments: list[str], limit: float, log: Path, folder: Path) -> Ended:
        name, rows = arguments[arguments.index("--step") + 1], Path(arguments[arguments.index("--rows") + 1])
        limits[name] = limit
        rows.write_text(json.dumps({"device": DEVICE} if name == "a" else {"row": name}) + '\n{"cut off')
        return answers[name]

    monkeypatch.setattr(command, "run_child", run)
    steps = [Step(name, 30.0, lambda job: "") for name in answers]
    assert command.perform(steps, tmp_path, seconds) == (1 if any(e.code != 0 for e in answers.values()) else 0)
    assert all(limit <= 30.0 for limit in limits.values())
    return read(tmp_path)


def test_the_next_step_is_done_whatever_became_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "a": Ended(0, 1.0, "NVIDIA H200"),
        "b": Ended(None, 30.0, "compiling"),
        "c": Ended(-11, 2.0, "Segmentation fault"),
        "d": Ended(4, 2.0, "a line\n3 cases are wrong"),
        "e": Ended(0, 2.0, ""),
        "f": Ended(5, 2.0, "torchao is not installed"),
    }
    found = _performed(tmp_path, monkeypatch, answers)
    assert {r.step: r.status for r in found} == {
        "a": "ok", "b": "hung", "c": "failed", "d": "wrong", "e": "ok", "f": "left out",
    }  # fmt: skip
    assert [r.said for r in found] == [
        "", "ended after 30 s; its last words: compiling", "exit code -11: Segmentation fault", "3 cases are wrong", "",
        "torchao is not installed",
    ]  # fmt: skip
    assert all(r.device == DEVICE for r in found)
    assert found[1].rows == [{"row": "b"}]  # what a step had found before it hung
    text = (tmp_path / "page.md").read_text()
    assert "NVIDIA H200 (sm_90), driver 580.1, CUDA 13.0" in text
    assert "| c | failed | 2 |" in text


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Step("a", 30.0, lambda job: "")]
    monkeypatch.setattr(command, "run_child", lambda *given: pytest.fail("a step was begun"))
    assert command.perform(steps, tmp_path, 5.0) == 0
    assert [(r.status, r.said) for r in read(tmp_path)] == [("left out", "the time was over")]


def test_a_step_that_is_done_again_replaces_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _performed(tmp_path, monkeypatch, {"a": Ended(0, 1.0, ""), "b": Ended(-6, 1.0, "abort")})
    found = _performed(tmp_path, monkeypatch, {"a": Ended(0, 1.0, ""), "b": Ended(0, 5.0, "")})
    assert [(r.step, r.status) for r in found] == [("a", "ok"), ("b", "ok")]


def test_without_a_gpu_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command, "run_child", lambda *given: Ended(3, 1.0, "no NVIDIA GPU to run on"))
    assert command.perform(list(STEPS), tmp_path, 100.0) == 2
    assert capsys.readouterr().err == "no NVIDIA GPU to run on\n"
    assert not (tmp_path / "first_light.jsonl").exists()


def test_the_page_takes_the_place_of_the_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _performed(tmp_path, monkeypatch, {"a": Ended(0, 1.0, "")})
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n\nBefore.\n\n{page.HEADING}\n\nNothing yet.\n\n### Old\n\n## After\n\nLast.\n")
    for _ in range(2):
        assert page.put(tmp_path, document) == 0
        text = document.read_text()
        assert text.startswith(f"# Results\n\nBefore.\n\n{page.HEADING}\n\nNVIDIA H200")
        assert text.endswith("\n\n## After\n\nLast.\n")
        assert "Nothing yet." not in text
        assert "### Old" not in text
    assert page.put(tmp_path / "nowhere", document) == 2


def test_unknown_step_is_a_mistake(capsys: Any) -> None:
    assert command.main(["--only", "norms,magic"]) == 2
    assert capsys.readouterr().err.startswith("no step is called 'magic': expected device, warm, checks: products,")
