"""`normfuse verify`."""

import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.exporting.stated_sqnr import least_sqnr
from normfuse.cli.files.given import file_inputs, is_file
from normfuse.cli.files.running import opened_file
from normfuse.cli.help import Command
from normfuse.cli.options import Model, Pipeline, json_option, model_options, pipeline_options, verbosity
from normfuse.errors import CheckFailed, UsageError
from normfuse.export.targets import FOLDERS, folder_of

if TYPE_CHECKING:
    import torch

    from normfuse.reports.model import Error
from normfuse.reports.report import Report

__all__ = ["verify"]

_UNBROKEN: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}


@click.command(cls=Command, short_help="Prove an optimized or exported model.")
@model_options
@click.argument("other", required=False)
@pipeline_options
@click.option("--tolerance", type=float, help="Bound on the relative drift.  [default: by dtype, 1e-4 for float32]")
@json_option
@verbosity
def verify(model: Model, other: str | None, pipeline: Pipeline, tolerance: float | None, as_json: bool, quiet: bool) -> None:
    """Optimize SOURCE and prove the result; with OTHER (.onnx, .xml, .pt2, or an engine on a GPU) compare that file with SOURCE.

    A quantized OTHER is held to the SQNR that it states, less 10 dB, unless --tolerance is given.

    Exit code 1 when the error is above its bound, a rewrite had to be taken back, or nothing could be compared.
    """
    if other is not None:
        _compare(model, other, tolerance, as_json, quiet)
        return
    if is_file(model.source):
        raise UsageError(f"{model.source} is exported already; compare it with its source: normfuse verify SOURCE {model.source}")
    if pipeline.verify == "off":
        raise UsageError("verify --verify off would verify nothing")
    loaded = model.load()

    from normfuse.reports.record import report

    found = report(pipeline.run(model, loaded))
    failures = _failures(found, tolerance)
    if as_json:
        click.echo(json.dumps({"schema": 1, "holds": not failures, "failures": failures, "report": found.to_dict()}, indent=2))
    elif not quiet:
        click.echo(str(found))
    if failures:
        raise CheckFailed("; ".join(failures))


def _failures(found: "Report", tolerance: float | None) -> list[str]:
    from normfuse.numerics.compare import EXACT_BOUND

    failures = [f"{site.path}: {site.rule} was taken back: {site.note}" for site in found.undone]
    if found.nothing_compared:
        failures.append(found.nothing_compared)
    if found.exact is None and found.drift is None:
        return [*failures, "; ".join(found.notes) or "the result was not verified"]
    # one of them alone is a proof that a note explains: no form in float64, or outputs of parts that choose between candidates
    if found.exact is not None and not found.exact.max_rel <= EXACT_BOUND:
        failures.append(f"the error in float64 is {found.exact.max_rel:.1e}, above {EXACT_BOUND:.0e}")
    if found.drift is not None and not found.drift.max_rel <= _bound(found.drift, tolerance):
        failures.append(
            f"the drift in {found.drift.dtype} is {found.drift.max_rel:.1e}, above {_bound(found.drift, tolerance):.0e}"
        )
    return failures


def _bound(error: "Error", tolerance: float | None) -> float:
    from normfuse.numerics.compare import tolerance_of

    return tolerance_of(error.dtype) if tolerance is None else tolerance


def _compare(model: Model, other: str, tolerance: float | None, as_json: bool, quiet: bool) -> None:
    from normfuse.numerics.compare import decibels, measure, nothing_in, tolerance_of

    folder = folder_of(other)
    if folder is None and Path(other).suffix != ".pt2":
        known = ", ".join(f.suffixes[0] for f in FOLDERS.values())
        raise UsageError(f"{other}: expected a file that ends in {known} or .pt2 to compare with {model.source}")
    wanted = least_sqnr(other) if tolerance is None else None
    if is_file(model.source):
        weights = ""
        inputs: Any = file_inputs(Path(model.source), model.options)
        expected = list(opened_file(Path(model.source))(inputs).values())
    else:
        loaded = model.load(inputs_needed=True)
        inputs = loaded.kwargs if loaded.kwargs and not loaded.args else (*loaded.args, *loaded.kwargs.values())
        expected = _run(loaded.module, loaded.args, loaded.kwargs)
        weights = loaded.weights
    found = list(opened_file(Path(other), trust=model.options.trust)(inputs).values())
    if len(found) != len(expected):
        raise CheckFailed(f"{other} has {len(found)} outputs and {model.source} has {len(expected)}")
    dtype = next((str(t.dtype).removeprefix("torch.") for t in expected if t.is_floating_point()), "float32")
    coarsest = max((dtype, *(folder.dtypes(Path(other)) if folder is not None else ())), key=tolerance_of)
    error = measure(expected, found, coarsest)
    bound = _bound(error, tolerance)
    if wanted is None:
        failures = [] if error.max_rel <= bound else [f"the relative error is {error.max_rel:.1e}, above {bound:.0e}"]
        holds: dict[str, Any] = {"bound": bound}
        asked = f" (bound {bound:.0e})"
    else:
        sqnr = decibels([(expected, found)]) if math.isfinite(error.max_abs) else -math.inf
        failures = [] if sqnr >= wanted else [f"the SQNR is {sqnr:.1f} dB, below {wanted:.1f} dB"]
        holds = {"bound": None, "sqnr": sqnr if math.isfinite(sqnr) else None, "least_sqnr": wanted}
        asked = f"; quantized: {sqnr:.1f} dB (at least {wanted:.1f} dB)"
    failures += [nothing] if (nothing := nothing_in([expected])) else []
    if as_json:
        data = {"schema": 1, "holds": not failures, "failures": failures}
        data |= {"max_abs": error.max_abs, "max_rel": error.max_rel, **holds}
        click.echo(json.dumps(data, indent=2))
    elif not quiet:
        said = f" (weights: {weights})" if weights else ""
        found_out = f"{error.max_abs:.1e} absolute, {error.max_rel:.1e} relative{asked}"
        click.echo(textwrap.fill(f"{other} against {model.source}{said}: {found_out}", 80, **_UNBROKEN))
    if failures:
        raise CheckFailed("; ".join(failures))


def _run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "list[torch.Tensor]":
    import torch
    from torch.utils import _pytree as pytree

    with torch.inference_mode():
        return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, torch.Tensor)]
