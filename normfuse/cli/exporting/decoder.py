"""`normfuse export --with-past`: a language model as a folder that generates text."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.bundled import Telling, bundled
from normfuse.cli.exporting.asked import Asked, Place
from normfuse.cli.options import Model, Pipeline
from normfuse.errors import UsageError

if TYPE_CHECKING:
    from normfuse.app.language.options import DecoderOptions

__all__ = ["DecoderFlags", "decoder_options", "to_folder"]

_FORMS = {None: None, "onnxruntime": None, "portable": "portable"}  # of attention, by target


@dataclass(frozen=True)
class DecoderFlags:
    """The flags of a folder; see `normfuse.app.language.options.DecoderOptions`."""

    with_past: bool = False
    last_logits: bool = False
    padding: Any = "both"
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


#: What a folder with a cache is like, as the argument `decoder` of the command.
decoder_options = bundled(
    "decoder",
    DecoderFlags,
    click.option("--with-past", is_flag=True, help="Write a language model with its cache of keys and values as a folder."),
    click.option("--last-logits", is_flag=True, help="Folder: logits of the newest token alone."),
    click.option(
        "--padding",
        type=click.Choice(("both", "right")),
        default="both",
        show_default=True,
        help="Folder: where rows may be padded.",
    ),
    click.option("--max-length", type=int, help="Folder: tokens of the cache.  [default: what the model knows, up to 4096]"),
    click.option(
        "--proof-tokens", type=int, default=64, show_default=True, help="Folder: tokens to compare with the model; 0 for none."
    ),
    click.option("--no-tokenizer", is_flag=True, help="Folder: leave the tokenizer out."),
)


def to_folder(model: Model, pipeline: Pipeline, flags: DecoderFlags, asked: Asked, place: Place, telling: Telling) -> None:
    """Write the folder and tell what it is.

    Raises:
        UsageError: a flag is wrong or not for folders, or the source is no Hugging Face folder of a language model.
    """
    from normfuse.app.decoders import to_decoder
    from normfuse.app.hf_folder import local_folder
    from normfuse.app.tokenizers import tokenizer_in
    from normfuse.export.decoder.folder import check_place

    output = place.output
    if output is None:
        raise UsageError("pass -o FOLDER")
    kind, _, source = model.source.partition(":")
    if kind != "hf" or not source:
        raise UsageError(f"--with-past takes a local Hugging Face folder, hf:DIR, and SOURCE is {model.source}")
    stray = _not_for_folders(pipeline, asked, place, telling)
    if stray:
        raise UsageError(f"{stray} is not for the folder of a decoder: leave it out, or --with-past")
    if asked.target not in _FORMS:
        raise UsageError(f"--target {asked.target}: a folder with a cache is for onnxruntime or portable")
    check_place(output, force=telling.force)
    attention = _FORMS[asked.target]
    if asked.attention == "native":
        if attention is not None:
            raise UsageError(f"--attention native is normfuse's kernel, and --target {asked.target} has standard ops alone")
        attention = "native"
    how = _options(flags, pipeline, attention)
    loaded = model.load()
    tokenizer = (
        None if flags.no_tokenizer else tokenizer_in(local_folder(source), trust=model.options.trust, without="--no-tokenizer")
    )
    made = to_decoder(loaded.module, output, tokenizer=tokenizer, quantize=_quantize(pipeline), options=how, force=telling.force)
    if telling.as_json:
        click.echo(json.dumps({"schema": 1, "decoder": made.manifest()}, indent=2, default=str))
    elif not telling.quiet:
        weights = f"\n  note       weights: {loaded.weights}" if loaded.weights.startswith("random") else ""
        asks = "--ids 1,2,3" if tokenizer is None else "--prompt 'Once upon a time'"
        click.echo(f"{made}{weights}\n\nrun it:\n\n    normfuse generate {output} {asks}")


def _not_for_folders(pipeline: Pipeline, asked: Asked, place: Place, telling: Telling) -> str | None:
    """The first flag that is given and that a folder does not have."""
    flags: dict[str, Any] = {
        "--opset": asked.opset, "--runtime": asked.runtime, "--tune": asked.tune, "--int4": asked.int4, "--dtype": asked.dtype,
        "--attention": asked.attention not in ("auto", "native"), "--form": asked.form != "auto",
        "--io-dtype": asked.io_dtype != "fp32",
        "--dry-run": place.dry_run, "--repository": place.repository, "--name": place.name, "--backend": place.backend,
        "--model-version": place.model_version, "--report": telling.report_path, "--calibration": pipeline.calibration,
        "--partial": pipeline.partial,
    }  # fmt: skip
    return asked.engine_only() or next((flag for flag, value in flags.items() if value), None)


def _options(flags: DecoderFlags, pipeline: Pipeline, attention: Any) -> "DecoderOptions":
    from normfuse.app.language.options import DecoderOptions

    passes: Any = pipeline.passes  # names that the user wrote
    return DecoderOptions(
        attention=attention, padding=flags.padding, last_logits=flags.last_logits, max_length=flags.max_length,
        proof_tokens=flags.proof_tokens, passes=passes, verify=pipeline.verify, in_place=True,
    )  # fmt: skip


def _quantize(pipeline: Pipeline) -> Any:
    from normfuse.export.decoder.blocks import Blocks, parse_blocks

    if pipeline.words is None:
        return None
    found = parse_blocks(pipeline.words)
    return pipeline.quantize if found is None or pipeline.quantize is None else Blocks(found.bits, pipeline.quantize.keep)
