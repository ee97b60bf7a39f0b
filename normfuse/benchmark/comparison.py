"""Is b faster than a, and how sure is that?"""

import dataclasses
import enum
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normfuse.benchmark.interleave import Measurement
from normfuse.benchmark.machine import Machine
from normfuse.benchmark.statistics import Interval, median_interval

__all__ = ["Comparison", "Timing", "Verdict"]


_ALLOWANCE = 0.05  # the most that noise may excuse


class Verdict(enum.Enum):
    """What a comparison says about a demanded speedup.

    `HOLDS` and `FAILS` are as sure as the interval; `UNDECIDED` means that the interval is too wide to tell.
    """

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


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

    def verdict(self, at_least: float | None = None) -> Verdict:
        """Is b at least `at_least` times as fast as a?

        `HOLDS` when the whole interval of the speedup lies above the bound. `FAILS` when all of it lies below the
        demand; without one, when all of it lies below 1 and b differs from a by more than a differs from itself.
        `UNDECIDED` otherwise. Failing whenever the lower end is below 1 minus the noise would fail an engine that
        equals a one time in four: that is the edge of one interval against the edge of another of the same width.
        """
        bound = self.default_bound if at_least is None else at_least
        if self.speedup.low >= bound:
            return Verdict.HOLDS
        if at_least is not None:
            return Verdict.FAILS if self.speedup.high < at_least else Verdict.UNDECIDED
        slower = self.speedup.high < 1 and self.speedup.value < 1 - self.noise
        return Verdict.FAILS if slower else Verdict.UNDECIDED

    def slower(self, at_least: float | None = None) -> bool:
        """b is surely slower than demanded."""
        return self.verdict(at_least) is Verdict.FAILS

    def to_dict(self) -> dict[str, Any]:
        """Plain data; latencies in milliseconds."""
        return {"schema": 1, "unit": "ms", "noise": self.noise, **dataclasses.asdict(self)}

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
        return "\n".join(row if len(row) <= 80 else row[:79] + "…" for row in rows)
