"""What `normfuse export` does with an ONNX file: another file of it, for another runtime, opset or precision."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.bundled import Telling
from normfuse.cli.columns import columns, differences
from normfuse.cli.files.given import file_inputs
from normfuse.cli.options import Model, Pipeline
from normfuse.errors import UsageError
from normfuse.export.targets import Folder

if TYPE_CHECKING:
    from normfuse.export.result import Exported

__all__ = ["convert", "refuse_model_flags"]

_CHANGES = ("target", "opset", "runtime", "dtype")  # options that make another file of one that is exported


def refuse_model_flags(model: Model, pipeline: Pipeline, more: dict[str, Any]) -> None:
    """Raises UsageError for a flag that needs the PyTorch model; `more` are flags of the command with their values."""
    given = {
        "--quantize": pipeline.quantize, "--passes": pipeline.passes, "--partial": pipeline.partial,
        "--verify": pipeline.verify != "end", "--pretrained": model.options.pretrained, "--weights": model.options.weights,
        **more,
    }  # fmt: skip
    for flag, value in given.items():
        if value:
            raise UsageError(
                f"{flag} starts from the PyTorch model, and {model.source} is exported already: leave it out, or name the model "
                "that the file was made of"
            )


def convert(model: Model, folder: Folder, options: Any, output: Path, telling: Telling) -> None:
    """Write the file, proven against the one that is given, and tell what differs."""
    source = Path(model.source)
    inputs = file_inputs(source, model.options)
    _check_asked(source, output, options)
    exported = folder.convert(source, output, inputs, options)
    if telling.as_json:
        told = {"schema": 1, "source": model.source, "export": dataclasses.asdict(exported)}
        click.echo(json.dumps(told, indent=2, default=str))
    elif not telling.quiet:
        run = textwrap.indent(exported.how_to_run.rstrip(), "    ")
        click.echo(f"{exported}\n\n{_before_and_after(source, exported)}\n\nrun it:\n\n{run}")


def _check_asked(source: Path, output: Path, options: Any) -> None:
    """Raises UsageError for a file of normfuse's own that would stay what it is: its model was optimized, and it is simplified."""
    from normfuse.export.onnx.inspect import provenance

    flags = {f"--{f.name.replace('_', '-')}": f for f in dataclasses.fields(options) if f.name in _CHANGES}
    if output.suffix != source.suffix or any(getattr(options, f.name) != f.default for f in flags.values()):
        return
    if provenance(source):
        raise UsageError(
            f"{source} was written by normfuse, and nothing of it would change: pass {', '.join(flags)}, or name the model that "
            "it was made of"
        )


def _before_and_after(source: Path, exported: Exported) -> str:
    """A table of what the new file has for what the old one had."""
    from normfuse.export.onnx.inspect import facts, op_counts
    from normfuse.reports.numbers import size

    before, known = op_counts(source), facts(source)
    rows = [("nodes", str(sum(before.values())), str(sum(exported.ops.values())))]
    if exported.path.suffix == source.suffix:  # another format has other names for its operators
        rows += [(f"  {name}", left, right) for name, left, right in differences(before, exported.ops)]
        rows.append(("opset", str(known.opsets.get("", "-")), str(exported.opset)))
    rows.append(("file", size(known.bytes), size(exported.bytes)))
    if exported.error is not None:
        rows.append(("relative error", "-", f"{exported.error.max_rel:.1e}"))
    return "\n".join(columns(("", "before", "after"), rows))
