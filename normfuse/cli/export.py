"""`normfuse export`."""

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.bundled import Telling, telling_options
from normfuse.cli.columns import columns, differences
from normfuse.cli.exporting.asked import Asked, Place, asked_options, place_options
from normfuse.cli.exporting.decoder import DecoderFlags, decoder_options, to_folder
from normfuse.cli.exporting.file_export import convert, refuse_model_flags
from normfuse.cli.exporting.speed import speed_option
from normfuse.cli.files.given import is_onnx
from normfuse.cli.help import Command
from normfuse.cli.options import Model, Pipeline, model_options, pipeline_options
from normfuse.cli.reports import check_report, write_report
from normfuse.errors import UsageError
from normfuse.export.options import ExportOptions
from normfuse.export.runtimes import parse_runtime
from normfuse.export.targets import FOLDERS, Folder, folder_written, target_named
from normfuse.files import check_target

if TYPE_CHECKING:
    from normfuse.cli.exporting.speed import Speed
    from normfuse.export.result import Exported
    from normfuse.reports.model import Latency
    from normfuse.reports.report import Report

__all__ = ["ENGINE_SUFFIXES", "export"]

#: Names that stand for a TensorRT engine.
ENGINE_SUFFIXES = FOLDERS["tensorrt"].suffixes


@click.command(cls=Command, short_help="Optimize SOURCE and export it to ONNX, TensorRT or OpenVINO.")
@model_options
@pipeline_options
@place_options
@asked_options
@decoder_options
@speed_option
@click.option("--explain", is_flag=True, help="List what each attention, norm and quantized layer is in the file, and why.")
@telling_options
def export(
    model: Model, pipeline: Pipeline, asked: Asked, place: Place, decoder: DecoderFlags, speed_check: bool, explain: bool,
    telling: Telling,
) -> None:  # fmt: skip
    """Optimize SOURCE, export it, and prove the file in its runtime.

    The name behind -o says what is written: an ONNX file, a model of OpenVINO, or a TensorRT engine, which is built without a GPU
    where TensorRT for RTX is installed.

    An .onnx file as SOURCE becomes an engine as it is, or another file: simplified, in another --opset, for an older --runtime, in
    --dtype fp16 or bf16, or for OpenVINO (-o NAME.xml). Its norms are rewritten from the PyTorch model only.
    """
    decoder.check_unused()
    if explain and (decoder.with_past or place.output is None or place.output.suffix in ENGINE_SUFFIXES):
        raise UsageError("--explain is for a single file, and not for an engine: pass -o NAME.onnx")
    if decoder.with_past:
        to_folder(model, pipeline, decoder, asked, place, telling)
        return
    if asked.runtime is not None:
        parse_runtime(asked.runtime)  # a misspelt release costs a second and not a minute
    place.check()
    if place.repository is not None:
        from normfuse.cli.exporting.deploy import deploy

        if telling.report_path is not None:
            raise UsageError("--report goes with -o; --json tells what --repository wrote")
        deploy(model, pipeline, asked, place, telling)
    elif place.output is not None:
        _to_path(model, pipeline, asked, place, telling, speed_check=speed_check, explain=explain)


def _to_path(
    model: Model, pipeline: Pipeline, asked: Asked, place: Place, telling: Telling, *, speed_check: bool, explain: bool
) -> None:
    """What the name of the file says."""
    assert place.output is not None
    folder = folder_written(place.output)
    if place.output.suffix in ENGINE_SUFFIXES:
        _to_engine(model, pipeline, asked, place, telling)
        return
    stray = asked.engine_only() or ("--dry-run" if place.dry_run else None)
    if stray:
        raise UsageError(f"{stray} is for TensorRT engines, and -o {place.output} is {folder.what}")
    if is_onnx(model.source):
        of_model = {"--attention": asked.attention != "auto", "--form": asked.form != "auto", "--tune": asked.tune}
        of_model |= {"--int4": asked.int4, "--explain": explain, "--report": telling.report_path}
        refuse_model_flags(model, pipeline, of_model)
    options = asked.of(folder, telling, force=telling.force)
    if asked.target is not None and "target" not in {f.name for f in dataclasses.fields(options)}:
        own = target_named(asked.target)
        if own not in folder.targets:
            raise UsageError(f"-o {place.output} is {folder.what}, and --target is {asked.target}: leave --target out")
    if is_onnx(model.source):
        convert(model, folder, options, place.output, telling)
        return
    _to_file(model, pipeline, folder, options, place.output, telling, speed_check=speed_check, explain=explain)


