"""`normfuse export --with-past`: a causal language model as a folder that generates text."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from normfuse.cli.options import Model, Pipeline
from normfuse.errors import CaptureError, UsageError

if TYPE_CHECKING:
    from normfuse.app.decoders import DecoderOptions

__all__ = ["DecoderFlags", "decoder_options", "to_folder"]

F = TypeVar("F", bound=Callable[..., Any])
_FORMS = {None: "gqa", "onnxruntime": "gqa", "portable": "portable"}  # of attention, by target
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class DecoderFlags:
    """The flags of a folder; see `normfuse.app.decoders.DecoderOptions`."""

    with_past: bool = False
    last_logits: bool = False
    padding: str = "both"
    max_length: int | None = None
    proof_tokens: int = 64
    no_tokenizer: bool = False

    def check_unused(self) -> None:
        """Complain about flags that only a folder has."""
        if not self.with_past and self != DecoderFlags():
            named = {"last_logits": "--last-logits", "padding": "--padding", "max_length": "--max-length"}
            named |= {"proof_tokens": "--proof-tokens", "no_tokenizer": "--no-tokenizer"}
            flag = next(text for name, text in named.items() if getattr(self, name) != getattr(DecoderFlags(), name))
            raise UsageError(f"{flag} is for the folder of a decoder: pass --with-past as well")


def decoder_options(f: F) -> F:
    """What a folder with a cache is like, handed to the command as `decoder`."""

    @click.option("--with-past", is_flag=True, help="Write a causal language model with its cache of keys and values as a folder.")
    @click.option("--last-logits", is_flag=True, help="Folder: logits of the newest token alone.")
    @click.option(
        "--padding",
        type=click.Choice(("both", "right")),
        default="both",
        show_default=True,
        help="Folder: where rows may be padded.",
    )
    @click.option("--max-length", type=int, help="Folder: tokens of the cache.  [default: what the model knows, up to 4096]")
    @click.option(
        "--proof-tokens", type=int, default=64, show_default=True, help="Folder: tokens to compare with the model; 0 for none."
    )
    @click.option("--no-tokenizer", is_flag=True, help="Folder: leave the tokenizer out.")
    @functools.wraps(f)
    def wrapped(
        with_past: bool, last_logits: bool, padding: str, max_length: int | None, proof_tokens: int, no_tokenizer: bool, **rest: Any
    ) -> Any:
        return f(decoder=DecoderFlags(with_past, last_logits, padding, max_length, proof_tokens, no_tokenizer), **rest)

    return wrapped  # type: ignore[return-value]


def to_folder(
    model: Model, pipeline: Pipeline, flags: DecoderFlags, output: Path | None, target: str | None, given: Mapping[str, Any], *,
    force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write the folder and tell what it is.

    Args:
        given: flags that a folder does not have, with what they say; any that is set is refused.

    Raises:
        UsageError: a flag is wrong, or the source is no Hugging Face folder of a causal language model.
    """
    from normfuse.app.decoders import to_decoder
    from normfuse.export.decoder.folder import check_place

    if output is None:
        raise UsageError("pass -o FOLDER")
    kind, _, place = model.source.partition(":")
    if kind != "hf" or not place:
        raise UsageError(f"--with-past takes a local Hugging Face folder, hf:DIR, and SOURCE is {model.source}")
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} is not for the folder of a decoder: leave it out, or --with-past")
    if target not in _FORMS:
        raise UsageError(f"--target {target}: a folder with a cache is for onnxruntime or portable")
    check_place(output, force=force)
    how = _options(flags, pipeline, _FORMS[target])
    loaded = model.load()
    tokenizer = None if flags.no_tokenizer else _tokenizer(Path(place), trust=model.options.trust)
    made = to_decoder(
        loaded.module, output, tokenizer=tokenizer, quantize=_quantize(pipeline), options=how, force=force
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"schema": 1, "decoder": made.manifest()}, indent=2, default=str))
    elif not quiet:
        weights = f"\n  note       weights: {loaded.weights}" if loaded.weights.startswith("random") else ""
        asks = "--ids 1,2,3" if tokenizer is None else "--prompt 'Once upon a time'"
        click.echo(f"{made}{weights}\n\nrun it:\n\n    normfuse generate {output} {asks}")


def _options(flags: DecoderFlags, pipeline: Pipeline, attention: str) -> "DecoderOptions":
    from normfuse.app.decoders import DecoderOptions

    return DecoderOptions(
        attention=attention, padding=flags.padding, last_logits=flags.last_logits, max_length=flags.max_length,
        proof_tokens=flags.proof_tokens, passes=pipeline.passes, verify=pipeline.verify,
    )  # fmt: skip


def _quantize(pipeline: Pipeline) -> Any:
    from normfuse.export.decoder.blocks import Blocks, parse_blocks

    if pipeline.words is None:
        return None
    found = parse_blocks(pipeline.words)
    return pipeline.quantize if found is None or pipeline.quantize is None else Blocks(found.bits, pipeline.quantize.keep)


def _tokenizer(folder: Path, *, trust: bool) -> Any:
    from normfuse.app.hf_folder import offline
    from normfuse.extras import need

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UsageError(f"hf:{folder} has no tokenizer: put its tokenizer.json there, or pass --no-tokenizer")
    transformers = need("transformers", extra="hf")
    try:
        with offline():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except Exception as e:  # of many kinds, from several libraries
        said = " ".join(str(e).split())[:300]
        raise CaptureError(f"the tokenizer of hf:{folder} could not be loaded: {said}; --no-tokenizer leaves it out") from e
