"""`normfuse inspect`."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normfuse.cli.export import ENGINE_SUFFIXES
from normfuse.cli.files.given import is_file
from normfuse.cli.files.looking import show_both, show_file
from normfuse.cli.help import Command
from normfuse.cli.options import Model, Pipeline, json_option, model_options, partial_option, verbosity

if TYPE_CHECKING:
    from normfuse.reports.model import Site
from normfuse.reports.report import Report

__all__ = ["inspect"]


@click.command(cls=Command, short_help="Dry run: what would happen to each norm, and why not; what is in a file.")
@model_options
@click.argument("other", required=False)
@click.option("--passes", metavar="NAMES", help="Run these passes only, separated by commas; see `normfuse passes`.")
@partial_option
@json_option
@verbosity
def inspect(model: Model, other: str | None, passes: str | None, partial: bool, as_json: bool, quiet: bool) -> None:
    """Dry run: which norms SOURCE has, what would happen to each, and why not. Writes nothing.

    For an .onnx or .xml file: inputs, outputs, version, size and ops; with OTHER, a second file of that kind, both side by side.
    For a TensorRT engine: its signature, its fused layers, and whether it is whole.
    """
    if other is not None:
        show_both(model.source, other, as_json=as_json)
        return
    if Path(model.source).suffix in ENGINE_SUFFIXES:
        _engine(model.source, as_json)
        return
    if is_file(model.source):
        show_file(model.source, as_json=as_json)
        return
    names = tuple(n.strip() for n in passes.split(",") if n.strip()) if passes is not None else None
    loaded = model.load()

    from normfuse.reports.record import report

    found = report(Pipeline(names, "off", partial=partial).run(model, loaded))
    if as_json:
        click.echo(json.dumps({"schema": 1, "source": model.source, "weights": loaded.weights, **_plan(found)}, indent=2))
        return
    said = [f"{model.source}, weights: {loaded.weights}", ""] if loaded.weights else []
    click.echo("\n".join([*said, *_text(found)]))


def _engine(path: str, as_json: bool) -> None:
    from normfuse.export.tensorrt.inspect import inspect_engine

    found = inspect_engine(path)
    click.echo(json.dumps(found.to_dict(), indent=2, default=str) if as_json else str(found))


def _plan(found: "Report") -> dict[str, object]:
    return {
        "norms_before": found.norms_before,
        "norms_after": found.norms_after,
        "applied": [dataclasses.asdict(site) for site in found.applied],
        "refused": [dataclasses.asdict(site) for site in found.refused],
        "notes": list(found.notes),
    }


def _text(found: "Report") -> list[str]:
    from normfuse.reports.text import compact, reasons

    kinds = sorted({*found.norms_before, *found.norms_after})
    lines = [f"{'norm':<28} {'now':>5} {'then':>5}"]
    lines += [f"{kind:<28} {found.norms_before.get(kind, 0):>5} {found.norms_after.get(kind, 0):>5}" for kind in kinds]
    if not kinds:
        lines.append("no normalization found")
    fates = _fates(found.applied)
    width = min(max(map(len, fates), default=0), 40)
    lines += ["", "would change"] if fates else []
    for path, fate in fates.items():
        lines += textwrap.wrap(f"{path:<{width}}  {'; '.join(fate)}", 80, initial_indent="  ", subsequent_indent=" " * (width + 4))
    lines += ["", "would stay, and why"] if found.refused else []
    for reason in reasons(found.refused):
        told = f"{reason.count} {reason.rule}{': ' if reason.note else ''}{reason.note}"
        lines += textwrap.wrap(told, 80, initial_indent="  ", subsequent_indent="    ")
        lines += _wrapped("at", compact(reason.paths))
        lines += _wrapped("because of", compact(reason.blockers)) if reason.blockers else []
        lines += _wrapped("remedy:", [reason.remedy]) if reason.remedy else []
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _fates(applied: Sequence["Site"]) -> dict[str, list[str]]:
    """What happens to each norm or gain, by module path."""
    words = {
        "affine_into_producer": "folds {}",
        "affine_into_consumers": "scale and shift go {}",
        "layer_norm_is_rms_norm": "becomes RMSNorm",
        "layer_norm_by_hand": "is a LayerNorm written by hand",
        "rms_norm_by_hand": "is an RMSNorm written by hand",
        "parallel_convs": "becomes one convolution: {}",
        "huge_eps_is_affine": "normalizes nothing: {}",
        "stream_without_one_coordinate": "becomes CRMSNorm",
        "norm_gain_into_readers": "gain goes {}",
    }
    fates: dict[str, list[str]] = {}
    for site in applied:
        if site.rule in words:
            fates.setdefault(site.path, []).append(words[site.rule].format(site.note))
    return fates


def _wrapped(word: str, items: Sequence[str]) -> list[str]:
    return textwrap.wrap(f"{word} {', '.join(items)}", 80, initial_indent=" " * 6, subsequent_indent=" " * 8)
