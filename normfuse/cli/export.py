"""`normfuse export`."""

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.columns import columns, differences
from normfuse.cli.decoder_export import DecoderFlags, decoder_options, to_folder
from normfuse.cli.onnx_files import FileOptions, is_onnx
from normfuse.cli.options import Model, Pipeline, force_option, json_option, model_options, pipeline_options, spelled, verbosity
from normfuse.cli.reports import check_report, report_option, write_report
from normfuse.cli.speed import speed_option
from normfuse.errors import UsageError
from normfuse.export.runtimes import parse_runtime
from normfuse.export.targets import ATTENTION_FORMS, NATIVE_ATTENTION
from normfuse.files import check_target

if TYPE_CHECKING:
    from normfuse.reports.report import Report

__all__ = ["ENGINE_SUFFIXES", "export"]

#: Names that stand for a TensorRT engine.
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
#: What runs a model in a server; with the last one its ONNX Runtime builds a TensorRT engine when the model is loaded.
BACKENDS = ("onnxruntime", "tensorrt", "onnxruntime+tensorrt")
_ENGINE_ONLY = {
    "profiles": "--shapes", "flavour": "--flavour", "capabilities": "--capability", "plugins": "--plugins", "dry_run": "--dry-run",
}  # fmt: skip


@click.command(short_help="Optimize SOURCE and export it to ONNX or TensorRT.")
@model_options
@pipeline_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="What to write: NAME.onnx, or NAME.engine for TensorRT.")
@click.option(
    "--target", help="onnxruntime, tensorrt or portable (standard ops only).  [default: onnxruntime; tensorrt for engines]"
)
@click.option("--opset", type=int, help="ONNX opset.  [default: the best one for the target]")
@click.option("--runtime", metavar="X.Y", help="The oldest ONNX Runtime that must run the file, e.g. 1.20.  [default: any]")
@click.option(
    "--attention",
    type=click.Choice(("auto", *ATTENTION_FORMS, NATIVE_ATTENTION)),
    default="auto",
    show_default=True,
    help="How attention is written; auto goes by a table of measurements, and with --tune by measuring here.",
)
@click.option("--tune", is_flag=True, help="Measure which forms are fastest on this machine; found once, then remembered.")
@click.option(
    "--form",
    type=click.Choice(("auto", "native", "integer", "qdq", "weight_only")),
    default="auto",
    show_default=True,
    help="What quantized layers become: ops of normfuse's kernels, standard integer ops, QuantizeLinear pairs, or packed weights.",
)
@click.option("--int4", is_flag=True, help="Keep 4-bit weights as INT4 in integer and qdq files: smaller, slower to load.")
@click.option(
    "--dtype",
    metavar="fp32|fp16|bf16|fp64",
    callback=spelled(),
    help="Of weights and products; statistics of norms stay in fp32.  [default: the model's, or the nearest that the target takes]",
)
@click.option("--io-dtype", type=click.Choice(("fp32", "low")), default="fp32", show_default=True, help="Of inputs and outputs.")
@click.option(
    "--shapes",
    "profiles",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX",
    help="Engine: sizes of an input, e.g. x=1x3x224x224:8x3x224x224:64x3x224x224.",
)
@click.option(
    "--flavour", type=click.Choice(("tensorrt_rtx", "tensorrt")), help="Engine: which TensorRT.  [default: what is installed]"
)
@click.option(
    "--capability", "capabilities", multiple=True, metavar="X.Y", help="Engine: compute capability to build for, e.g. 8.9."
)
@click.option("--plugins", metavar="NAMES", help="Engine: ops that become normfuse's own kernels, e.g. rms_norm,shiftquant_linear.")
@click.option("--dry-run", is_flag=True, help="Engine: say which nodes TensorRT takes, and write nothing.")
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    help="Write a model repository of NVIDIA's Triton Inference Server into this folder.",
)
@click.option("--name", help="Repository: name of the model.  [default: from SOURCE]")
@click.option("--model-version", help="Repository: number of the version, or next.  [default: 1]")
@click.option("--backend", type=click.Choice(BACKENDS), help="Repository: what runs it.  [default: onnxruntime]")
@decoder_options
@speed_option
@report_option
@force_option
@json_option
@verbosity
def export(
    model: Model, pipeline: Pipeline, decoder: DecoderFlags, output: Path | None, target: str | None, opset: int | None,
    runtime: str | None, attention: str, tune: bool, form: str, int4: bool, dtype: str | None, io_dtype: str,
    profiles: tuple[str, ...], flavour: str | None, capabilities: tuple[str, ...], plugins: str | None,
    dry_run: bool, repository: Path | None, name: str | None, model_version: str | None,
    backend: str | None, speed_check: bool, report_path: Path | None, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Optimize SOURCE, export it, and prove the file in its runtime.

    The name behind -o says what is written: an ONNX file, or a TensorRT engine, which is built without a GPU where TensorRT
    for RTX is installed. An .onnx file as SOURCE becomes an engine as it is.
    """
    from normfuse.cli.engine_export import EngineOptions, dry, to_engine

    decoder.check_unused()
    if decoder.with_past:
        other: dict[str, Any] = {"--opset": opset, "--runtime": runtime, "--tune": tune, "--int4": int4, "--dtype": dtype}
        other |= {"--attention": attention != "auto", "--form": form != "auto", "--io-dtype": io_dtype != "fp32"}
        other |= {"--shapes": profiles, "--flavour": flavour, "--capability": capabilities, "--plugins": plugins}
        other |= {"--dry-run": dry_run, "--repository": repository, "--report": report_path}
        other |= {"--calibration": pipeline.calibration, "--partial": pipeline.partial}
        to_folder(model, pipeline, decoder, output, target, other, force=force, as_json=as_json, quiet=quiet)
        return
    engine = EngineOptions(dtype, io_dtype, profiles, flavour, capabilities, _names(plugins), opset, form)
    if runtime is not None:
        parse_runtime(runtime)  # a misspelt release costs a second and not a minute
    files = FileOptions(runtime, attention, tune)
    if repository is not None:
        from normfuse.cli.deploy import Deployment, deploy

        if output is not None:
            raise UsageError("-o and --repository both say where to write: pass one of them")
        if dry_run:
            raise UsageError("--dry-run asks about an engine: pass -o NAME.engine instead of --repository")
        if report_path is not None:
            raise UsageError("--report goes with -o; --json tells what --repository wrote")
        where = Deployment(repository, name, model_version or "1", backend)
        deploy(model, pipeline, engine, where, target, files, int4=int4, force=force, as_json=as_json, quiet=quiet)
        return
    for flag, value in (("--name", name), ("--backend", backend), ("--model-version", model_version)):
        if value is not None:
            raise UsageError(f"{flag} is for --repository")
    if output is None:
        raise UsageError("pass -o NAME.onnx or -o NAME.engine, or --repository DIR")
    if output.suffix in ENGINE_SUFFIXES:
        if target not in (None, "tensorrt"):
            raise UsageError(f"-o {output} is an engine, and --target is {target}: leave --target out")
        if files != FileOptions():
            raise UsageError("--runtime, --attention and --tune are for ONNX files, and -o names an engine")
        if int4:
            raise UsageError("--int4 is for ONNX files; an engine packs 4-bit weights anyway")
        check_report(report_path, force=force)
        if dry_run:
            dry(model, pipeline, engine, as_json=as_json)
            return
        built, fast = to_engine(model, pipeline, engine, output, force=force, progress=not quiet)
        from normfuse.reports.record import report

        found = None if fast is None else dataclasses.replace(report(fast), files=(str(built),))
        if found is not None:
            write_report(found, report_path, force=force)
        _tell(found, {"engine": built.manifest() | {"path": str(built.path)}}, str(built), as_json, quiet)
        return
    given = {"profiles": profiles, "flavour": flavour, "capabilities": capabilities, "plugins": plugins, "dry_run": dry_run}
    stray = [flag for key, flag in _ENGINE_ONLY.items() if given[key]]
    if output.suffix != ".onnx":
        raise UsageError(
            f"-o {output}: expected a name that ends in .onnx, or in {', '.join(ENGINE_SUFFIXES)} for a TensorRT engine"
        )
    if stray:
        raise UsageError(f"{stray[0]} is for TensorRT engines, and -o {output} is an ONNX file")
    if is_onnx(model.source):
        raise UsageError(f"{model.source} is an ONNX file already; name an engine (-o NAME.engine) to build one of it")
    target = "onnxruntime" if target is None else target
    _to_onnx(
        model, pipeline, output, target, opset, files, form, int4, dtype, io_dtype, speed_check, report_path, force, as_json, quiet,
    )  # fmt: skip


def _to_onnx(
    model: Model, pipeline: Pipeline, output: Path, target: str, opset: int | None, files: FileOptions, form: str, int4: bool,
    dtype: str | None, io_dtype: str, speed_check: bool, report_path: Path | None, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    check_target(output, force=force)
    check_report(report_path, force=force)

    from normfuse.export import to_onnx
    from normfuse.export.onnx.precision.other_dtype import check_double
    from normfuse.export.targets import opset_for, target_named
    from normfuse.reports.record import report

    opset_for(target_named(target), opset, files.runtime)  # a misspelt target costs a second and not a minute
    loaded = model.load(inputs_needed=True)
    check_double(loaded.model, dtype, target_named(target))
    fast = pipeline.run(model, loaded)
    original = loaded if speed_check and pipeline.quantize is not None else None  # a copy of the weights, kept where it is measured
    del loaded
    exported = to_onnx(
        fast, output, target=target, opset=opset, form=form, int4_initializers=int4, dtype=dtype, io_dtype=io_dtype, force=force,
        **dataclasses.asdict(files),
    )  # fmt: skip
    text, data = str(exported), {"export": dataclasses.asdict(exported)}
    measured = exported.form not in (None, "weight_only") and target == "onnxruntime" and (report_path or not quiet)
    if original is not None and measured:
        from normfuse.cli.speed import speed_of

        speed = speed_of(original, output)
        text, data = f"{text}\n{speed}", data | {"speed": speed.to_dict()}
    text = f"{text}\n\nrun it:\n\n{textwrap.indent(exported.how_to_run.rstrip(), '    ')}"
    found = dataclasses.replace(report(fast), files=(text,))
    write_report(found, report_path, force=force)
    _tell(found, data, text, as_json, quiet)


def _tell(found: "Report | None", data: dict[str, Any], text: str, as_json: bool, quiet: bool) -> None:
    if as_json:
        told = {"schema": 1, **data} | ({} if found is None else {"report": found.to_dict()})
        click.echo(json.dumps(told, indent=2, default=str))
    elif not quiet:
        click.echo(text if found is None else f"{found}\n\n{_operators(found)}{text}")


def _operators(found: "Report") -> str:
    """Operators of the graph that there are more or fewer of; nothing where they are as before."""
    rows = differences(found.operators_before, found.operators_after)
    if not rows:
        return ""
    rows.append(("all", str(sum(found.operators_before.values())), str(sum(found.operators_after.values()))))
    return "\n".join(columns(("operators in PyTorch", "before", "after"), rows)) + "\n\n"


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(n.strip() for n in text.split(",") if n.strip()) if text else ()
