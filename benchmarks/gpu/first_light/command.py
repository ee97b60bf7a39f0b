"""Everything that is to be known first about a GPU, in eight minutes.

    python -m benchmarks.gpu.first_light --out results/h200 [--minutes 8] [--only "norms,models"]
    python -m benchmarks.gpu.first_light --out results/h200 --page
    python -m benchmarks.gpu.first_light --out build/rehearsal --rehearse

Each step runs in a process of its own, with a limit of its own; one that fails, crashes or hangs is noted, and the next one begins.
After each step a line is added to OUT/first_light.jsonl, and OUT/page.md is written anew. A second run into the same folder adds to
it: a step that is done again replaces what it found before. --page puts the page into docs/results.md, as its section "On a GPU".

--rehearse does all of this without a GPU: kernels are compiled for an H100 and started on a driver that does nothing, sizes are
small, and no number means anything. Such a page stays where it is.

Exit code 0; 1 when a step failed, hung or found faults; 2 when there is nothing to run on, or nothing to make a page of.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.first_light import page
from benchmarks.gpu.first_light.children import Ended, run_child
from benchmarks.gpu.first_light.record import Record, now, read, read_rows, write
from benchmarks.gpu.first_light.steps import STEPS, Job, Missing, Step, named

__all__ = ["ROOT", "main", "perform"]

ROOT = Path(__file__).resolve().parents[3]
_REHEARSED = 20  # times the limits: kernels are compiled by whatever processors there are
_LEAST = 10.0  # seconds: a step with less would be over before it has begun
# Exit codes of a step: there is no GPU; it found faults; something that it needs is not there. An exception has 1.
_NO_DEVICE, _WRONG, _MISSING = 3, 4, 5


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    if asked.share or asked.step:
        return _inside(asked)
    wanted = asked.only.split(",") if asked.only else [step.name for step in STEPS]
    unknown = [name for name in wanted if name not in {step.name for step in STEPS}]
    if unknown:
        print(f"no step is called {unknown[0]!r}: expected {', '.join(step.name for step in STEPS)}", file=sys.stderr)
        return 2
    if asked.page:
        return page.put(asked.out, ROOT / "docs" / "results.md")
    asked.out.mkdir(parents=True, exist_ok=True)
    patience = _REHEARSED if asked.rehearse else 1
    steps = [replace(step, limit=patience * step.limit) for step in STEPS if step.name in wanted or step is STEPS[0]]
    return perform(steps, asked.out, 60 * asked.minutes, ("--rehearse",) if asked.rehearse else ())


def _parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.first_light", description=first, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/first_light"), help="folder (default: build/first_light)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together (default: 8)")
    parser.add_argument("--only", metavar="STEPS", help=", ".join(step.name for step in STEPS))
    parser.add_argument("--page", action="store_true", help="run nothing; put what is in OUT into docs/results.md")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on a driver that does nothing")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # one step, in this process
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # the file for its rows
    parser.add_argument("--share", help=argparse.SUPPRESS)  # part i of n of the kernels to compile, "i/n"
    return parser


def perform(steps: Sequence[Step], out: Path, seconds: float, options: tuple[str, ...] = ()) -> int:
    """Do the steps, one process each, and write down each one; the exit code of the command.

    Args:
        out: an existing folder.
        seconds: for all of them; what has not begun by then is left out.
        options: of each process besides its step.
    """
    end, versions = time.monotonic() + seconds, _versions()
    device: dict[str, Any] = {}
    wrong = False
    for step in steps:
        rows, log = (out / f"{step.name.replace(': ', '-').replace(' ', '_')}.{kind}" for kind in ("rows", "log"))
        rows.write_text("")
        left, date = end - time.monotonic(), now()
        if left < _LEAST:
            record = Record(step.name, "left out", "the time was over", 0.0, date, device, versions)
        else:
            command = [sys.executable, "-m", "benchmarks.gpu.first_light", *options]
            ended = run_child([*command, "--step", step.name, "--rows", str(rows.resolve())], min(left, step.limit), log, ROOT)
            if ended.code == _NO_DEVICE:
                print(ended.said, file=sys.stderr)
                return 2
            found = read_rows(rows)
            device = next((row["device"] for row in found if "device" in row), device)
            status, said = _judged(ended)
            record = Record(step.name, status, said, ended.seconds, date, device, versions, found)
        write(record, out)
        wrong |= record.status not in ("ok", "left out")
        page.write(read(out), out / "page.md")
        print(f"{step.name}: {record.status}, {record.seconds:.0f} s, {len(record.rows)} rows", flush=True)
    print(out / "page.md")
    return int(wrong)


def _judged(ended: Ended) -> tuple[str, str]:
    """A status, and what is said about it."""
    match ended.code:
        case 0:
            return "ok", ""
        case int(code) if code == _WRONG:
            return "wrong", ended.said.splitlines()[-1]
        case int(code) if code == _MISSING:
            return "left out", ended.said.splitlines()[-1]
        case None:
            return "hung", f"ended after {ended.seconds:.0f} s; its last words: {ended.said}"
        case code:
            return "failed", f"exit code {code}: {ended.said}"


def _versions() -> dict[str, str]:
    from benchmarks.gpu.run import versions

    return {"python": platform.python_version(), **versions()}


def _inside(asked: argparse.Namespace) -> int:
    """What a process of a step does; its exit code."""
    from contextlib import AbstractContextManager, nullcontext

    from benchmarks.gpu.asked import Asked
    from normfuse.errors import UsageError

    if asked.rehearse:
        from tests.gpu.rehearsal import rehearsal

        around: AbstractContextManager[None] = rehearsal()
    else:
        around = nullcontext()
    with around:
        if asked.share:
            from benchmarks.gpu.warm import share

            share(asked.share, quick=asked.rehearse)
            return 0
        step = named(asked.step)
        quick = asked.rehearse or step.name in ("norms", "models") or asked.rows is None
        job = Job(Asked(quick, 0.0 if asked.rehearse else 0.3, file=asked.rows), ("--rehearse",) if asked.rehearse else ())
        try:
            wrong = step.do(job)
        except Missing as e:
            print(e)
            return _MISSING
        except UsageError as e:
            if step is not STEPS[0]:
                raise
            print(e)
            return _NO_DEVICE
    print(wrong)
    return _WRONG if wrong else 0
