"""Many cases in worker processes: one that dies or hangs costs its case, not the run."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz.generate import Options, generate

__all__ = ["by_kind", "case", "done", "run", "summary"]


def case(seed: int, options: Options) -> dict[str, Any]:
    """One case as a line of the result file."""
    from tests.fuzz.oracle import judge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the blocks' own
        spec = generate(seed, options)
    outcome = judge(spec)
    return {"seed": seed, "dtype": spec.dtype, "mode": asdict(spec.mode), **asdict(outcome)}


def run(seeds: Iterable[int], options: Options, jobs: int = 1, limit: float = 120.0) -> Iterator[dict[str, Any]]:
    """Results as they come.

    Args:
        seeds: of the cases.
        options: what they have in common.
        jobs: worker processes, one thread each.
        limit: seconds after which a case is given up and its worker is replaced.
    """
    todo = iter(seeds)
    workers = [_Worker(options) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.give(next(todo, None))
        while any(w.seed is not None for w in workers):
            busy = [w for w in workers if w.seed is not None]
            wait([w.pipe for w in busy], timeout=0.5)
            for worker in busy:
                found = worker.result(limit)
                if found is not None:
                    yield found
                    worker.give(next(todo, None))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that takes seeds and gives results."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.seed: int | None = None
        self._start()

    def _start(self) -> None:
        self.pipe, far = mp.Pipe()
        self._process = mp.get_context("spawn").Process(target=_work, args=(far, self.options), daemon=True)
        self._process.start()
        far.close()

    def give(self, seed: int | None) -> None:
        self.seed, self._since = seed, time.monotonic()
        if seed is not None:
            self.pipe.send(seed)

    def result(self, limit: float) -> dict[str, Any] | None:
        """The result; of a process that died or took too long, a failure. None while it works."""
        try:
            if self.pipe.poll():
                found: dict[str, Any] = self.pipe.recv()
                return found
            if time.monotonic() - self._since < limit:
                return None
            kind, detail = "takes too long", f"more than {limit:.0f} s"
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode or 0
            kind, detail = f"ends the process: {signal.Signals(-code).name if code < 0 else f'exit {code}'}", ""
        seconds = time.monotonic() - self._since
        self.stop()
        self._start()
        spec = generate(self.seed or 0, self.options)
        outcome = {"state": "failed", "failures": [{"kind": kind, "detail": detail}], "note": "", "applied": 0}
        steps = [s.block for s in spec.steps]
        return {"seed": self.seed, "dtype": spec.dtype, "mode": asdict(spec.mode), **outcome, "blocks": steps, "seconds": seconds}

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Connection, options: Options) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import logging

    import torch

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (torch.fx prints the code of every module that raises)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # what is taken back is in the report, and torch traces to the error stream
    while True:
        try:
            seed = pipe.recv()
        except EOFError:
            return
        pipe.send(case(seed, options))


def done(path: Path) -> list[dict[str, Any]]:
    """The results of an earlier run; a line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def by_kind(results: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The seeds of each kind of failure, the most frequent kind first."""
    kinds = defaultdict[str, list[int]](list)
    for r in sorted(results, key=lambda r: r["seed"]):
        for f in r["failures"]:
            kinds[f["kind"]].append(r["seed"])
    return dict(sorted(kinds.items(), key=lambda kv: -len(kv[1])))


def summary(results: list[dict[str, Any]]) -> str:
    """Counts, and the kinds of failures, the most frequent first, with seeds that show them."""
    states = Counter(r["state"] for r in results)
    count = len(results) or 1
    seconds = sum(r["seconds"] for r in results)
    lines = [
        f"{len(results)} cases, {seconds / count:.2f} s each; {sum(r['applied'] for r in results)} rewrites; "
        + ", ".join(f"{n} {s}" for s, n in states.most_common())
    ]
    for name, of in (("dtype", lambda r: r["dtype"]), ("inputs", lambda r: "with" if r["mode"]["with_inputs"] else "without")):
        parts = Counter(of(r) for r in results), Counter(of(r) for r in results if r["state"] == "failed")
        lines.append(f"{name}: " + ", ".join(f"{k} {parts[1][k]} of {n} failed" for k, n in sorted(parts[0].items())))
    for kind, seeds in by_kind(results).items():
        lines.append(f"{len(seeds):5d}  {kind}  (seed {', '.join(map(str, seeds[:4]))})")
    refused = Counter(r["note"] for r in results if r["state"] == "refused")
    lines += [f"{n:5d}  refused: {note}" for note, n in refused.most_common(12)]
    return "\n".join(lines)
