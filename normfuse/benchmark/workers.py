"""Engines in processes of their own.

Thread pools of one runtime spin for a while after a call and take cores from the next engine in the same process, and
the page placement of a process biases everything that it runs; so each engine gets its own process, and only one of
them is asked to work at a time.
"""

import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from normfuse.benchmark.engine import Engine, Turn
from normfuse.errors import NormfuseError

__all__ = ["Worker"]

_PATIENCE = 900.0  # seconds that one answer may take; compiling a large model takes a minute or two
_log = logging.getLogger(__name__)


class Worker:
    """An engine in a process of its own.

    Raises:
        NormfuseError: the process died, the engine could not be opened, or a call failed; the message names the engine.
    """

    def __init__(self, engine: Engine, threads: int, cpus: Sequence[int] = ()) -> None:
        self._name = engine.name
        try:
            packed = pickle.dumps((engine, threads))
        except Exception as e:
            raise NormfuseError(
                f"{engine.name} cannot be sent to a process of its own ({e}); pass isolate=False to measure it in this process"
            ) from e
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        # threads of numerical libraries are counted before the first import
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "normfuse.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        try:
            self._ask("setup", list(sys.path), tuple(cpus))
            self._ask("open", packed)
        except BaseException:
            self.close()
            raise

    def warm_up(self, seconds: float) -> float:
        return float(self._ask("warm_up", seconds))

    def take_turn(self, seconds: float) -> Turn:
        turn = self._ask("take_turn", seconds)
        assert isinstance(turn, Turn)
        return turn

    def close(self) -> None:
        """End the process; safe to call twice."""
        process = self._process
        if process.poll() is None:
            if process.stdin is not None:
                process.stdin.close()  # the worker ends at the end of its input
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None and not stream.closed:
                stream.close()

    def _ask(self, *request: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        watchdog = threading.Timer(_PATIENCE, self._process.kill)
        watchdog.start()
        try:
            pickle.dump(request, stdin)
            stdin.flush()
            state, value = pickle.load(stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as e:
            code = self._process.wait()
            raise NormfuseError(f"the process of {self._name} ended with {code} ({request[0]}): {self._last_words()}") from e
        finally:
            watchdog.cancel()
        if state == "error":
            _log.debug("process of %s:\n%s", self._name, self._output())
            raise NormfuseError(f"{self._name} failed ({request[0]}): {value}")
        return value

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", errors="replace")

    def _last_words(self) -> str:
        lines = [line for line in self._output().splitlines() if line.strip()]
        return lines[-1] if lines else "it left no message (out of memory?)"
