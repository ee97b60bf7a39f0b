"""Who runs when.

Every round gives each engine one turn, in an order drawn anew, so that a machine that warms up or gets busy hits all
of them alike. Ratios are taken inside a round.
"""

import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from normfuse.benchmark.engine import Engine, Local, Runner, Turn
from normfuse.benchmark.machine import Machine, QuietClock, cores
from normfuse.benchmark.workers import Worker
from normfuse.errors import UsageError

__all__ = ["Measurement", "Schedule", "measure"]

_FEWEST, _MOST = 5, 61  # rounds
_PER_START = 3  # rounds that are worth starting all processes again
_RETRIES = 2
_SETTLE = 0.05  # seconds between turns: spinning threads of the last engine go to sleep
_FOREIGN = 0.15  # share of one core that other processes may use during a turn
_TICKS = 0.02  # seconds: resolution of the operating system's accounting
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long and how often.

    Attributes:
        seconds: time for measuring, without loading and warming up; exceeded only to reach 5 rounds.
        rounds: exact number of rounds instead of what fits into `seconds`.
        warmup: seconds of warm-up for each engine, at least two calls.
        turn: seconds of one turn, at least one call.
        threads: threads of each engine; None means one for each physical core.
        isolate: each engine in a process of its own.
        restarts: how often processes are started anew, rounds being spread over them evenly.
        seed: of the order of turns and of the bootstrap.
    """

    seconds: float = 20.0
    rounds: int | None = None
    warmup: float = 0.5
    turn: float = 0.25
    threads: int | None = None
    isolate: bool = True
    restarts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.turn <= 0 or self.warmup < 0:
            raise UsageError(f"seconds and turn must be positive and warmup not negative, got {self}")
        if self.rounds is not None and self.rounds < 2:
            raise UsageError(f"a comparison needs at least 2 rounds, got {self.rounds}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        if self.restarts < 1:
            raise UsageError(f"restarts must be at least 1, got {self.restarts}")


@dataclass(frozen=True)
class Measurement:
    """What the clock said.

    Attributes:
        names: the engines.
        medians: (rounds, engines), median seconds of a call in that turn.
        calls: per engine, seconds of every call.
        threads: threads of each engine.
        cpus: logical CPUs that the processes were pinned to; empty when they were not.
        disturbed: share of the turns during which other processes used the CPU.
        machine: where it ran.
        schedule: how it was asked for.
    """

    names: tuple[str, ...]
    medians: tuple[tuple[float, ...], ...]
    calls: tuple[tuple[float, ...], ...]
    threads: int
    cpus: tuple[int, ...]
    disturbed: float
    machine: Machine
    schedule: Schedule


def measure(
    engines: Sequence[Engine],
    schedule: Schedule | None = None,
    *,
    on_plan: Callable[[int, float], None] | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Time `engines` against each other, interleaved.

    Args:
        engines: two or more; the same engine may stand in the list twice.
        schedule: how long and how often.
        on_plan: told (rounds planned, seconds of wall time that all of it takes from now on) once the engines have been opened
            for the first time, when their latencies are known.
        on_round: told (rounds done, rounds planned) after each round.

    Raises:
        NormfuseError: an engine could not be opened or failed while it ran.
    """
    schedule = schedule or Schedule()
    here = cores()
    threads = schedule.threads or len(here)
    cpus = here[:threads] if schedule.isolate and threads <= len(here) else ()
    rounds = _Rounds(schedule, random.Random(schedule.seed), tuple([] for _ in engines))
    planned, starts, start = 0, 1, 0
    began = time.perf_counter()
    while start < starts:
        with _opened(engines, threads, cpus, schedule, rounds.rng) as runners:
            slowest = [runner.warm_up(schedule.warmup) for runner in runners]
            if start == 0:
                planned = _rounds(schedule, slowest)
                starts = max(1, min(schedule.restarts, planned // _PER_START)) if schedule.isolate else 1
                if on_plan is not None:
                    opening = time.perf_counter() - began
                    on_plan(planned, planned * _seconds_of_a_round(schedule, slowest) + (starts - 1) * opening)
            for _ in range(planned * (start + 1) // starts - len(rounds.medians)):
                rounds.take(runners)
                if on_round is not None:
                    on_round(len(rounds.medians), planned)
        start += 1
    return Measurement(
        tuple(e.name for e in engines),
        tuple(rounds.medians),
        tuple(map(tuple, rounds.calls)),
        threads,
        tuple(cpus),
        rounds.disturbed / max(1, rounds.turns),
        Machine.here(),
        schedule,
    )


@dataclass
class _Rounds:
    """What was measured so far.

    Attributes:
        medians: of each round, the median of each engine's turn.
        calls: of each engine, the seconds of each call.
        disturbed, turns: how many turns other processes worked in, and how many there were.
        spent: seconds of wall time.
    """

    schedule: Schedule
    rng: random.Random
    calls: tuple[list[float], ...]
    medians: list[tuple[float, ...]] = field(default_factory=list)
    disturbed: int = 0
    turns: int = 0
    spent: float = 0.0

    def take(self, runners: Sequence[Runner]) -> None:
        """One turn of each engine, in an order of its own."""
        begin = time.perf_counter()
        retries = _RETRIES if self.spent < self.schedule.seconds else 0
        taken: dict[int, Turn] = {}
        for i in self.rng.sample(range(len(runners)), len(runners)):
            taken[i], noisy = _quiet_turn(runners[i], self.schedule, retries=retries)
            self.disturbed, self.turns = self.disturbed + noisy, self.turns + 1
        self.medians.append(tuple(statistics.median(taken[i].seconds) for i in range(len(runners))))
        for i, turn in taken.items():
            self.calls[i].extend(turn.seconds)
        self.spent += time.perf_counter() - begin


def _rounds(schedule: Schedule, call: Sequence[float]) -> int:
    if schedule.rounds is not None:
        return schedule.rounds
    return max(_FEWEST, min(_MOST, math.floor(schedule.seconds / _seconds_of_a_round(schedule, call))))


def _seconds_of_a_round(schedule: Schedule, call: Sequence[float]) -> float:
    return sum(max(schedule.turn, seconds) + _SETTLE for seconds in call)


def _quiet_turn(runner: Runner, schedule: Schedule, *, retries: int) -> tuple[Turn, bool]:
    """A turn during which nobody else worked, or the least disturbed of a few; and whether it was disturbed."""
    best: tuple[float, Turn] | None = None
    for attempt in range(retries + 1):
        time.sleep(_SETTLE)
        clock = QuietClock()
        turn = runner.take_turn(schedule.turn)
        # in this process the engine's time is in the clock's own already
        foreign = clock.foreign(turn.cpu if schedule.isolate else 0.0)
        wall = sum(turn.seconds)
        if foreign <= _FOREIGN * wall + _TICKS:
            return turn, False
        _log.debug("turn %d disturbed: %.2f s of other processes in %.2f s", attempt, foreign, wall)
        if best is None or foreign / wall < best[0]:
            best = (foreign / wall, turn)
    assert best is not None
    return best[1], True


@contextmanager
def _opened(
    engines: Sequence[Engine], threads: int, cpus: Sequence[int], schedule: Schedule, rng: random.Random
) -> Iterator[list[Runner]]:
    with ExitStack() as stack:

        def opened(engine: Engine) -> Runner:
            runner: Runner = Worker(engine, threads, cpus) if schedule.isolate else Local(engine, threads)
            stack.callback(runner.close)
            return runner

        first = None
        if schedule.isolate:
            # the process that is started first is up to 10 % slower than its equals: let that be nobody
            first = opened(engines[0])
            first.warm_up(0.0)
        runners = {i: opened(engines[i]) for i in rng.sample(range(len(engines)), len(engines))}
        if first is not None:
            first.close()
        yield [runners[i] for i in range(len(engines))]