def _to_engine(model: Model, pipeline: Pipeline, asked: Asked, place: Place, telling: Telling) -> None:
    from normfuse.cli.exporting.engine_export import dry, to_engine

    assert place.output is not None
    if asked.target not in (None, "tensorrt"):
        raise UsageError(f"-o {place.output} is an engine, and --target is {asked.target}: leave --target out")
    options = asked.engine(telling, force=telling.force)
    check_report(telling.report_path, force=telling.force)
    if place.dry_run:
        dry(model, pipeline, options, as_json=telling.as_json)
        return
    built, fast = to_engine(model, pipeline, options, place.output)
    from normfuse.reports.record import report

    found = None if fast is None else dataclasses.replace(report(fast), files=(str(built),))
    if found is not None:
        write_report(found, telling.report_path, force=telling.force)
    _tell(found, {"engine": built.manifest() | {"path": str(built.path)}}, str(built), telling)


def _to_file(
    model: Model,
    pipeline: Pipeline,
    folder: Folder,
    options: Any,
    output: Path,
    telling: Telling,
    *,
    speed_check: bool,
    explain: bool,
) -> None:
    check_target(output, force=telling.force)
    check_report(telling.report_path, force=telling.force)

    from normfuse.export.onnx.precision.other_dtype import check_double
    from normfuse.export.onnx.quantized.forms import FORMS
    from normfuse.reports.record import report

    loaded = model.load(inputs_needed=True)
    where = target_named(options.target) if isinstance(options, ExportOptions) else folder.targets[0]
    check_double(loaded.model, options.computes_in, where)
    fast = pipeline.run(model, loaded)
    measured = speed_check and (pipeline.quantize is not None or telling.report_path is not None)
    original = loaded if measured else None  # a copy of the weights, kept where it is measured
    del loaded
    exported = folder.write(fast, output, options)
    text, data = str(exported), {"export": dataclasses.asdict(exported)}
    rounds = exported.form is not None and FORMS[exported.form].rounds
    speed: Speed | None = None
    if original is not None and where.runs_here and (telling.report_path or (rounds and not telling.quiet)):
        from normfuse.cli.exporting.speed import speed_of

        speed = speed_of(original, output, quantized=rounds)
        text, data = f"{text}\n{speed}", data | {"speed": speed.to_dict()}
    text += f"\n\n{_before_and_after(report(fast), exported, speed)}"
    if explain:
        text += f"\n\nwhat became of each site:\n\n{textwrap.indent(exported.explained, '    ')}"
    text += f"\n\nrun it:\n\n{textwrap.indent(exported.how_to_run.rstrip(), '    ')}"
    latencies: tuple[Latency, ...] = () if speed is None else speed.latencies
    found = dataclasses.replace(report(fast), files=(text,), latencies=latencies)
    write_report(found, telling.report_path, force=telling.force)
    _tell(found, data, text, telling)


def _tell(found: "Report | None", data: dict[str, Any], text: str, telling: Telling) -> None:
    if telling.as_json:
        told = {"schema": 1, **data} | ({} if found is None else {"report": found.to_dict()})
        click.echo(json.dumps(told, indent=2, default=str))
    elif not telling.quiet:
        click.echo(text if found is None else f"{found}\n\n{text}")


def _before_and_after(found: "Report", exported: "Exported", speed: "Speed | None") -> str:
    """A table of what the file has for what the model had."""
    from normfuse.reports.numbers import size

    before, after = found.operators_before, found.operators_after
    rows = [
        ("normalizations", str(sum(found.norms_before.values())), str(sum(found.norms_after.values()))),
        ("operators in PyTorch", str(sum(before.values())), str(sum(after.values()))),
        *((f"  {name}", left, right) for name, left, right in differences(before, after)),
        ("weights", size(found.bytes_before), size(found.bytes_after)),
        ("file", "-", size(exported.bytes)),
    ]
    if exported.sqnr is not None:
        rows.append(("SQNR of the outputs", "-", f"{exported.sqnr:.1f} dB"))
    elif exported.error is not None:
        rows.append(("relative error", "-", f"{exported.error.max_rel:.1e}"))
    for name, measured in (("in stock ONNX Runtime", speed and speed.stock), ("with the library", speed and speed.library)):
        if measured:
            rows.append((f"ms {name}", f"{measured.a.median:.3g}", f"{measured.b.median:.3g}"))
    return "\n".join(columns(("", "before", "after"), rows))
