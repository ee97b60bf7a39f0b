"""`normfuse inspect`."""

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from normfuse.cli.onnx_files import is_onnx
from normfuse.cli.options import Model, Pipeline, json_option, model_options, verbosity

if TYPE_CHECKING:
    from normfuse.report import Report

__all__ = ["inspect"]


@click.command(short_help="Dry run: what would happen to each norm, and why not.")
@model_options
@click.option("--passes", metavar="NAMES", help="Run these passes only, separated by commas; see `normfuse passes`.")
@json_option
@verbosity
def inspect(model: Model, passes: str | None, as_json: bool, quiet: bool) -> None:
    """Dry run: which norms SOURCE has, what would happen to each, and why not. Writes nothing.

    For an .onnx file: its ops and norms.
    """
    if is_onnx(model.source):
        _file(model.source, as_json)
        return
    names = tuple(n.strip() for n in passes.split(",") if n.strip()) if passes is not None else None
    loaded = model.load()

    from normfuse.record import report

    found = report(Pipeline(names, "off").run(model, loaded))
    if as_json:
        click.echo(json.dumps({"schema": 1, "source": model.source, **_plan(found)}, indent=2))
        return
    click.echo("\n".join(_text(found)))


def _plan(found: "Report") -> dict[str, object]:
    return {
        "norms_before": found.norms_before,
        "norms_after": found.norms_after,
        "applied": [dataclasses.asdict(site) for site in found.applied],
        "refused": [dataclasses.asdict(site) for site in found.refused],
        "notes": list(found.notes),
    }


def _text(found: "Report") -> list[str]:
    from normfuse.report_text import compact, reasons

    kinds = sorted({*found.norms_before, *found.norms_after})
    lines = [f"{'norm':<28} {'now':>5} {'then':>5}"]
    lines += [f"{kind:<28} {found.norms_before.get(kind, 0):>5} {found.norms_after.get(kind, 0):>5}" for kind in kinds]
    if not kinds:
        lines.append("no normalization found")
    for title, sites in (("would be done", found.applied), ("would stay, and why", found.refused)):
        lines += ["", title] if sites else []
        for reason in reasons(sites):
            lines.append(f"  {reason.count:>4} {reason.rule}{': ' if reason.note else ''}{reason.note}")
            lines.append(f"        at {', '.join(compact(reason.paths))}")
            lines += [f"        because of {', '.join(compact(reason.blockers))}"] if reason.blockers else []
            lines += [f"        remedy: {reason.remedy}"] if reason.remedy else []
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _file(path: str, as_json: bool) -> None:
    from normfuse.export.onnx.inspect import norm_counts, op_counts, provenance

    ops, norms, origin = op_counts(path), norm_counts(path), provenance(path)
    if as_json:
        click.echo(json.dumps({"schema": 1, "source": path, "ops": ops, "norms": norms, "provenance": origin}, indent=2))
        return
    width = max((len(op) for op in ops), default=0)
    lines = [f"{sum(ops.values())} nodes, {sum(norms.values())} of them normalizations"]
    lines += [f"  {op:<{width}} {n:>5}{'  norm' if op in norms else ''}" for op, n in ops.items()]
    lines += [f"{key}: {value}" for key, value in origin.items()]
    click.echo("\n".join(lines))
