"""`python -m tests.fuzz`: many random models, or one seed with its module."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from tests.fuzz.generate import Options, generate
from tests.fuzz.run import done, run, summary


@click.command()
@click.option("--seed", type=int, help="Run this case alone, shrink it if it fails, and print it as a script.")
@click.option("--cases", default=1000, show_default=True, help="How many seeds, from --first on.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--jobs", default=1, show_default=True, help="Worker processes, one thread each.")
@click.option(
    "--resume", type=click.Path(dir_okay=False, path_type=Path), help="Append results here as JSON lines; seeds in it are done."
)
@click.option("--limit", default=120.0, show_default=True, help="Seconds for a case.")
@click.option("--dtype", default="", help="float32, float64, float16 or bfloat16 for every case.")
@click.option("--verify", default="", help="off, end or each for every case.")
@click.option("--without-inputs", is_flag=True, help="Trace every model without example inputs.")
@click.option("--with-inputs", is_flag=True, help="Capture every model with example inputs.")
@click.option("--export-share", default=0.03, show_default=True, help="Share of cases that are written as ONNX files.")
@click.option("--quantize-share", default=0.05, show_default=True, help="Share of cases that are quantized.")
@click.option("--dynamic-share", default=0.25, show_default=True, help="Share of cases with free sizes.")
@click.option("--shrink/--no-shrink", default=True, help="With --seed: look for the smallest module that fails alike.")
@click.option("--seconds", default=60.0, show_default=True, help="With --seed: how long to shrink.")
def main(
    seed: int | None, cases: int, first: int, jobs: int, resume: Path | None, limit: float, dtype: str, verify: str, without_inputs: bool,
    with_inputs: bool, export_share: float, quantize_share: float, dynamic_share: float, shrink: bool, seconds: float,
) -> None:  # fmt: skip
    """Random models against their originals; exit 1 when one fails."""
    share = 1.0 if without_inputs else 0.0 if with_inputs else Options().without_inputs
    options = Options(dtype, share, export_share, quantize_share, Options().passes_share, dynamic_share, verify)
    if seed is not None:
        _one(seed, options, shrink, seconds)
        return
    results = done(resume) if resume else []
    known = {r["seed"] for r in results}
    todo = [s for s in range(first, first + cases) if s not in known]
    last = time.monotonic()
    for result in run(todo, options, jobs, limit):
        results.append(result)
        if resume:
            with resume.open("a") as f:
                f.write(json.dumps(result) + "\n")
        if time.monotonic() - last > 30:
            last = time.monotonic()
            click.echo(f"{len(results)} cases, {sum(r['state'] == 'failed' for r in results)} failed", err=True)
    click.echo(summary(results))
    raise SystemExit(any(r["state"] == "failed" for r in results))


def _one(seed: int, options: Options, shrinks: bool, seconds: float) -> None:
    from tests.fuzz.oracle import judge
    from tests.fuzz.shrink import script, shrink

    import torch

    torch.set_num_threads(1)
    spec = generate(seed, options)
    outcome = judge(spec)
    said = "\n".join(f"{f.kind}: {f.detail}" for f in outcome.failures)
    if outcome.failures and shrinks:
        kind = outcome.failures[0].kind
        spec = shrink(spec, lambda s: any(f.kind == kind for f in judge(s).failures), seconds)
    click.echo(script(spec, f"{outcome.state} {outcome.note}\n{said}"))
    raise SystemExit(outcome.state == "failed")


if __name__ == "__main__":
    main()
