"""Interleaving, statistics and verdicts of the latency comparison. Nothing here asserts a real time: clocks are stepped by hand."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse import native
from normfuse.app.cuda import for_onnxruntime
from normfuse.app.engines import bench, callable_engine, onnxruntime_engine
from normfuse.app.sources import Source
from normfuse.benchmark import Comparison, Engine, Machine, Measurement, Schedule, Verdict, engine, measure
from normfuse.benchmark.machine import cores
from normfuse.benchmark.statistics import median_interval
from normfuse.benchmark.turns import in_turns
from normfuse.errors import NormfuseError, UsageError
from normfuse.progress import progress_bar
from tests.benchmark.bench_workers import open_and_note, open_dying, open_failing, open_without_torch

QUICK = {"seconds": 0.01, "turn": 0.001, "warmup": 0.0}


class Clock:
    """Stands in for the `time` module of the timing loop: time passes only when an engine says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 0.0

    def engine(self, name: str, seconds: Callable[[], float]) -> Engine:
        def call() -> None:
            self.now += seconds()

        return Engine(name, lambda threads: call)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stepped = Clock()
    monkeypatch.setattr(engine, "time", stepped)
    monkeypatch.setattr("normfuse.benchmark.interleave._SETTLE", 0.0)
    return stepped


def measurement(*columns: list[float], names: tuple[str, ...] = ("a", "a", "b"), disturbed: float = 0.25) -> Measurement:
    rows = tuple(zip(*columns, strict=True))
    machine = Machine("a CPU", 2, "Linux x86_64", "3.11", {"torch": "2.14", "onnxruntime": "1.32"})
    return Measurement(names, rows, tuple(tuple(c) for c in columns), 2, (0, 1), disturbed, machine, Schedule())


def noisy(scale: float, spread: float, seed: int, rounds: int = 15) -> list[float]:
    jitter = torch.randn(rounds, generator=torch.Generator().manual_seed(seed)).tolist()
    return [scale * (1 + spread * j) for j in jitter]


def test_median_interval_holds_the_median_and_repeats() -> None:
    samples = noisy(5.0, 0.1, 0, rounds=25)
    first, second = (median_interval(samples, confidence=0.95, seed=3) for _ in range(2))
    assert first == second
    assert first.low < first.value < first.high
    assert first.value == sorted(samples)[12]
    assert min(samples) <= first.low
    assert first.high <= max(samples)


def test_median_interval_widens_with_confidence() -> None:
    samples = noisy(1.0, 0.1, 1, rounds=25)
    narrow, wide = (median_interval(samples, confidence=c, seed=0) for c in (0.5, 0.99))
    assert wide.low < narrow.low
    assert narrow.high < wide.high


def test_median_interval_of_one_sample_is_that_sample() -> None:
    found = median_interval([2.5], confidence=0.95, seed=0)
    assert (found.low, found.value, found.high) == (2.5, 2.5, 2.5)


def test_median_interval_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        found = median_interval(noisy(1.0, 0.1, seed, rounds=21), confidence=0.95, seed=seed)
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 1.0


def test_speedup_is_a_over_b_in_the_same_round() -> None:
    # the machine slows down threefold half-way: ratios inside a round do not see it
    drift = [1.0] * 6 + [3.0] * 6
    found = Comparison.of(measurement([2 * d for d in drift], [2 * d for d in drift], [1 * d for d in drift]))
    assert found.speedup.value == pytest.approx(2.0)
    assert found.speedup.low == pytest.approx(2.0)
    assert found.itself.value == pytest.approx(1.0)
    assert found.noise == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("b", "spread", "at_least", "verdict"),
    [
        pytest.param(0.5, 0.01, None, Verdict.HOLDS, id="twice as fast"),
        pytest.param(2.0, 0.01, None, Verdict.FAILS, id="half as fast"),
        pytest.param(1.1, 0.005, None, Verdict.FAILS, id="ten percent slower on a quiet machine"),
        pytest.param(1.02, 0.3, None, Verdict.UNDECIDED, id="a machine too noisy to tell"),
        pytest.param(0.5, 0.01, 1.5, Verdict.HOLDS, id="demand met"),
        pytest.param(0.5, 0.01, 2.5, Verdict.FAILS, id="demand missed"),
        pytest.param(1 / 1.04, 0.03, 1.04, Verdict.UNDECIDED, id="demand inside the interval"),
    ],
)
def test_verdict(b: float, spread: float, at_least: float | None, verdict: Verdict) -> None:
    found = Comparison.of(measurement(noisy(1.0, spread, 1), noisy(1.0, spread, 2), noisy(b, spread, 3)))
    assert found.verdict(at_least) is verdict
    assert found.slower(at_least) is (verdict is Verdict.FAILS)


