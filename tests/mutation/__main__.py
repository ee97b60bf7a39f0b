"""Mutation of guards: is every condition that keeps a rule from rewriting held by a test near it?

    python -m tests.mutation                                    # all files of the map in tests/mutation/nearest.py
    python -m tests.mutation --only passes/affine/into_consumer.py --jobs 2

Each guard (`raise Refuse` with its condition, `if …: return None`, the `if` of a case, a literal in a pattern, an operand of
`and` and `or`) is disabled on its own, in memory, and the tests near the file that come by it run until one fails. Guards
whose tests all pass are printed: a test to write, or code to delete. Results are kept, so that a stopped run goes on where it
was: a killed guard is tried again when its file changes, a survivor also when a test does.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from normfuse.files import atomic
from tests.mutation.guards import Guard, guards
from tests.mutation.nearest import SOURCES, nearest
from tests.mutation.session import KILLED, SURVIVED, Session
from tests.places import ROOT

RESULTS = ROOT / "build" / "mutation.json"
_HEAVY = ("timm", "torchvision", "transformers", "tests.zoo", "normfuse.export")  # loaded once, before forking


@click.command(help=__doc__)
@click.option("--only", multiple=True, metavar="FILE", help="A source file, as in `passes/affine/affine.py`; may be given again.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Guards tried at the same time.")
@click.option("--again", is_flag=True, help="Try everything again.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, help="Where results are kept.")
def main(only: tuple[str, ...], jobs: int, again: bool, results: Path) -> None:
    console = Console(soft_wrap=True)
    kept: dict[str, dict[str, Any]] = json.loads(results.read_text(encoding="utf-8")) if results.exists() and not again else {}
    for name in _HEAVY:
        importlib.import_module(name)
    sources = [str(Path(name).as_posix()) for name in only or SOURCES]
    survivors = 0
    table = Table("file", "guards", "killed", "%", box=None)
    for source in sources:
        found = guards((ROOT / source).read_text(encoding="utf-8"))
        verdicts = _tried(source, found, kept, results, jobs)
        survived = [g for g in found if verdicts[g.key] == SURVIVED]
        for guard in survived:
            console.print(f"{source}:{guard.line}: {guard.kind}: {guard.text}", markup=False, highlight=False)
        survivors += len(survived)
        killed = Counter(verdicts[g.key] for g in found)[KILLED]
        table.add_row(source, str(len(found)), str(killed), f"{100 * killed / max(1, len(found)):.0f}")
    console.print(table)
    sys.exit(survivors > 0)


def _tried(source: str, found: list[Guard], kept: dict[str, dict[str, Any]], results: Path, jobs: int) -> dict[str, str]:
    """The verdict on each guard of a file; those that are not known are found out and kept."""
    tests = nearest(source)
    if not tests:
        raise click.UsageError(f"no test file is known for {source}; say which in tests/mutation/nearest.py")
    digest, state = _digest([ROOT / source]), _digest(tests)
    old = kept.get(source, {})
    known: dict[str, str] = old.get("verdicts", {}) if old.get("source") == digest else {}
    if old.get("tests") != state:
        known = {key: verdict for key, verdict in known.items() if verdict == KILLED}
    todo = [g for g in found if g.key not in known]

    def keep(guard: Guard, verdict: str) -> None:
        known[guard.key] = verdict
        lines = {g.key: g.line for g in found}
        rows = {key: known[key] for key in sorted(known, key=lambda k: lines.get(k, 0))}
        kept[source] = {"source": digest, "tests": state, "verdicts": rows}
        results.parent.mkdir(parents=True, exist_ok=True)
        with atomic(results, force=True) as path:
            path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    if todo:
        _apart(source, todo, tests, keep, jobs)
    return known


def _apart(source: str, todo: list[Guard], tests: list[Path], keep: Any, jobs: int) -> None:
    """Run the session in a process of its own, so that pytest's state does not stay; verdicts come through a pipe."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            with os.fdopen(write, "w", encoding="utf-8") as out:
                session = Session(_module(source), todo, lambda g, v: print(json.dumps([g.key, v]), file=out, flush=True), jobs)
                session.run(tests)
                if session.failed:
                    print(json.dumps([None, session.failed]), file=out, flush=True)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    by_key = {g.key: g for g in todo}
    with os.fdopen(read, encoding="utf-8") as lines:
        for line in lines:
            key, verdict = json.loads(line)
            if key is None:
                raise click.ClickException(f"the tests of {source} fail as they are: {', '.join(verdict[:5])}")
            keep(by_key[key], verdict)
    if os.waitpid(pid, 0)[1]:
        raise click.ClickException(f"the tests of {source} could not be run: pytest {' '.join(map(str, tests))}")


def _module(source: str) -> str:
    parts = Path(source).with_suffix("").parts
    return ".".join(parts if parts[0] == "normfuse" else ("normfuse", *parts))


def _digest(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


if __name__ == "__main__":
    main()
