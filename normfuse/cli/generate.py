"""`normfuse generate`."""

import json
from collections.abc import Iterator
from pathlib import Path

import click

from normfuse.cli.help import Command
from normfuse.cli.options import json_option, verbosity
from normfuse.errors import UsageError

__all__ = ["generate"]


@click.command(cls=Command, short_help="Write on from a prompt with the folder of a decoder.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to write on from.")
@click.option("--audio", metavar="FILE", type=click.Path(path_type=Path), help="A recording to write down: .wav or .npy, 16 kHz.")
@click.option("--language", default="en", show_default=True, help="Of the recording.")
@click.option("--ids", metavar="N,N,...", help="The same as ids of tokens, for a folder without a tokenizer.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="How many to write at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest tokens of this probability.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from so many tokens; 0 for all.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw.")
@click.option("--threads", type=click.IntRange(min=1), help="Of ONNX Runtime.  [default: the CPUs of this process]")
@json_option
@verbosity
def generate(
    folder: Path, prompt: str | None, audio: Path | None, language: str, ids: str | None, tokens: int, temperature: float,
    top_p: float, top_k: int, seed: int, threads: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write on from a prompt with FOLDER, which `normfuse export hf:DIR -o FOLDER --with-past` wrote.

    A model with an encoder and a decoder writes what it makes of the prompt, or of a recording.

    The text appears as it is made; at the end stands how many tokens a second the prompt and the text took.
    """
    from normfuse.app.generation import Rates, Sampling, Writer
    from normfuse.app.language.pair_generation import PairWriter
    from normfuse.export.decoder.encdec_session import files_in

    if sum(given is not None for given in (prompt, ids, audio)) != 1:
        raise UsageError("pass --prompt TEXT, --audio FILE to a model of speech, or --ids N,N,... to a folder without a tokenizer")
    sampling, rates = Sampling(temperature, top_p, top_k, seed), Rates()
    numbers = None if ids is None else _numbers(ids)
    pieces: Iterator[str]
    writer = Writer(folder, threads=threads) if files_in(folder) is None else PairWriter(folder, threads=threads)
    if audio is not None:
        if not isinstance(writer, PairWriter):
            raise UsageError(f"--audio: {folder} reads text: pass --prompt")
        pieces = writer.heard(audio, tokens, sampling, rates, language=language)
    elif numbers is not None:
        pieces = (f"{token} " for token in writer.tokens(numbers, tokens, sampling, rates))
    else:
        assert prompt is not None
        pieces = writer.text(prompt, tokens, sampling, rates)
    written = ""
    for piece in pieces:
        written += piece
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        told = {"prompt_tokens": rates.prompt, "tokens": rates.written, "prefill": rates.prefill, "decode": rates.decode}
        click.echo(json.dumps({"schema": 1, "text": written, **told}, indent=2))
        return
    click.echo()
    if not quiet:
        click.echo(str(rates), err=True)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as e:
        raise UsageError(f"--ids {text}: expected numbers, as in 1,2,3") from e