def test_difference_smaller_than_that_of_a_from_itself_is_undecided() -> None:
    # every ratio of b is the same, so that its interval alone would be sure; a differs from itself by 20 %
    a, again = [1.2, 1 / 1.2] * 6, [1 / 1.2, 1.2] * 6
    for b, verdict in ((0.9, Verdict.UNDECIDED), (1.1, Verdict.UNDECIDED), (0.4, Verdict.HOLDS), (2.5, Verdict.FAILS)):
        found = Comparison.of(measurement(a, again, [b] * 12))
        assert found.noise == pytest.approx(0.44)
        assert found.speedup.low == found.speedup.high == pytest.approx(1 / b)
        assert found.verdict() is verdict
    undecided = Comparison.of(measurement(a, again, [0.9] * 12))
    assert undecided.why_undecided().startswith("a differs from itself by 44% here")
    assert json.loads(undecided.to_json())["verdict"] == "undecided"


def test_disturbed_turns_cost_five_percent_of_certainty() -> None:
    def verdict(b: float, disturbed: float) -> Verdict:
        return Comparison.of(measurement([1.0] * 9, [1.0] * 9, [b] * 9, disturbed=disturbed)).verdict(0.95)

    assert verdict(1.02, 0.5) is Verdict.HOLDS
    assert verdict(1.02, 1.0) is Verdict.UNDECIDED
    assert verdict(0.8, 1.0) is Verdict.HOLDS
    assert verdict(1.5, 1.0) is Verdict.FAILS
    found = Comparison.of(measurement([1.0] * 9, [1.0] * 9, [1.02] * 9, disturbed=1.0))
    assert found.why_undecided(0.95).startswith("other processes worked during 100% of the turns")
    assert found.why_undecided(0.5) == ""


def test_medians_that_say_something_else_are_explained() -> None:
    # the machine becomes three times slower in the eighth of 15 rounds, and b alone has one round of grace
    base = [1.0] * 7 + [3.0] * 8
    found = Comparison.of(measurement(base, base, [2.0] * 8 + [6.0] * 7))
    assert (found.speedup.low, found.speedup.value, found.speedup.high) == (0.5, 0.5, 0.5)
    assert found.median_ratio == pytest.approx(1.5)
    assert "medians alone would say 1.500" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    assert "medians alone" not in str(Comparison.of(measurement(base, base, [2 * t for t in base])))


def test_plan_is_told_before_the_first_round(clock: Clock) -> None:
    told: list[Any] = []
    a, b = clock.engine("a", lambda: 0.5), clock.engine("b", lambda: 0.25)
    schedule = Schedule(seconds=15.0, isolate=False, turn=0.25, warmup=0.0)
    measure((a, b), schedule, on_plan=lambda *plan: told.append(plan), on_round=lambda *done: told.append(done))
    assert told[0] == (20, pytest.approx(15.0))
    assert told[1] == (1, 20)


def test_engine_that_equals_the_baseline_is_rarely_called_slower() -> None:
    wrong = [
        Comparison.of(measurement(*(noisy(1.0, 0.01, 3 * seed + i) for i in range(3)))).verdict() is Verdict.FAILS
        for seed in range(100)
    ]
    assert sum(wrong) <= 6


def test_engine_that_is_a_tenth_slower_is_mostly_called_so() -> None:
    found = [
        Comparison.of(measurement(*(noisy(s, 0.01, 3 * seed + i) for i, s in enumerate((1.0, 1.0, 1.1))))).verdict()
        for seed in range(100)
    ]
    assert found.count(Verdict.FAILS) >= 95


def test_noise_excuses_five_percent_at_most() -> None:
    found = Comparison.of(measurement(noisy(1.0, 0.4, 1), noisy(1.0, 0.4, 2), noisy(1.3, 0.4, 3)))
    assert found.noise > 0.05
    assert found.default_bound == 0.95
    assert found.verdict() is not Verdict.HOLDS


def test_noise_is_the_far_edge_of_a_against_itself() -> None:
    found = Comparison.of(measurement([1.03] * 9, [1.0] * 9, [1.0] * 9))
    assert found.noise == pytest.approx(0.03)
    assert found.default_bound == pytest.approx(0.97)


