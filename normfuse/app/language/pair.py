"""An encoder and a decoder of transformers as a folder of two files; see `normfuse.app.decoders.to_decoder`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from normfuse import native
from normfuse.app.language.options import DecoderOptions
from normfuse.app.language.steps import facts, optimized, prompts, sizes, untouched, weights
from normfuse.errors import UsageError
from normfuse.export.decoder.blocks import Blocks
from normfuse.export.decoder.call import longest, text_config
from normfuse.export.decoder.encdec import (
    Found,
    SpeechDecoder,
    SpeechEncoder,
    TextDecoder,
    TextEncoder,
    encoder_decoder,
    example_source,
)
from normfuse.export.decoder.encdec_proof import Source, prove_pair
from normfuse.export.decoder.encdec_session import SPEECH_FILES, TEXT_FILES
from normfuse.export.decoder.file import Written, write_model
from normfuse.export.decoder.folder import CONFIG, MANIFEST, DecoderFolder, copy_kernels, placed, write_tokenizer
from normfuse.export.decoder.forms import DecoderAttention, rotates
from normfuse.export.decoder.genai import token_of, whisper_config
from normfuse.export.decoder.layout import Layout, speech_decoder, speech_encoder, text_decoder, text_encoder
from normfuse.export.decoder.proof import Proof
from normfuse.export.decoder.rotary import rotate_in_attention
from normfuse.export.onnx.writer.save import save_model
from normfuse.extras import need
from normfuse.quant.spec import ShiftQuant

__all__ = ["Pair", "write_pair"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """What is asked of the folder; see `normfuse.app.decoders.to_decoder`."""

    blocks: Blocks | None
    spec: ShiftQuant | None
    prompts: Sequence[Sequence[int]] | None
    how: DecoderOptions
    length: int
    notes: tuple[str, ...]

    @property
    def attention(self) -> DecoderAttention:
        """The form of attention; only causal models have the one that is an operator of normfuse."""
        return self.how.attention or "gqa"

    @property
    def quantized(self) -> bool:
        """Weights do not stay floats."""
        return self.blocks is not None or self.spec is not None


@dataclass(frozen=True)
class _Half:
    """An encoder or a decoder, not yet on disk."""

    fast: fx.GraphModule
    written: Written
    rotated: int = 0


def write_pair(model: nn.Module, path: Path, tokenizer: Any, pair: Pair, *, force: bool) -> DecoderFolder:
    """The folder of a model in float32; it appears only after it was proven.

    Raises:
        UsageError: an argument is wrong, the model is of another kind, or the folder cannot be written.
        CaptureError: a layer's attention is not of a kind that can be written; the message names the layer.
        ExportError: the files do not say what the model says.
    """
    if pair.how.last_logits:
        raise UsageError(f"last_logits=True: the decoder of {type(model).__name__} starts with a token or few; leave it out")
    if pair.attention == "native":
        raise UsageError(f"attention='native': {type(model).__name__} has an encoder; expected gqa or portable")
    found, start, sources = encoder_decoder(model), _start(model), _sources(model, tokenizer, pair)
    speech = not found.masked and model.get_encoder().main_input_name == "input_features"  # type: ignore[operator]
    names = SPEECH_FILES if speech else TEXT_FILES
    with untouched(model):
        halves = [_half(module, layout, pair) for module, layout in _modules(model, found, speech=speech)]
    graphs = [half.fast for half in halves]
    native_form = any(half.written.form == "native" for half in halves) and native.available()
    with placed(path, force=force) as work:
        for name, half in zip(names, halves, strict=True):
            save_model(half.written.model, work / name, limit=pair.how.external_data_above)
        proof = _proof((work / names[0], work / names[1]), model, sources, pair, start)
        library = copy_kernels(native.path(), work) if native_form else None
        _configure(work, model, tokenizer, found, pair, library if speech else None, speech=speech)
        form = next((half.written.form for half in halves if half.written.form), None)
        made = DecoderFolder(
            path, sizes(work), pair.attention, len(found.sites), halves[1].rotated,
            weights(pair.blocks, pair.spec, form, *graphs), pair.length, longest(model), max(h.written.runtime for h in halves),
            proof, (*pair.notes, *_told(tokenizer)),
        )  # fmt: skip
        (work / MANIFEST).write_text(json.dumps(facts(made, *graphs), indent=2) + "\n", encoding="utf-8")
    return made


def _start(model: Any) -> int:
    """The token that every text starts with."""
    found = token_of(model.config, model.generation_config, "decoder_start")
    found = token_of(model.config, model.generation_config, "bos") if found is None else found
    if found is None:
        raise UsageError(f"{type(model).__name__} does not say which token a text starts with: set decoder_start_token_id")
    return int(found)


def _modules(model: Any, found: Found, *, speech: bool) -> tuple[tuple[Any, Layout], tuple[Any, Layout]]:
    """Encoder and decoder, with the names and sizes of their files."""
    states = int(model.get_encoder().config.hidden_size)
    if not speech:
        behind = text_decoder(found.sites, found.cross, states)
        return (TextEncoder(model), text_encoder()), (TextDecoder(model, found), behind)
    encoder = SpeechEncoder(model, found)
    count = int(model.get_encoder().config.max_source_positions)
    _, bins, frames = example_source(model)[0].shape
    first = speech_encoder((bins, frames), (count, states), len(found.sites), found.cross)
    return (encoder, first), (SpeechDecoder(model, found), speech_decoder(found.sites, count, found.cross))


def _half(module: Any, layout: Layout, pair: Pair) -> _Half:
    how = pair.how
    log.info("optimizing the %s", type(module).__name__)
    fast = optimized(module, how, pair.blocks, pair.spec)
    rotated = rotate_in_attention(fast, longest(module.model), lambda pairs, width: rotates(pair.attention, pairs, width))
    # rows of a decoder are never padded: all texts start together
    windows = "found" in vars(module) and any(site.window for site in module.found.sites)
    return _Half(
        fast, write_model(fast, layout, attention=pair.attention, padding="right", windows=windows, blocks=pair.blocks), rotated
    )


def _proof(files: tuple[Path, Path], model: Any, sources: list[Source], pair: Pair, start: int) -> Proof | None:
    how = pair.how
    room = longest(model) - 1
    if not how.proof_tokens:
        return None
    log.info("comparing %d tokens", how.proof_tokens)
    return prove_pair(
        files, model, sources, [start], tokens=min(how.proof_tokens, room), tolerance=how.tolerance,
        quantized=pair.quantized, threads=how.threads,
    )  # fmt: skip


def _sources(model: Any, tokenizer: Any, pair: Pair) -> list[Source]:
    """What texts are written of: sentences, or noise of several colours in the place of speech."""
    encoder = model.get_encoder()
    if encoder.main_input_name == "input_ids":
        if pair.prompts is not None:
            return [list(p) for p in pair.prompts]
        return [*prompts(encoder.config.vocab_size, tokenizer)]
    if pair.prompts is not None:
        raise UsageError(f"prompts are ids of tokens, and {type(model).__name__} reads speech: leave them out")
    (features,) = example_source(model)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(features.shape[1:], generator=generator) for _ in range(3)]
    return [(0.5 * x.cumsum(1) / (1 + torch.arange(x.shape[1])).sqrt() * i + x).numpy() for i, x in enumerate(noise)]


def _configure(
    work: Path, model: Any, tokenizer: Any, found: Found, pair: Pair, library: str | None, *, speech: bool
) -> None:  # fmt: skip
    """Write everything but the graphs."""
    model.config.save_pretrained(work)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(work)
    if tokenizer is not None:
        write_tokenizer(tokenizer, work)
    if speech:
        extractor = need("transformers", extra="hf").WhisperFeatureExtractor
        extractor(feature_size=int(model.config.num_mel_bins)).save_pretrained(work)
        config = whisper_config(
            text_config(model), model.generation_config, found.sites, files=SPEECH_FILES,
            vocabulary=int(model.get_output_embeddings().weight.shape[0]), positions=longest(model), max_length=pair.length,
            library=library,
        )  # fmt: skip
        (work / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def _told(tokenizer: Any) -> tuple[str, ...]:
    return () if tokenizer is not None else ("there is no tokenizer in it: readers take and give ids of tokens only",)
