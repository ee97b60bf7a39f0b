"""`normfuse export`."""

import dataclasses
import json
from pathlib import Path

import click

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

__all__ = ["export"]


@click.command(short_help="Optimize SOURCE and export it to ONNX.")
@model_options
@pipeline_options
@output_option("the exported model (.onnx)")
@click.option("--target", default="onnxruntime", show_default=True, help="onnxruntime, tensorrt or portable (standard ops only).")
@click.option("--opset", type=int, help="ONNX opset.  [default: the best one for the target]")
@click.option(
    "--form",
    type=click.Choice(("auto", "native", "integer", "qdq")),
    default="auto",
    show_default=True,
    help="What quantized layers become: ops of normfuse's kernels, standard integer ops, or QuantizeLinear pairs.",
)
@click.option("--int4", is_flag=True, help="Keep 4-bit weights as INT4 in integer and qdq files: smaller, slower to load.")
@report_option
@force_option
@json_option
@verbosity
def export(
    model: Model, pipeline: Pipeline, output: Path, target: str, opset: int | None, form: str, int4: bool,
    report_path: Path | None, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Optimize SOURCE, export it to ONNX, and prove the file in its runtime."""
    if output.suffix != ".onnx":
        raise UsageError(f"-o {output}: expected a name that ends in .onnx")
    check_target(output, force=force)
    check_report(report_path, force=force)

    from normfuse.export import to_onnx
    from normfuse.export.targets import opset_for, target_named
    from normfuse.record import report

    opset_for(target_named(target), opset)  # a misspelt target costs a second and not a minute
    loaded = model.load(inputs_needed=True)
    fast = pipeline.run(model, loaded)
    exported = to_onnx(fast, output, target=target, opset=opset, form=form, int4_initializers=int4, force=force)
    write_report(report(fast), report_path, force=force)
    if as_json:
        data = {"schema": 1, "export": dataclasses.asdict(exported), "report": report(fast).to_dict()}
        click.echo(json.dumps(data, indent=2, default=str))
    elif not quiet:
        click.echo(f"{report(fast)}\n\n{exported}")
