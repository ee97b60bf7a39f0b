"""`normfuse optimize`."""

from pathlib import Path

import click

from normfuse.cli.help import Command
from normfuse.cli.options import (
    Model,
    Pipeline,
    force_option,
    json_option,
    model_options,
    output_option,
    pipeline_options,
    verbosity,
)
from normfuse.cli.reports import check_report, report_option, write_report
from normfuse.errors import UsageError
from normfuse.files import check_target

__all__ = ["optimize"]


@click.command(cls=Command, short_help="Optimize SOURCE and save it as .pt2.")
@model_options
@pipeline_options
@output_option("the optimized model (.pt2, an ExportedProgram)")
@report_option
@force_option
@json_option
@verbosity
def optimize(
    model: Model, pipeline: Pipeline, output: Path, report_path: Path | None, force: bool, as_json: bool, quiet: bool
) -> None:
    """Optimize SOURCE and save it as an ExportedProgram (.pt2) with its report inside."""
    if output.suffix != ".pt2":
        raise UsageError(f"-o {output}: expected a name that ends in .pt2; `normfuse export` writes .onnx")
    check_target(output, force=force)
    check_report(report_path, force=force)
    loaded = model.load(inputs_needed=True)

    from normfuse.pt2 import save_program
    from normfuse.reports.record import report

    fast = pipeline.run(model, loaded)
    save_program(fast, output, force=force)
    write_report(report(fast), report_path, force=force)
    if as_json:
        click.echo(report(fast).to_json())
    elif not quiet:
        click.echo(f"{report(fast)}\n\nwrote {output}")
