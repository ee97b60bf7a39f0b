"""The fixture `normfuse_latency`, in test files of its own: passes, fails, skips, and what it leaves in the JUnit file."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from importlib.metadata import entry_points
from typing import Any

import pytest

pytest_plugins = ["pytester"]

MODULE = "normfuse.plugs.pytest_latency"
INSTALLED = any(e.value == MODULE for e in entry_points(group="pytest11"))

# The comparison is made up: a test that is timed would fail one day.
FAKE = """
import pytest
from normfuse.benchmark import Comparison, Interval, Machine, Timing
from normfuse.app import engines

asked = []

@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    def bench(a, b, inputs=(), *, names, seconds, rounds=None, progress=True, **more):
        asked.append((seconds, rounds, more))
        low, high, noise = b[-3:] if len(asked) > 1 else b[:3]
        def timing(name, ms):
            return Timing(name, ms, ms, ms, 10)
        speedup, itself = Interval(low, (low + high) / 2, high, 0.95), Interval(1 - noise, 1.0, 1 + noise, 0.99)
        return Comparison(
            timing(names[0], 10.0), timing(names[1], 20.0 / (low + high)), timing(names[0], 10.0), speedup, itself,
            9, 1, (), False, 0.0, Machine("a CPU", 2, "Linux", "3", {}), 0,
        )
    monkeypatch.setattr(engines, "bench", bench)
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This suite may run side by side with itself; the tests within do not."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)


def run(pytester: pytest.Pytester, body: str, *arguments: str, ini: str = "") -> Any:
    pytester.makeconftest(FAKE)
    pytester.makeini(f"[pytest]\n{ini}")
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    pytester.makepyfile(f"from conftest import asked\ndef test_it(normfuse_latency):\n    asked.clear()\n{lines}\n")
    return pytester.runpytest("-p", "no:cacheprovider", *(() if INSTALLED else ("-p", MODULE)), *arguments)


def test_a_speedup_that_holds_passes_and_is_told(pytester: pytest.Pytester) -> None:
    found = run(
        pytester,
        "c = normfuse_latency(None, (1.4, 1.6, 0.01), at_least=1.2, names=('old', 'new'))\nassert c.speedup.low == 1.4",
        "--junitxml=out.xml",
    )
    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["*latency (speedup with its 95 % interval)*", "holds *1.5*new against old*test_it*"])
    properties = {p.get("name"): p.get("value") for p in ET.parse(pytester.path / "out.xml").iter("property")}
    assert properties["normfuse.new.speedup"] == "1.5"
    assert (properties["normfuse.new.verdict"], properties["normfuse.new.at_least"]) == ("holds", "1.2")


def test_a_speedup_that_surely_does_not_hold_fails(pytester: pytest.Pytester) -> None:
    found = run(pytester, "normfuse_latency(None, (0.7, 0.8, 0.01), at_least=1.0, names=('old', 'new'))")
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["new is 0.750 * times as fast as old; at least 1 was demanded"])


def test_what_cannot_be_told_is_skipped_with_the_reason_after_a_longer_try(pytester: pytest.Pytester) -> None:
    body = (
        "try:\n    normfuse_latency(None, (0.9, 1.2, 0.3), at_least=1.0)\n"
        "finally:\n    assert [s for s, *_ in asked] == [10.0, 20.0]"
    )
    found = run(pytester, body, "-rs")
    found.assert_outcomes(skipped=1)
    found.stdout.fnmatch_lines(["*this machine cannot tell: a differs from itself by 30%*"])


@pytest.mark.parametrize(("word", "outcome"), [("fail", "failed"), ("pass", "passed"), ("skip", "skipped")])
@pytest.mark.parametrize("place", ["option", "ini"])
def test_what_becomes_of_it_is_asked_for(pytester: pytest.Pytester, word: str, outcome: str, place: str) -> None:
    body = "normfuse_latency(None, (0.9, 1.2, 0.3), at_least=1.0)"
    option, ini = ((f"--normfuse-undecided={word}",), "") if place == "option" else ((), f"normfuse_undecided = {word}")
    run(pytester, body, *option, ini=ini).assert_outcomes(**{outcome: 1})


def test_a_second_measurement_may_decide(pytester: pytest.Pytester) -> None:
    run(pytester, "normfuse_latency(None, (0.9, 1.2, 0.3, 1.1, 1.2, 0.01), at_least=1.0)").assert_outcomes(passed=1)


def test_time_and_threads_reach_the_measurement(pytester: pytest.Pytester) -> None:
    body = (
        "normfuse_latency(None, (1.4, 1.6, 0.01))\nnormfuse_latency(None, (1.4, 1.6, 0.01), seconds=1, rounds=5, threads=2)\n"
        "assert asked == [(3.0, None, {}), (1, 5, {'threads': 2})]"
    )
    run(pytester, body, "--normfuse-seconds=3").assert_outcomes(passed=1)
    run(pytester, body, ini="normfuse_seconds = 3").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("ini", "message"), [("normfuse_seconds = long", "a number"), ("normfuse_undecided = maybe", "skip, fail, pass")]
)
def test_a_wrong_setting_is_said(pytester: pytest.Pytester, ini: str, message: str) -> None:
    found = run(pytester, "normfuse_latency(None, (1.4, 1.6, 0.01))", ini=ini)
    assert message in found.stdout.str() + found.stderr.str()
    assert found.ret != 0


def test_nothing_is_measured_beside_other_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "4")
    found = run(pytester, "normfuse_latency(None, (1.4, 1.6, 0.01))", "-rs")
    found.assert_outcomes(skipped=1)
    found.stdout.fnmatch_lines(["*4 tests run side by side*"])


@pytest.mark.slow
def test_two_models_are_measured(pytester: pytest.Pytester) -> None:
    """The whole way, with a demand that no machine fails."""
    pytester.makepyfile(
        "import torch\ndef test_it(normfuse_latency):\n"
        "    small, large = torch.nn.Linear(8, 8).eval(), torch.nn.Linear(2048, 2048).eval()\n"
        "    short, x = lambda x: small(x[..., :8]), torch.randn(64, 2048)\n"
        "    found = normfuse_latency(large, short, x, rounds=2, at_least=0.01, warmup=0.0)\n"
        "    assert found.rounds == 2\n"
    )
    pytester.runpytest("-p", "no:cacheprovider", *(() if INSTALLED else ("-p", MODULE))).assert_outcomes(passed=1)
