"""`normfuse run`."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.app.source_options import Options
from normfuse.cli.files.given import file_inputs, is_file
from normfuse.cli.files.running import opened_file
from normfuse.cli.help import Command
from normfuse.cli.options import force_option, json_option, verbosity
from normfuse.errors import UsageError
from normfuse.files import atomic, check_target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["run"]

_TOP = 5


@click.command(cls=Command, short_help="Run a file on inputs: outputs, and where they go.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "inputs",
    type=click.Path(path_type=Path),
    help="Inputs from .npz, .npy, .pt or .safetensors.  [default: random]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="[NAME=]SIZES",
    help="Random inputs of these sizes.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs by name into this .npz file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random inputs.")
@click.option("--trust", is_flag=True, help="Let PyTorch read a .pt2 file as it does.")
@force_option
@json_option
@verbosity
def run(
    file: Path, inputs: Path | None, shapes: tuple[str, ...], output: Path | None, seed: int, trust: bool, force: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Run FILE (.onnx, .xml, .pt2, or an engine on a GPU) and tell what comes out."""
    if output is not None:
        if output.suffix != ".npz":
            raise UsageError(f"-o {output}: expected a name that ends in .npz")
        check_target(output, force=force)
    called = opened_file(file, trust=trust)
    found = called(_inputs(file, Options(shapes=shapes, input=inputs, seed=seed, trust=trust)))
    if output is not None:
        _write(found, output, force=force)
    if as_json:
        told = {name: {"dtype": _dtype(v), "shape": list(v.shape)} | _range(v) for name, v in found.items()}
        click.echo(json.dumps({"schema": 1, "file": str(file), "outputs": told}, indent=2))
    elif not quiet:
        if inputs is None:
            click.echo(f"{file} on random inputs (seed {seed}); --input FILE takes yours")
        for name, value in found.items():
            click.echo("\n".join(_lines(name, value)))
        if output is not None:
            click.echo(f"wrote {output}")


def _inputs(file: Path, options: Options) -> Any:
    from normfuse.app.example_inputs import read_inputs

    if is_file(str(file)):
        return file_inputs(file, options)
    if options.input is not None:
        return read_inputs(options.input)
    if options.shapes:
        raise UsageError(f"--shape is for files that leave sizes open; {file} states its sizes: leave it out, or pass --input")
    if file.suffix != ".pt2":
        raise UsageError(f"{file}: pass its inputs with --input")
    from normfuse.pt2 import load_program

    example = load_program(file, trust=options.trust).example_inputs
    if example is None:
        raise UsageError(f"{file} holds no example inputs: pass --input")
    return example[1] if example[1] and not example[0] else (*example[0], *example[1].values())


def _write(found: "dict[str, Tensor]", output: Path, *, force: bool) -> None:
    import numpy as np

    with atomic(output, force=force) as temporary, open(temporary, "wb") as f:
        arrays: dict[str, Any] = {name: _array(value) for name, value in found.items()}
        np.savez(f, **arrays)


def _array(value: "Tensor") -> Any:
    return (value.float() if _dtype(value) == "bfloat16" else value).numpy()  # NumPy has no bfloat16; float32 holds its values


def _dtype(value: "Tensor") -> str:
    return str(value.dtype).removeprefix("torch.")


def _range(value: "Tensor") -> dict[str, float]:
    if not value.numel() or value.is_complex():
        return {}
    exact = value.double()
    return {"min": float(exact.min()), "max": float(exact.max()), "mean": float(exact.mean())}


def _lines(name: str, value: "Tensor") -> list[str]:
    """The output in a line, and the largest entries of the first row where it is a table of scores."""
    said = ", ".join(f"{k} {v:.4g}" for k, v in _range(value).items())
    lines = textwrap.wrap(f"{name}: {_dtype(value)}{list(value.shape)}  {said}", 80, subsequent_indent="  ")
    if value.ndim == 2 and value.shape[1] >= 2 and value.is_floating_point():
        top = value[0].float().topk(min(_TOP, value.shape[1]))
        pairs = ", ".join(f"{int(i)} ({float(v):.3g})" for v, i in zip(top.values, top.indices, strict=True))
        lines += textwrap.wrap(f"largest of the first row: {pairs}", 80, initial_indent="  ", subsequent_indent="    ")
    return lines
