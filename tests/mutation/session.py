"""One pytest session a source file: tests are collected once, and every guard is disabled in a process forked from there."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any

import pytest

from tests.mutation.guards import Guard, disable

__all__ = ["KILLED", "SURVIVED", "Session"]

KILLED, SURVIVED = "killed", "survived"
_PATIENCE = 5.0  # a mutant may take so many times as long as its tests do; then it hangs, and counts as killed
_LEAST = 30.0  # seconds

Report = Callable[[Guard, str], None]


class Session:
    """A pytest plugin that runs, for each guard, the tests which come by it, until one fails.

    Attributes:
        failed: tests that fail with all guards in place; nothing is disabled then.
    """

    def __init__(self, module: str, guards: Sequence[Guard], report: Report, jobs: int = 1) -> None:
        self.module = importlib.import_module(module)
        self.source = Path(str(self.module.__file__)).read_text(encoding="utf-8")  # now: an editor may be at work
        self.guards = list(guards)
        self.report = report
        self.jobs = jobs
        self.failed: list[str] = []

    def run(self, tests: Sequence[Path]) -> None:
        """Collect the tests and disable one guard after the other."""
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-m",
            "not latency and not slow",
        ]
        with _silent():
            pytest.main([*options, *map(str, tests)], plugins=[self])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "baseline.json"
            _wait(_fork(lambda: self._baseline(session.items, path)))
            baseline = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"failed": ["the tests do not run"]}
        self.failed = baseline["failed"]
        if self.failed:
            return True
        running: dict[int, tuple[Guard, float]] = {}
        for guard in self.guards:
            chosen, seconds = _near(session.items, baseline["tests"], guard)
            if not chosen:
                self.report(guard, SURVIVED)
                continue
            while len(running) >= self.jobs:
                self._collect(running)
            pid = _fork(lambda guard=guard, chosen=chosen: self._mutant(guard, chosen))  # type: ignore[misc]
            running[pid] = guard, monotonic() + max(_LEAST, _PATIENCE * seconds)
        while running:
            self._collect(running)
        return True

    def _collect(self, running: dict[int, tuple[Guard, float]]) -> None:
        """Wait until one of the processes has ended, or has to be ended."""
        while True:
            for pid, (guard, deadline) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    done, status = os.waitpid(pid, 0)
                if done:
                    del running[pid]
                    self.report(guard, SURVIVED if status == 0 else KILLED)
                    return
            sleep(0.01)

    def _baseline(self, items: list[pytest.Item], path: Path) -> int:
        """Which lines of the source each test executes, and how long it takes."""
        file, lines = str(self.module.__file__), set[int]()

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return local

        tests: dict[str, dict[str, Any]] = {}
        failed = []
        for item, last in _each(items):
            lines.clear()
            start = monotonic()
            sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename == file else None)
            passed = _passes(item, last)
            sys.settrace(None)
            tests[item.nodeid] = {"seconds": monotonic() - start, "lines": sorted(lines)}
            if not passed:
                failed.append(item.nodeid)
        path.write_text(json.dumps({"failed": failed, "tests": tests}), encoding="utf-8")
        return 0

    def _mutant(self, guard: Guard, items: list[pytest.Item]) -> int:
        disable(self.module, self.source, guard)
        return int(not all(_passes(item, last) for item, last in _each(items)))


def _near(items: list[pytest.Item], baseline: dict[str, Any], guard: Guard) -> tuple[list[pytest.Item], float]:
    """The tests that come by the guard, quick ones first, and how long they take."""
    lines = set(range(guard.line, guard.last + 1))
    chosen = [i for i in items if lines.intersection(baseline[i.nodeid]["lines"])]
    chosen.sort(key=lambda i: baseline[i.nodeid]["seconds"])
    return chosen, sum(baseline[i.nodeid]["seconds"] for i in chosen)


def _each(items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    return zip(items, [*items[1:], None], strict=True)


def _passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    before = item.session.testsfailed
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return item.session.testsfailed == before


def _fork(work: Callable[[], int]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later versions of Python warn about threads, of which there are none that matter
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work()
    finally:
        os._exit(code)


def _wait(pid: int) -> None:
    os.waitpid(pid, 0)


class _silent:  # noqa: N801 - reads like the function that it is
    """Nothing that a test or a crash writes reaches the terminal."""

    def __enter__(self) -> None:
        self._kept = [os.dup(fd) for fd in (1, 2)]
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2):
            os.dup2(null, fd)
        os.close(null)

    def __exit__(self, *_: object) -> None:
        for fd, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, fd)
            os.close(kept)
