"""`to_decoder`: a language model of transformers as a folder that generates text in ONNX Runtime."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from normfuse import native
from normfuse.app.language.options import DecoderKeywords, DecoderOptions
from normfuse.app.language.pair import Pair, write_pair
from normfuse.app.language.steps import facts, in_float32, optimized, sizes, stored, untouched, weights
from normfuse.app.language.steps import prompts as some_prompts
from normfuse.errors import UsageError
from normfuse.export.decoder.blocks import Blocks
from normfuse.export.decoder.call import longest, text_config
from normfuse.export.decoder.capture import CausalModel, cached, check_kind
from normfuse.export.decoder.file import write_model
from normfuse.export.decoder.folder import (
    CONFIG,
    MANIFEST,
    MODEL,
    DecoderFolder,
    check_place,
    copy_kernels,
    placed,
    write_tokenizer,
)
from normfuse.export.decoder.forms import rotates
from normfuse.export.decoder.genai import genai_config, length_of
from normfuse.export.decoder.layout import causal
from normfuse.export.decoder.proof import BINDINGS, Proof, prove
from normfuse.export.decoder.rotary import rotate_in_attention
from normfuse.export.keywords import given, keywords_of
from normfuse.export.onnx.writer.save import save_model
from normfuse.extras import need
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.words import Widths
from normfuse.telemetry import no_telemetry

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["to_decoder"]

log = logging.getLogger(__name__)


@keywords_of(DecoderOptions)
def to_decoder(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    quantize: Literal["w4", "w8"] | Widths | Blocks | ShiftQuant | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    options: DecoderOptions | None = None,
    force: bool = False,
    **more: Unpack[DecoderKeywords],
) -> DecoderFolder:
    """Write a language model with its cache of keys and values as a folder; it appears only after it was proven.

    The folder of a causal model holds `model.onnx`, `genai_config.json`, the configuration of the model and its tokenizer, and
    is read by ONNX Runtime and onnxruntime-genai. Of a model with an encoder and a decoder there are two files: from text to
    text `encoder_model.onnx` and `decoder_model_merged.onnx`, named as optimum has them; from speech to text `encoder.onnx` and
    `decoder.onnx`, with a `genai_config.json` of the type `whisper`.

    Args:
        model: a language model of transformers in eval mode; it is not changed.
        folder: what to write.
        tokenizer: of the model, as transformers loads it; without one the folder takes and gives ids of tokens only.
        quantize: `w4` or `w8`: weights in blocks (MatMulNBits), which a stock ONNX Runtime computes fast; a `ShiftQuant` or its
            words (`w4a8`): layers of normfuse's kernels, a copy of which is put into the folder; None for floats.
        prompts: ids of tokens for the proof, of an encoder of text what it reads; default: sentences in the tokenizer's words,
            else random ones.
        options: how it is written; `more` are its fields by name.
        force: replace a folder that an export wrote.

    Raises:
        TypeError: there is no such argument.
        UsageError: an argument is wrong, the model is of another kind, or the folder cannot be written.
        CaptureError: a layer's attention is not of a kind that can be written; the message names the layer.
        ExportError: the file does not say what the model says.
        MissingExtra: transformers, onnx, onnxscript or onnxruntime is not installed.
    """
    how = given(DecoderOptions, options, more, called="to_decoder")
    blocks, spec = stored(quantize)
    path = check_place(folder, force=force)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        no_telemetry()
        need(module, extra="onnx")
    need("transformers", extra="hf")
    check_kind(model, behind_encoder=True)
    length = length_of(longest(model), how.max_length)
    exact, notes = in_float32(model, in_place=how.in_place)
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return write_pair(exact, path, tokenizer, Pair(blocks, spec, prompts, how, length, notes), force=force)
    captured = cached(exact, last_logits=how.last_logits)
    layout, windows = causal(captured.sites, last_logits=how.last_logits), any(site.window for site in captured.sites)
    attention = how.attention or ("native" if spec is not None and native.available() else "gqa")
    with untouched(exact):
        fast = optimized(captured, how, blocks, spec)
        rotated = rotate_in_attention(fast, longest(exact), lambda pairs, width: rotates(attention, pairs, width))
        written = write_model(fast, layout, attention=attention, padding=how.padding, windows=windows, blocks=blocks)
    with placed(path, force=force) as work:
        save_model(written.model, work / MODEL, limit=how.external_data_above)
        proof = _proof(work / MODEL, exact, tokenizer, prompts, how, quantized=quantize is not None)
        own = "native" in (written.form, attention)
        library = copy_kernels(native.path(), work) if own and native.available() else None
        config = _configured(work, exact, captured, tokenizer, length, library)
        made = DecoderFolder(
            path, sizes(work), attention, len(captured.sites), rotated, weights(blocks, spec, written.form, fast), length,
            config["model"]["context_length"], written.runtime, proof, (*notes, *_told(how, tokenizer)),
        )  # fmt: skip
        (work / MANIFEST).write_text(json.dumps(facts(made, fast), indent=2) + "\n", encoding="utf-8")
    return made


def _proof(
    file: Path, model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]] | None, how: DecoderOptions, *, quantized: bool
) -> Proof | None:
    if not how.proof_tokens:
        return None
    rows = some_prompts(text_config(model).vocab_size, tokenizer) if prompts is None else [list(p) for p in prompts]
    room = longest(model) - max(map(len, rows))
    if room < 1:
        raise UsageError(f"prompts of up to {max(map(len, rows))} tokens: the model has {longest(model)} positions")
    bindings = [b for b in BINDINGS if b != "left" or how.padding == "both"]
    log.info("comparing %d tokens after %d prompts", how.proof_tokens, len(rows))
    return prove(
        file, model, rows, tokens=min(how.proof_tokens, room), tolerance=how.tolerance, quantized=quantized,
        bindings=bindings, threads=how.threads,
    )  # fmt: skip


def _configured(work: Path, model: Any, captured: CausalModel, tokenizer: Any, length: int, library: str | None) -> dict[str, Any]:
    """Write everything but the graph; the content of genai's configuration."""
    model.config.save_pretrained(work)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(work)
    if tokenizer is not None:
        write_tokenizer(tokenizer, work)
    head = model.get_output_embeddings()
    config = genai_config(
        text_config(model), model.generation_config, captured.sites, vocabulary=int(head.weight.shape[0]), positions=longest(model),
        max_length=length, library=library,
    )  # fmt: skip
    (work / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return config


def _told(how: DecoderOptions, tokenizer: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    if tokenizer is None:
        found += ("there is no tokenizer in it: readers take and give ids of tokens only",)
    if how.padding == "right":
        found += ("rows of a batch may be padded on the right only",)
    return found