def test_table_fits_80_columns_and_names_the_machine() -> None:
    name = "a very long name of an engine that somebody measured"
    text = str(Comparison.of(measurement([1.0] * 5, [1.0] * 5, [123456.0] * 5, names=(name, name, name))))
    assert max(map(len, text.splitlines())) <= 80
    for fact in ("a CPU", "2 threads", "CPU 0,1", "25%", "5 rounds"):
        assert fact in text


def test_json_holds_every_figure() -> None:
    found = Comparison.of(measurement([2.0] * 5, [2.0] * 5, [1.0] * 5))
    data = json.loads(found.to_json())
    assert data["speedup"]["value"] == 2.0
    assert data["a"]["median"] == 2000.0
    assert data["unit"] == "ms"
    assert data["noise"] == 0.0
    assert data["machine"]["libraries"]["torch"] == "2.14"
    assert data["schema"] == 1


def test_measured_speedup_is_that_of_the_clock(clock: Clock) -> None:
    slow, fast = clock.engine("slow", lambda: 0.003), clock.engine("fast", lambda: 0.001)
    found = Comparison.of(measure((slow, slow, fast), Schedule(rounds=7, isolate=False, turn=0.02)))
    assert found.speedup.value == pytest.approx(3.0)
    assert found.rounds == 7
    assert found.a.median == pytest.approx(3.0)
    assert found.b.minimum == pytest.approx(1.0)


def test_first_call_of_a_turn_does_not_count(clock: Clock) -> None:
    calls = iter([9.0, 9.0, *([5.0, 1.0, 1.0, 1.0] * 50)])  # two warm-up calls, then turns that start cold
    cold = clock.engine("cold", lambda: next(calls))
    steady = clock.engine("steady", lambda: 1.0)
    found = measure((cold, steady), Schedule(rounds=3, isolate=False, turn=7.5, warmup=0.0))
    assert set(found.calls[0]) == {1.0}


def test_turn_of_one_slow_call_counts(clock: Clock) -> None:
    found = measure((clock.engine("a", lambda: 2.0), clock.engine("b", lambda: 1.0)), Schedule(rounds=2, isolate=False, turn=0.1))
    assert found.medians == ((2.0, 1.0), (2.0, 1.0))


@pytest.mark.parametrize(
    ("call", "seconds", "rounds"),
    [
        pytest.param(0.001, 3.0, 6, id="as many as fit"),
        pytest.param(10.0, 3.0, 5, id="never fewer than five"),
        pytest.param(0.001, 1e6, 61, id="never more than sixty-one"),
    ],
)
def test_rounds_follow_the_time(clock: Clock, call: float, seconds: float, rounds: int) -> None:
    engines = [clock.engine(n, lambda: call) for n in ("a", "b")]
    assert len(measure(engines, Schedule(seconds=seconds, isolate=False)).medians) == rounds


def test_every_round_has_every_engine_once_in_shuffled_order(clock: Clock) -> None:
    order: list[str] = []

    def named(name: str) -> Engine:
        def seconds() -> float:
            order.append(name)
            return 1.0

        return clock.engine(name, seconds)

    def turns(seed: int) -> list[tuple[str, ...]]:
        order.clear()
        measure([named(n) for n in "abc"], Schedule(rounds=8, isolate=False, turn=0.5, warmup=0.0, seed=seed))
        taken = order[6:]  # two warm-up calls each
        assert len(taken) % 3 == 0
        return [tuple(taken[i : i + 3]) for i in range(0, len(taken), 3)]

    # a disturbed turn is taken again, which repeats a name; without one every round is a permutation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfuse.benchmark.interleave._RETRIES", 0)
        first = turns(0)
        assert all(sorted(r) == ["a", "b", "c"] for r in first)
        assert len(set(first)) > 1
        assert turns(0) == first
        assert turns(1) != first


def test_disturbed_turns_are_taken_again_and_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.benchmark.interleave.QuietClock.foreign", lambda self, workers: 100.0)
    calls = {"a": 0, "b": 0}

    def counted(name: str) -> Engine:
        def seconds() -> float:
            calls[name] += 1
            return 1.0

        return clock.engine(name, seconds)

    found = measure((counted("a"), counted("b")), Schedule(rounds=2, isolate=False, turn=0.5, warmup=0.0, seconds=100.0))
    assert found.disturbed == 1.0
    assert calls == {"a": 2 + 2 * 3, "b": 2 + 2 * 3}


def test_of_two_calls_neither_is_always_the_second() -> None:
    order: list[str] = []
    pairs = in_turns(lambda: order.append("a"), lambda: order.append("b"), runs=2)
    assert all(len(next(pairs)) == 2 for _ in range(4))
    assert "".join(order) == 2 * "aabbbbaa"


