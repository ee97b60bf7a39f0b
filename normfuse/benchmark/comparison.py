"""Is b faster than a, and how sure is that?"""

import dataclasses
import enum
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from normfuse.benchmark.interleave import Measurement
from normfuse.benchmark.machine import Machine
from normfuse.benchmark.statistics import Interval, median_interval
from normfuse.reports.model import Latency

__all__ = ["Comparison", "Timing", "Verdict"]


_ALLOWANCE = 0.05  # the most that noise may excuse
_DISTURBED = 0.5  # share of disturbed turns above which an interval is not believed to the last percent


class Verdict(enum.Enum):
    """What a comparison says about a demanded speedup, see `Comparison.verdict`.

    `HOLDS` and `FAILS` are as sure as the interval; `UNDECIDED` means that this machine, or this short a measurement, cannot tell.
    """

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


_IN_WORDS: dict[Verdict, Literal["faster", "slower", "undecided"]] = {
    Verdict.HOLDS: "faster", Verdict.FAILS: "slower", Verdict.UNDECIDED: "undecided",
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Latency of one engine, in milliseconds a call.

    Attributes:
        name: the engine.
        median: median over rounds of the median call of a turn.
        minimum: fastest call.
        p90: nine of ten calls were faster.
        calls: number of timed calls.
    """

    name: str
    median: float
    minimum: float
    p90: float
    calls: int

    @classmethod
    def of(cls, name: str, medians: Sequence[float], calls: Sequence[float]) -> "Timing":
        ms = 1e3 * np.asarray(calls)
        return cls(name, float(1e3 * np.median(medians)), float(ms.min()), float(np.quantile(ms, 0.9)), ms.size)


@dataclass(frozen=True)
class Comparison:
    """Latency of b against a; `str()` is a table of at most 80 columns.

    a is measured twice in every round, as if it were two engines. Both count as the baseline of the speedup, and
    what they differ by is the noise of this measurement.

    Attributes:
        a, b: their latencies.
        again: a, measured for the second time.
        speedup: time of a over time of b with its 95 % interval; above 1 b is faster.
        itself: time of a over time of a, with its 99 % interval; 1 on a perfect machine.
        rounds: number of rounds, each with one turn of every engine.
        threads: threads of each engine.
        cpus: logical CPUs that the processes were pinned to; empty when they were not.
        isolated: every engine ran in a process of its own.
        disturbed: share of the turns during which other processes used the CPU.
        machine: where it ran.
        seed: of the order of turns and of the bootstrap.
    """

    a: Timing
    b: Timing
    again: Timing
    speedup: Interval
    itself: Interval
    rounds: int
    threads: int
    cpus: tuple[int, ...]
    isolated: bool
    disturbed: float
    machine: Machine
    seed: int

    @classmethod
    def of(cls, m: Measurement, *, a: int = 0, again: int = 1, b: int = 2) -> "Comparison":
        """Compare engine `b` with engine `a` of a measurement in which `again` is the same engine as `a`."""
        base = [math.sqrt(row[a] * row[again]) for row in m.medians]
        seed = m.schedule.seed

        def timing(i: int) -> Timing:
            return Timing.of(m.names[i], [row[i] for row in m.medians], m.calls[i])

        return cls(
            a=timing(a),
            b=timing(b),
            again=timing(again),
            speedup=median_interval([t / row[b] for t, row in zip(base, m.medians, strict=True)], confidence=0.95, seed=seed),
            itself=median_interval([row[a] / row[again] for row in m.medians], confidence=0.99, seed=seed),
            rounds=len(m.medians),
            threads=m.threads,
            cpus=m.cpus,
            isolated=m.schedule.isolate,
            disturbed=m.disturbed,
            machine=m.machine,
            seed=seed,
        )

    @property
    def noise(self) -> float:
        """How far a strays from itself: 0.02 means that a difference of 2 % may be nothing."""
        return max(1 - self.itself.low, self.itself.high - 1, 0.0)

    @property
    def default_bound(self) -> float:
        """The speedup that is demanded unless another is: 1 minus the noise, but never less than 0.95.

        Without the cap a machine that is noisy enough would let everything pass.
        """
        return 1 - min(self.noise, _ALLOWANCE)

    @property
    def doubt(self) -> float:
        """By how much the interval of the speedup is widened before it is judged, as a share of the speedup.

        0 on a machine that can tell. Where a differs from itself by more than 5 %, that difference; where other processes
        worked during more than half of the turns, at least 5 %. A difference that is larger than the doubt is decided all the same.
        """
        doubt = self.noise if self.noise > _ALLOWANCE else 0.0
        return max(doubt, _ALLOWANCE) if self.disturbed > _DISTURBED else doubt

    def verdict(self, at_least: float | None = None) -> Verdict:
        """Is b at least `at_least` times as fast as a?

        With low and high the ends of the speedup's interval, divided and multiplied by 1 + `doubt`:

        * `HOLDS`: low is at or above the bound, which is `at_least`, else `default_bound`.
        * `FAILS`: high is below `at_least`; without a demand, high is below 1 and b differs from a by more than a differs
          from itself.
        * `UNDECIDED`: neither; `why_undecided` says what is in the way.

        Failing whenever the lower end is below 1 minus the noise would fail an engine that equals a one time in four: that is
        the edge of one interval against the edge of another of the same width.
        """
        low, high = self.speedup.low / (1 + self.doubt), self.speedup.high * (1 + self.doubt)
        if low >= self.bound(at_least):
            return Verdict.HOLDS
        if at_least is not None:
            return Verdict.FAILS if high < at_least else Verdict.UNDECIDED
        return Verdict.FAILS if high < 1 and self.speedup.value < 1 - self.noise else Verdict.UNDECIDED

    def bound(self, at_least: float | None = None) -> float:
        """The speedup that is demanded."""
        return self.default_bound if at_least is None else at_least

    def why_undecided(self, at_least: float | None = None) -> str:
        """What keeps the verdict open, and what would help; empty when it is decided."""
        if self.verdict(at_least) is not Verdict.UNDECIDED:
            return ""
        if self.noise > _ALLOWANCE:
            return f"{self.a.name} differs from itself by {self.noise:.0%} here; close other programs, or use a quieter machine"
        if self.disturbed > _DISTURBED:
            return f"other processes worked during {self.disturbed:.0%} of the turns; close them, or measure for longer (seconds)"
        inside = f"the interval [{self.speedup.low:.3f}, {self.speedup.high:.3f}] reaches below {self.bound(at_least):.3f}"
        return f"{inside}; measure for longer (seconds)"

    @property
    def median_ratio(self) -> float:
        """Median of a over median of b, each over all rounds; not the speedup, whose ratios are taken inside a round."""
        return math.sqrt(self.a.median * self.again.median) / self.b.median

    @property
    def medians_disagree(self) -> bool:
        """The medians say something that the speedup rules out: the machine's speed changed between rounds."""
        return not self.speedup.low <= self.median_ratio <= self.speedup.high

    def latency(self, engine: str = "", against: str = "") -> Latency:
        """As a report shows it, under other names where they are given."""
        return Latency(
            engine or self.b.name, against or self.a.name, self.b.median, self.a.median,
            self.speedup.value, self.speedup.low, self.speedup.high, self.threads, _IN_WORDS[self.verdict(1.0)],
        )  # fmt: skip

    def slower(self, at_least: float | None = None) -> bool:
        """b is surely slower than demanded."""
        return self.verdict(at_least) is Verdict.FAILS

    def to_dict(self) -> dict[str, Any]:
        """Plain data; latencies in milliseconds; `verdict` is that of `verdict()`."""
        told = {"verdict": self.verdict().value, "why_undecided": self.why_undecided(), "median_ratio": self.median_ratio}
        return {"schema": 1, "unit": "ms", "noise": self.noise, "doubt": self.doubt, **told, **dataclasses.asdict(self)}

    def to_json(self, *, indent: int = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        width = max(12, min(30, max(len(t.name) for t in (self.a, self.b)) + 8))
        rows = [f"{'engine':<{width}} {'median ms':>10} {'min ms':>10} {'p90 ms':>10} {'calls':>7}"]
        for timing, name in ((self.a, self.a.name), (self.again, f"{self.a.name} (again)"), (self.b, self.b.name)):
            label = name if len(name) <= width else name[: width - 1] + "…"
            rows.append(f"{label:<{width}} {timing.median:>10.3f} {timing.minimum:>10.3f} {timing.p90:>10.3f} {timing.calls:>7}")
        where = "each in a process of its own" if self.isolated else "in one process"
        pinned = f", on CPU {','.join(map(str, self.cpus))}" if self.cpus else ""
        libraries = ", ".join(f"{k} {v}" for k, v in self.machine.libraries.items() if k in ("torch", "onnxruntime"))
        rows += [
            "",
            f"speedup         {self.speedup}  (95 % interval; above 1 is faster)",
            f"against itself  {self.itself}  (99 % interval; noise {self.noise:.1%})",
            f"{self.rounds} rounds, {where}, {self.disturbed:.0%} of turns disturbed by others",
            f"{self.threads} thread{'s' if self.threads > 1 else ''}{pinned}",
            f"{self.machine.cpu}, {self.machine.cores} cores, {libraries}",
        ]
        if self.medians_disagree:
            rows += [
                f"The medians alone would say {self.median_ratio:.3f}: the machine changed its speed between rounds.",
                "The speedup compares inside each round, so that it is the one to believe.",
            ]
        return "\n".join(row if len(row) <= 80 else row[:79] + "…" for row in rows)
