"""`normfuse evaluate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.files.given import is_file
from normfuse.cli.files.running import opened_file
from normfuse.cli.help import Command
from normfuse.cli.options import Model, json_option, model_options, preprocess_option, verbosity
from normfuse.errors import CheckFailed, MissingExtra, Undecided, UsageError
from normfuse.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from normfuse.app.data.labelled import Labelled
    from normfuse.app.evaluation import Evaluation
    from normfuse.app.sources import Source

__all__ = ["evaluate"]


@click.command(cls=Command, short_help="Accuracy of SOURCE and of a file made of it, on labelled data.")
@model_options
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder with a folder of images for each class, a data set on disk, or a .npz with the inputs and label.",
)
@click.option("--samples", type=click.IntRange(1), default=5000, show_default=True, help="At most so many, evenly spread.")
@click.option("--classes", type=click.Path(path_type=Path), help="A text file with the name of each output, one a line.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Exit 1 where more accuracy is surely lost, 3 where that is open.")
@preprocess_option
@json_option
@verbosity
def evaluate(
    model: Model, file: Path, data: Path, samples: int, classes: Path | None, max_drop: float | None, preprocess: str | None,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Compare the answers of SOURCE and of FILE (.onnx, .xml, .pt2, or an engine on a GPU): accuracy before and after, agreement.

    Labels are names of folders, or numbers. Without labels only the agreement is told.
    """
    if is_file(model.source):
        raise UsageError(f"{model.source} is an exported file: name the PyTorch model first, then the file that was made of it")
    from normfuse.app.data.labelled import labelled
    from normfuse.app.data.samples import Reading

    called = opened_file(file, trust=model.options.trust)
    loaded = model.load(inputs_needed=True)
    try:
        found = labelled(data, loaded, Reading(preprocess, samples, model.options.trust))
    except MissingExtra:
        raise
    except UsageError as e:
        raise UsageError(str(e) if str(e).startswith("--") else f"--data {data}: {str(e).removeprefix(f'{data} ')}") from e
    if max_drop is not None and found.labels is None:
        raise UsageError("--max-drop is about labelled data, and these have no labels")
    result = _compared(loaded, called, found, _names(classes), progress=not (quiet or as_json))
    if as_json:
        told = {"schema": 1, "source": model.source, "weights": loaded.weights, "file": str(file), "data": str(data)}
        click.echo(json.dumps({**told, **result.to_dict()}, indent=2))
    elif not quiet:
        said = f", weights: {loaded.weights}" if loaded.weights else ""
        click.echo(f"{model.source}{said}\n{file} on {data}\n\n{result}")
    _judge(result, max_drop)


def _compared(loaded: "Source", called: Any, data: "Labelled", stated: list[str] | None, *, progress: bool) -> "Evaluation":
    import torch

    from normfuse.app import evaluation

    module = loaded.module

    def original(call: Any) -> "Tensor":
        args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
        with torch.inference_mode():
            return _scores(module(*args, **kwargs), loaded.name)

    width = int(original(next(iter(data))[0]).shape[1])
    labels = None if data.labels is None else evaluation.classes_of(data.labels, width, loaded.model, stated)
    with progress_bar("evaluating", total=data.batches, show=progress) as bar:
        return evaluation.evaluate(original, lambda call: _scores(called(call), "the file"), data, labels, bar.advance)


def _scores(outputs: Any, whose: str) -> "Tensor":
    """The first output that is a table of scores."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = [v for v in pytree.tree_leaves(dict(outputs) if hasattr(outputs, "items") else outputs) if isinstance(v, torch.Tensor)]
    found = next((v for v in leaves if v.ndim == 2 and v.is_floating_point() and v.shape[1] > 1), None)
    if found is None:
        told = ", ".join(f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in leaves)
        raise UsageError(f"evaluate is for classifiers, whose output is [batch, classes]; {whose} gives {told}")
    return found.float().cpu()


def _names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--classes {path} cannot be read: {e}") from e


def _judge(result: "Evaluation", max_drop: float | None) -> None:
    """Exit codes as those of `bench`: certain, certainly not, open."""
    if max_drop is None:
        return
    found, low, high = (100 * v for v in result.drop)
    said = f"{found:.2f} points of accuracy are lost ({low:.2f} to {high:.2f})"
    if low > max_drop:
        raise CheckFailed(f"{said}; at most {max_drop:g} were allowed")
    if high > max_drop:
        raise Undecided(f"{said}, on both sides of {max_drop:g}; more samples would tell")
