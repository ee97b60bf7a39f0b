"""The pytest fixture `normfuse_latency`: is b as fast as a, on a machine that may be noisy?

    def test_not_slower(normfuse_latency):
        normfuse_latency(original, optimized, inputs, at_least=1.0)

A test passes where the speedup surely holds, fails where it surely does not, and is skipped with the reason where this machine
cannot tell. What was measured goes into the JUnit file and into the summary at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from normfuse.benchmark import Comparison

__all__ = ["Latency"]

_SECONDS = 10.0
_UNDECIDED = ("skip", "fail", "pass")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("normfuse", "latency tests with normfuse_latency")
    group.addoption(
        "--normfuse-seconds", type=float, default=None, metavar="S", help="Measure each latency test for S seconds (default: 10)."
    )
    group.addoption(
        "--normfuse-undecided", choices=_UNDECIDED, default=None, help="What becomes of a test that this machine cannot decide."
    )
    parser.addini("normfuse_seconds", "Measure each latency test for so many seconds.", default=str(_SECONDS))
    parser.addini(
        "normfuse_undecided", "What becomes of a test that this machine cannot decide: skip, fail or pass.", default="skip"
    )


@dataclass
class Latency:
    """What the fixture `normfuse_latency` gives; call it.

    Attributes:
        seconds: for measuring, unless the call says another time; twice that where the first measurement decides nothing.
        undecided: `skip`, `fail` or `pass`.
        record: takes the name and the value of each property of the test.
        told: a line for each comparison.
    """

    seconds: float
    undecided: str
    record: Callable[[str, object], None]
    told: list[str] = field(default_factory=list)

    def __call__(
        self, a: Any, b: Any, inputs: Any = (), *, at_least: float | None = None, names: tuple[str, str] = ("a", "b"), **bench: Any
    ) -> Comparison:
        """Is `b` at least `at_least` times as fast as `a`?

        Args:
            a, b: modules in eval mode, callables, `.onnx` or `.engine` files; as for `normfuse.bench`.
            inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; given to both.
            at_least: the demanded speedup: 1.5 for "one and a half times as fast", 0.9 for "a tenth slower at the most". None for
                "not slower", where what differs by no more than the noise passes.
            names: how the two are called in messages.
            bench: `seconds`, `rounds`, `threads`, `isolate`, `seed` and `warmup` of `normfuse.bench`.

        Returns:
            The comparison, where the demand holds.
        """
        from normfuse.app.engines import bench as measure
        from normfuse.benchmark import Verdict
        from normfuse.benchmark.decided import decided

        seconds = bench.pop("seconds", self.seconds)
        rounds = bench.pop("rounds", None)

        def measured(times: int) -> Comparison:
            turns = None if rounds is None else times * rounds
            return measure(a, b, inputs, names=names, seconds=times * seconds, rounds=turns, progress=False, **bench)

        found = decided(measured, at_least)
        verdict = found.verdict(at_least)
        self._tell(found, at_least, verdict.value)
        demanded = f"at least {found.bound(at_least):.3g} was demanded"
        if verdict is Verdict.FAILS:
            pytest.fail(f"{found.b.name} is {found.speedup} times as fast as {found.a.name}; {demanded}\n\n{found}", pytrace=False)
        if verdict is Verdict.UNDECIDED:
            why = f"this machine cannot tell: {found.why_undecided(at_least)}; the speedup is {found.speedup}, {demanded}"
            if self.undecided == "fail":
                pytest.fail(f"{why}\n\n{found}", pytrace=False)
            if self.undecided == "skip":
                pytest.skip(why)
        return found

    def _tell(self, found: Comparison, at_least: float | None, verdict: str) -> None:
        values = {
            "speedup": found.speedup.value, "low": found.speedup.low, "high": found.speedup.high, "at_least": found.bound(at_least),
            "verdict": verdict, "noise": found.noise, "disturbed": found.disturbed, "a_ms": found.a.median, "b_ms": found.b.median,
            "rounds": found.rounds, "threads": found.threads, "cpu": found.machine.cpu,
        }  # fmt: skip
        for name, value in values.items():
            self.record(f"normfuse.{found.b.name}.{name}", f"{value:.4g}" if isinstance(value, float) else value)
        self.told.append(f"{verdict:<9} {found.speedup}  {found.b.name} against {found.a.name}")


@pytest.fixture
def normfuse_latency(request: pytest.FixtureRequest) -> Iterator[Latency]:
    """Compares the latency of two models or files: fails where b is too slow, skips where this machine cannot tell."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        pytest.skip(f"{workers} tests run side by side, so that no latency can be measured: run it without -n")
    # what record_property does, without its warning about one of the two formats of JUnit files, which both hold properties
    made = Latency(*_asked(request.config), lambda name, value: request.node.user_properties.append((name, value)))
    yield made
    lines = request.config.stash.setdefault(_TOLD, [])
    lines += [f"{line}  ({request.node.nodeid})" for line in made.told]


_TOLD = pytest.StashKey[list[str]]()


def _asked(config: pytest.Config) -> tuple[float, str]:
    """Seconds, and what becomes of a test that is undecided."""
    seconds = config.getoption("--normfuse-seconds")
    text = config.getini("normfuse_seconds") if seconds is None else seconds
    undecided = config.getoption("--normfuse-undecided") or config.getini("normfuse_undecided")
    try:
        found = float(text)
    except ValueError:
        raise pytest.UsageError(f"normfuse_seconds = {text}: expected a number of seconds") from None
    if found <= 0:
        raise pytest.UsageError(f"normfuse_seconds is {found:g}: expected more than 0")
    if undecided not in _UNDECIDED:
        raise pytest.UsageError(f"normfuse_undecided = {undecided}: expected {', '.join(_UNDECIDED)}")
    return found, undecided


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line for each comparison."""
    lines = config.stash.get(_TOLD, [])
    if lines:
        terminalreporter.section("latency (speedup with its 95 % interval)")
        for line in lines:
            terminalreporter.line(line)