def test_round_callback_counts_up(clock: Clock) -> None:
    seen: list[tuple[int, int]] = []
    engines = [clock.engine(n, lambda: 1.0) for n in ("a", "b")]
    measure(engines, Schedule(rounds=3, isolate=False), on_round=lambda done, planned: seen.append((done, planned)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("a / b") as bar:
        bar.to(1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"seconds": 0}, id="no time"),
        pytest.param({"rounds": 1}, id="one round"),
        pytest.param({"threads": 0}, id="no threads"),
        pytest.param({"restarts": 0}, id="no start"),
        pytest.param({"warmup": -1}, id="negative warm-up"),
    ],
)
def test_impossible_schedule_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Schedule(**wrong)


# -- processes of their own ---------------------------------------------------------------------------------------------


def test_each_engine_has_a_process_of_its_own_and_the_first_one_is_thrown_away(tmp_path: Path) -> None:
    engines = [Engine(n, partial(open_and_note, str(tmp_path), n)) for n in ("a", "b")]
    found = measure(engines, Schedule(rounds=6, threads=1, restarts=2, **QUICK))
    notes = [p.stem.split("-") for p in tmp_path.iterdir()]
    assert sorted(name for name, _ in notes) == ["a", "a", "a", "a", "b", "b"]  # two starts of (throw-away a, a, b)
    pids = {pid for _, pid in notes}
    assert len(pids) == 6
    assert str(os.getpid()) not in pids
    facts = [json.loads(p.read_text()) for p in tmp_path.iterdir()]
    assert all(f["threads"] == 1 and f["omp"] == "1" for f in facts)
    if hasattr(os, "sched_setaffinity"):
        assert found.cpus == cores()[:1]
        assert all(f["cpus"] == list(found.cpus) for f in facts)
    assert len(found.medians) == 6


def test_process_that_dies_is_an_error_that_names_the_engine() -> None:
    with pytest.raises(NormfuseError, match="process of dying ended with 7"):
        measure([Engine("dying", open_dying), Engine("dying", open_dying)], Schedule(**QUICK))


def test_engine_that_cannot_be_opened_says_why() -> None:
    with pytest.raises(NormfuseError, match=r"failing failed .*the file is broken"):
        measure([Engine("failing", open_failing), Engine("failing", open_failing)], Schedule(**QUICK))


def test_engine_that_cannot_be_sent_says_what_to_do() -> None:
    with pytest.raises(NormfuseError, match="isolate=False"):
        measure([Engine("local", lambda threads: lambda: None)] * 2, Schedule(**QUICK))


# -- what users call ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("x", "y", "z")]
    graph = helper.make_graph([helper.make_node("Sub", ["x", "y"], ["z"])], "difference", values[:2], values[2:])
    path = tmp_path_factory.mktemp("onnx") / "difference.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_bench_is_public() -> None:
    assert normfuse.bench is bench


