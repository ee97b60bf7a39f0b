"""The process of one engine: `python -m normfuse.benchmark.worker`, spoken to by `normfuse.benchmark.workers`.

A plain child process and not `multiprocessing`: its spawn runs the user's main script a second time.
"""

import os
import pickle
import sys
import traceback
from typing import Any, BinaryIO

from normfuse.benchmark.engine import Call, take_turn, warm_up
from normfuse.telemetry import no_telemetry

__all__ = ["main"]


def main() -> int:
    """Answer the requests of standard input until it ends; gives the exit code."""
    no_telemetry()
    requests = sys.stdin.buffer
    # libraries print; what they print must not end up between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    call: Call | None = None
    while True:
        try:
            verb, *rest = pickle.load(requests)
        except EOFError:
            return 0  # the parent is gone, or is done
        try:
            if verb == "setup":
                _setup(*rest)
                _answer(answers, None)
            elif verb == "open":
                engine, threads = pickle.loads(rest[0])
                call = engine.open(threads)
                _answer(answers, None)
            elif verb == "warm_up" and call is not None:
                _answer(answers, warm_up(call, *rest))
            elif verb == "take_turn" and call is not None:
                _answer(answers, take_turn(call, *rest))
        except KeyboardInterrupt:
            return 130
        except Exception as e:
            traceback.print_exc()
            pickle.dump(("error", f"{type(e).__name__}: {e}"), answers)
            answers.flush()


def _setup(path: list[str], cpus: tuple[int, ...]) -> None:
    sys.path[:] = path
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def _answer(answers: BinaryIO, value: Any) -> None:
    pickle.dump(("ok", value), answers)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
