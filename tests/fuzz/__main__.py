"""`python -m tests.fuzz`: many random models, or one seed with its module."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tests.fuzz.generate import Options, generate
from tests.fuzz.run import by_kind, done, run, summary

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_USUAL = Options()


@click.command()
@click.option("--seed", type=int, help="Run this case alone, shrink it if it fails, and print it as a script.")
@click.option("--cases", default=1000, show_default=True, help="How many seeds, from --first on.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--jobs", default=1, show_default=True, help="Worker processes, one thread each.")
@click.option("--resume", type=_FILE, help="Append results here as JSON lines; seeds that are in it are not run again.")
@click.option("--scripts", type=_FOLDER, help="Write a script of the smallest module of each kind of failure into this folder.")
@click.option("--limit", default=120.0, show_default=True, help="Seconds for a case.")
@click.option("--kind", default="", help="With --seed: the start of the kind of failure to shrink to; by default the first one.")
@click.option("--seconds", default=60.0, show_default=True, help="With --seed: how long to shrink; 0 prints the module as it is.")
@click.option("--dtype", default="", help="float32, float64, float16 or bfloat16 for every case.")
@click.option("--verify", default="", help="off, end or each for every case.")
@click.option("--target", default="", help="onnxruntime, portable or tensorrt for every file.")
@click.option(
    "--without-inputs", default=_USUAL.without_inputs, show_default=True, help="Share that is traced without example inputs."
)
@click.option("--export-share", default=_USUAL.export_share, show_default=True, help="Share of cases that are written as files.")
@click.option("--quantize-share", default=_USUAL.quantize_share, show_default=True, help="Share of cases that are quantized.")
@click.option("--passes-share", default=_USUAL.passes_share, show_default=True, help="Share of cases with opt-in passes.")
@click.option("--dynamic-share", default=_USUAL.dynamic_share, show_default=True, help="Share of cases with free sizes.")
def main(
    seed: int | None, cases: int, first: int, jobs: int, resume: Path | None, scripts: Path | None, limit: float, kind: str,
    seconds: float, **shares: Any,
) -> None:  # fmt: skip
    """Random models against their originals; exit 1 when one fails."""
    options = Options(**shares)
    if seed is not None:
        raise SystemExit(_one(seed, options, kind, seconds))
    results = done(resume) if resume else []
    known = {r["seed"] for r in results}
    last = time.monotonic()
    for result in run([s for s in range(first, first + cases) if s not in known], options, jobs, limit):
        results.append(result)
        if resume:
            with resume.open("a") as f:
                f.write(json.dumps(result) + "\n")
        if time.monotonic() - last > 30:
            last = time.monotonic()
            click.echo(f"{len(results)} cases, {sum(r['state'] == 'failed' for r in results)} failed", err=True)
    click.echo(summary(results))
    if scripts:
        _write_scripts(results, scripts, options, seconds)
    raise SystemExit(any(r["state"] == "failed" for r in results))


def _one(seed: int, options: Options, kind: str, seconds: float) -> bool:
    """Print the case as a script; does it fail?"""
    import torch

    from tests.fuzz.oracle import judge
    from tests.fuzz.shrink import script, shrink

    torch.set_num_threads(1)
    spec = generate(seed, options)
    outcome = judge(spec)
    if outcome.failures and seconds:
        kind = kind or outcome.failures[0].kind
        spec = shrink(spec, lambda s: any(f.kind.startswith(kind) for f in judge(s).failures), seconds)
        outcome = judge(spec)
    told = [f"{outcome.state} {outcome.note}".strip(), *(f"{f.kind}: {f.detail}" for f in outcome.failures)]
    click.echo(script(spec, "\n".join(told)))
    return outcome.state == "failed"


def _write_scripts(results: list[dict[str, Any]], folder: Path, options: Options, seconds: float) -> None:
    """The smallest module of each kind; a process each, because some kinds end it."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = [f"--{k.replace('_', '-')}={v}" for k, v in asdict(options).items()]
    for kind, seeds in by_kind(results).items():
        at = folder / f"seed_{seeds[0]}.py"
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.fuzz",
            f"--seed={seeds[0]}",
            f"--kind={kind}",
            f"--seconds={seconds}",
            *shares,
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        at.write_text(f"# {len(seeds)} × {kind}\n{found.stdout or found.stderr}")
        click.echo(f"{at}: {kind}")


if __name__ == "__main__":
    main()
