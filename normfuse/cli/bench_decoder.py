"""`normfuse bench FOLDER`: how fast the folder of a decoder reads prompts and writes."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.bundled import Telling, bundled
from normfuse.cli.options import Model, names
from normfuse.errors import CheckFailed, Undecided, UsageError

if TYPE_CHECKING:
    from normfuse.benchmark import Comparison, Engine, Schedule
    from normfuse.benchmark.written import Written

__all__ = ["Lengths", "bench_folder", "length_options"]


@dataclass(frozen=True)
class Lengths:
    """How much is read and written; None where the user does not say."""

    prompt_tokens: int | None = None
    new_tokens: int | None = None

    def check_unused(self) -> None:
        """Complain about flags that only a folder of a decoder has."""
        if self != Lengths():
            raise UsageError("--prompt-tokens and --new-tokens are for the folder of a decoder (normfuse export --with-past)")


#: How much is read and written, as the argument `lengths` of the command.
length_options = bundled(
    "lengths",
    Lengths,
    click.option("--prompt-tokens", type=click.IntRange(1), help="Folder of a decoder: tokens of the prompt.  [default: 128]"),
    click.option("--new-tokens", type=click.IntRange(2), help="Folder of a decoder: tokens behind it.  [default: 128]"),
)


def bench_folder(
    model: Model,
    against: str | None,
    lengths: Lengths,
    schedule: "Callable[[int], Schedule]",
    at_least: float | None,
    telling: Telling,
) -> None:
    """Measure and tell; the exit code follows from the steps.

    Raises:
        UsageError: a rival is unknown, or the model does not know so many tokens.
        CheckFailed: the folder is slower than demanded.
        Undecided: this machine cannot tell.
    """
    from normfuse.app.writing import rivals as known
    from normfuse.benchmark.written import Written

    folder = Path(model.source)
    size = known.Lengths(lengths.prompt_tokens or 128, lengths.new_tokens or 128)
    _check_length(folder, size.room)
    asked = [known.named(text, folder) for text in dict.fromkeys(names(against) or ("genai",))]
    own = known.Named(folder.name, "onnxruntime", folder)

    def say(text: str) -> None:
        if not (telling.quiet or telling.as_json):
            click.echo(text, err=True)

    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as made:
        say(f"preparing {', '.join(r.name for r in asked)}, then opening each of them in a process of its own")
        each = [known.engines(known.prepared(rival, Path(made)), size) for rival in asked]
        ours = known.engines(own, size)
        prompts, steps = (_measured([e[i] for e in each], ours[i], schedule(1), telling) for i in (0, 1))
    result = Written(prompts, steps, size.prompt, size.tokens, at_least)
    if telling.as_json:
        click.echo(json.dumps({**result.to_dict(), "source": model.source}, indent=2))
    elif not telling.quiet:
        click.echo(str(result))
    _judged(result)


def _measured(rivals: "list[Engine]", ours: "Engine", schedule: "Schedule", telling: Telling) -> "list[Comparison]":
    from normfuse.app.rivals import bench_each

    return bench_each(rivals, ours, schedule, progress=not telling.quiet)


def _check_length(folder: Path, room: int) -> None:
    from normfuse.export.decoder.folder import CONFIG

    try:
        model: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
        longest = int(model["context_length"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{folder / CONFIG} is broken: {type(e).__name__}: {e}") from e
    if room > longest:
        raise UsageError(f"--prompt-tokens and --new-tokens: {room} tokens, and {folder} knows {longest} positions")


def _judged(result: "Written") -> None:
    from normfuse.benchmark import Verdict

    claim, worst = result.claim, result.claim.worst
    if claim.verdict is Verdict.FAILS:
        raise CheckFailed(
            f"a step of {worst.b.name} is {worst.speedup} times as fast as one of {worst.a.name}; at least "
            f"{worst.bound(result.at_least):.3f} was demanded"
        )
    if claim.verdict is Verdict.UNDECIDED:
        why = worst.why_undecided(result.at_least).replace("(seconds)", "(--seconds)")
        raise Undecided(f"{why}; the speedup is {worst.speedup}")