def test_bench_compares_modules_and_puts_the_threads_back() -> None:
    before = torch.get_num_threads()
    calls = {"module": 0}

    def counted(x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        calls["module"] += 1
        return x

    found = bench(
        nn.Linear(4, 4).eval(), counted, torch.randn(2, 4), rounds=2, seconds=0.1, warmup=0.0, threads=2, names=("m", "f")
    )
    assert (found.a.name, found.b.name) == ("m", "f")
    assert not found.isolated
    assert found.rounds == 2
    assert calls["module"] >= 4
    assert torch.get_num_threads() == before


def test_bench_takes_keyword_inputs() -> None:
    seen: list[tuple[float, float]] = []

    def f(x: torch.Tensor, *, y: torch.Tensor) -> None:
        seen.append((float(x), float(y)))

    bench(f, f, {"y": torch.tensor(2.0), "x": torch.tensor(1.0)}, rounds=2, seconds=0.1, warmup=0.0)
    assert set(seen) == {(1.0, 2.0)}


def test_bench_compares_files_in_processes_without_torch(onnx_file: Path) -> None:
    inputs = (torch.ones(2, 3), torch.zeros(2, 3))
    inner = onnxruntime_engine("file", onnx_file, inputs)
    checked = Engine("checked", partial(open_without_torch, inner))
    found = bench(checked, checked, rounds=2, warmup=0.0, threads=1)
    assert found.isolated
    assert found.a.calls > 0


def test_file_gets_its_inputs_by_name_or_by_position(onnx_file: Path) -> None:
    x, y = torch.full((2, 3), 5.0), torch.full((2, 3), 3.0)
    for inputs in ((x, y), {"y": y, "x": x}, {"first": x, "second": y}, {"x": x, "flag": False, "y": y}):
        (difference,) = onnxruntime_engine("file", onnx_file, inputs).open(1)()
        assert (difference == 2.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_file_gets_floats_in_its_own_dtype(onnx_file: Path, dtype: torch.dtype) -> None:
    x, y = torch.full((2, 3), 5.5, dtype=dtype), torch.full((2, 3), 3.0, dtype=dtype)
    (difference,) = onnxruntime_engine("file", onnx_file, (x, y)).open(1)()
    assert (difference == 2.5).all()
    assert difference.dtype == "float32"


def test_original_that_the_runtime_has_no_kernels_for_is_measured_in_float32() -> None:
    given = Source("m", nn.Linear(2, 2).bfloat16(), (torch.ones(1, 2).bfloat16(), torch.ones(1, dtype=torch.int64)))
    found, was = for_onnxruntime(given)
    assert was == "bfloat16"
    assert [t.dtype for t in (found.model.weight, *found.args)] == [torch.float32, torch.float32, torch.int64]
    assert given.model.weight.dtype == given.args[0].dtype == torch.bfloat16
    kept = Source("m", nn.Linear(2, 2).half(), (torch.ones(1, 2).half(),))
    assert for_onnxruntime(kept) == (kept, "")


@pytest.mark.parametrize(
    ("a", "inputs", "message"),
    [
        pytest.param(nn.Linear(2, 2), (), "training mode", id="training mode"),
        pytest.param(3, (), "expected a module", id="no callable"),
        pytest.param("missing.onnx", (), "does not exist", id="missing file"),
        pytest.param("model.pt", (), "only .onnx, .engine", id="other file"),
    ],
)
def test_what_cannot_be_measured_is_an_error(a: Any, inputs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(a, a, inputs)


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
def test_file_with_ops_of_the_library_runs_in_its_kernels(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    types = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 8]) for name in ("x", "y")]
    node = onnx.helper.make_node("TwoPassSoftmax", ["x"], ["y"], domain="normfuse")  # without a function: kernels or nothing
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("normfuse", 1)]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", types[:1], types[1:]), opset_imports=opsets, ir_version=9),
        tmp_path / "own.onnx",
    )
    (y,) = onnxruntime_engine("own", tmp_path / "own.onnx", torch.zeros(2, 8)).open(1)()
    assert torch.equal(torch.from_numpy(y), torch.full((2, 8), 0.125))
    with pytest.raises(NormfuseError, match="cannot load"):
        onnxruntime_engine("own", tmp_path / "own.onnx", torch.zeros(2, 8), kernels=False).open(1)


def test_wrong_number_of_inputs_names_the_expected_ones(onnx_file: Path) -> None:
    with pytest.raises(UsageError, match=r"takes 2 inputs \(x, y\), got 1"):
        onnxruntime_engine("file", onnx_file, torch.zeros(2, 3)).open(1)


def test_broken_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(NormfuseError, match="cannot load"):
        onnxruntime_engine("file", path, ()).open(1)


def test_graph_module_may_be_flagged_as_training() -> None:
    traced = torch.fx.symbolic_trace(nn.Linear(2, 2))
    assert traced.training
    assert callable_engine("traced", traced, torch.zeros(1, 2)).name == "traced"


@pytest.fixture(autouse=True)
def _no_stray_processes() -> Iterator[None]:
    yield
    if sys.platform == "linux":
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()] if children.exists() else []
        assert not [n for n in names if b"normfuse.benchmark.worker" in n]


def test_command_line_says_undecided_with_an_exit_code_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from normfuse.cli import main

    for name in ("a.onnx", "b.onnx"):
        torch.onnx.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), str(tmp_path / name), dynamo=True, verbose=False)
    wobbling = Comparison.of(measurement([1.5, 0.7] * 6, [0.7, 1.5] * 6, [1.0] * 12))
    module = importlib.import_module("normfuse.cli.bench")  # the package holds the command under that name
    monkeypatch.setattr(module, "bench_each", lambda *_, **options: options["on_plan"](12, 90.0) or [wobbling])
    given = ["bench", str(tmp_path / "b.onnx"), "--against", str(tmp_path / "a.onnx")]
    assert main(given) == 3
    out, err = capsys.readouterr()
    assert "at least 0.950: undecided" in out
    assert "measuring for about 90 s, on a busy machine up to twice that: 12 rounds" in err
    assert err.splitlines()[-1].startswith("undecided: a differs from itself by")
    assert main([*given, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["verdict"] == "undecided"
