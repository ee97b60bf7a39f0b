"""`to_decoder`: a causal language model of transformers as a folder that generates text in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch
from torch import nn

from normfuse import native
from normfuse.api import Verify, optimize
from normfuse.errors import UsageError, did_you_mean
from normfuse.export.decoder.blocks import Blocks, parse_blocks, to_blocks
from normfuse.export.decoder.capture import CausalModel, cached, check_kind, longest, text_config
from normfuse.export.decoder.file import Written, write_model
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
from normfuse.export.decoder.forms import FORMS, DecoderAttention, rotates
from normfuse.export.decoder.genai import genai_config, length_of
from normfuse.export.decoder.proof import BINDINGS, Proof, prove
from normfuse.export.decoder.rotary import rotate_in_attention
from normfuse.export.keywords import given, keywords_of
from normfuse.export.onnx.writer.save import MAX_PROTO, save_model
from normfuse.extras import need
from normfuse.passes import PassName
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.words import Widths, parse_quantize
from normfuse.reports.record import report
from normfuse.telemetry import no_telemetry

if TYPE_CHECKING:
    from torch import fx
    from typing_extensions import Unpack

__all__ = ["DecoderKeywords", "DecoderOptions", "to_decoder"]

log = logging.getLogger(__name__)

_SAMPLES = (
    "The quick brown fox jumps over the lazy dog, and then",
    "In 1998, a small group of engineers began to write a program that reads a model and writes a faster one. They found that",
    "Once upon a time",
)
Padding = Literal["both", "right"]
_PADDING: tuple[str, ...] = get_args(Padding)
#: Before weights are stored in blocks. A norm's gain in the weight behind it would spread the weights of a block, which share a
#: scale, and a runtime multiplies by it anyway: so gains stay where they are.
_FOR_BLOCKS: tuple[PassName, ...] = ("bake", "cleanup", "recognise", "select", "cleanup")


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """How a folder is written.

    Attributes:
        attention: `gqa` (GroupQueryAttention of ONNX Runtime), `portable` (standard ops alone) or `native` (normfuse's own, which
            takes a third to two thirds of the time on a CPU); default: `native` where weights are for normfuse's kernels and
            these are built, so that a folder holds them anyway, else `gqa`.
        padding: `both`: rows may be padded on either side; `right` leaves out what padding on the left costs, 8 to 16 % of the
            attention of a chunk behind a long past.
        last_logits: logits of each row's newest token alone, [batch, 1, vocabulary]; a prompt then costs less.
        max_length: slots of the cache unless a reader asks otherwise; default: as many as the model has positions, at most
            4096.
        proof_tokens: greedy tokens that are compared after each prompt; 0 compares nothing.
        tolerance: bound on the error of the logits, relative to the largest.
        threads: of ONNX Runtime for the proof; default: the CPUs of this process.
        external_data_above: weights above this many bytes go to a second file.
        passes, verify: see `normfuse.optimize`; with weights in blocks the default passes leave gains of norms where they are.
    """

    attention: DecoderAttention | None = None
    padding: Padding = "both"
    last_logits: bool = False
    max_length: int | None = None
    proof_tokens: int = 64
    tolerance: float = 1e-3
    threads: int | None = None
    external_data_above: int = MAX_PROTO
    passes: Sequence[PassName] | None = None
    verify: Verify = "end"

    def __post_init__(self) -> None:
        if self.attention is not None and self.attention not in FORMS:
            hint = did_you_mean(self.attention, FORMS)
            raise UsageError(f"attention={self.attention!r}: expected {', '.join(FORMS)} in a folder of a decoder{hint}")
        if self.padding not in _PADDING:
            raise UsageError(f"padding={self.padding!r}: expected {' or '.join(_PADDING)}{did_you_mean(self.padding, _PADDING)}")
        if self.proof_tokens < 0:
            raise UsageError(f"proof_tokens={self.proof_tokens}: expected 0 or more")


class DecoderKeywords(TypedDict, total=False):
    """The fields of `DecoderOptions`."""

    attention: DecoderAttention | None
    padding: Padding
    last_logits: bool
    max_length: int | None
    proof_tokens: int
    tolerance: float
    threads: int | None
    external_data_above: int
    passes: Sequence[PassName] | None
    verify: Verify


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
    """Write a causal language model with its cache of keys and values as a folder; it appears only after it was proven.

    The folder holds `model.onnx`, `genai_config.json`, the configuration of the model and its tokenizer, and is read by ONNX
    Runtime and onnxruntime-genai.

    Args:
        model: a causal language model of transformers in eval mode; it is not changed.
        folder: what to write.
        tokenizer: of the model, as transformers loads it; without one the folder takes and gives ids of tokens only.
        quantize: `w4` or `w8`: weights in blocks (MatMulNBits), which a stock ONNX Runtime computes fast; a `ShiftQuant` or its
            words (`w4a8`): layers of normfuse's kernels, a copy of which is put into the folder; None for floats.
        prompts: ids of tokens for the proof; default: sentences in the tokenizer's words, else random ones.
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
    blocks, spec = _stored(quantize)
    path = check_place(folder, force=force)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        no_telemetry()
        need(module, extra="onnx")
    need("transformers", extra="hf")
    check_kind(model)
    length = length_of(longest(model), how.max_length)
    exact, notes = _in_float32(model)
    captured = cached(exact, last_logits=how.last_logits)
    passes = _FOR_BLOCKS if how.passes is None and blocks is not None else how.passes
    fast = optimize(
        captured, captured.example(), dynamic_shapes=captured.dynamic_shapes(), passes=passes, verify=how.verify, quantize=spec,
    )  # fmt: skip
    attention = how.attention or ("native" if spec is not None and native.available() else "gqa")
    rotated = rotate_in_attention(fast, longest(exact), lambda pairs, width: rotates(attention, pairs, width))
    written = write_model(fast, captured.sites, attention=attention, padding=how.padding)
    if blocks is not None:
        to_blocks(written.model, blocks)
    with placed(path, force=force) as work:
        save_model(written.model, work / MODEL, limit=how.external_data_above)
        proof = _proof(work / MODEL, exact, tokenizer, prompts, how, quantized=quantize is not None)
        own = "native" in (written.form, attention)
        library = copy_kernels(native.path(), work) if own and native.available() else None
        config = _configured(work, exact, captured, tokenizer, length, library)
        made = DecoderFolder(
            path, _sizes(work), attention, len(captured.sites), rotated, _weights(blocks, spec, written, fast), length,
            config["model"]["context_length"], _runtime(written, blocks), proof, (*notes, *_told(how, tokenizer)),
        )  # fmt: skip
        (work / MANIFEST).write_text(json.dumps(_facts(made, fast), indent=2) + "\n", encoding="utf-8")
    return made


def _stored(quantize: Any) -> tuple[Blocks | None, ShiftQuant | None]:
    """What the weights become: blocks, or layers of normfuse's kernels."""
    if isinstance(quantize, ShiftQuant):
        return None, quantize
    if quantize is None or isinstance(quantize, Blocks):
        return quantize, None
    if not isinstance(quantize, str):
        raise UsageError(
            f"quantize={quantize!r}: expected 'w4' or 'w8' (weights in blocks), a normfuse.ShiftQuant, or its words 'w4a8'"
        )
    found = parse_blocks(quantize)
    return (found, None) if found is not None else (None, parse_quantize(quantize))


def _weights(blocks: Blocks | None, spec: ShiftQuant | None, written: Written, fast: fx.GraphModule) -> str | None:
    """What the folder says of its weights."""
    if spec is None:
        return None if blocks is None else str(blocks)
    layers = report(fast).quantization
    count = sum(not layer.kept for layer in layers)
    return f"W{spec.weight_bits}A{spec.activation_bits} in {count} of {len(layers)} layers ({written.form})"


def _in_float32(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, or a copy in float32: the CPU's attention with a cache computes in nothing else."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode: call .eval() on it")
    if dtypes <= {torch.float32}:
        return model, ()
    import copy

    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    return copy.deepcopy(model).float(), (f"the model is in {names}; the folder computes in float32 and is held against that",)


def _proof(
    file: Path, model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]] | None, how: DecoderOptions, *, quantized: bool
) -> Proof | None:
    if not how.proof_tokens:
        return None
    rows = _prompts(model, tokenizer) if prompts is None else [list(p) for p in prompts]
    room = longest(model) - max(map(len, rows))
    if room < 1:
        raise UsageError(f"prompts of up to {max(map(len, rows))} tokens: the model has {longest(model)} positions")
    bindings = [b for b in BINDINGS if b != "left" or how.padding == "both"]
    log.info("comparing %d tokens after %d prompts", how.proof_tokens, len(rows))
    return prove(
        file, model, rows, tokens=min(how.proof_tokens, room), tolerance=how.tolerance, quantized=quantized,
        bindings=bindings, threads=how.threads,
    )  # fmt: skip


def _prompts(model: nn.Module, tokenizer: Any) -> list[list[int]]:
    vocabulary = text_config(model).vocab_size
    if tokenizer is not None:
        found = [list(tokenizer(text)["input_ids"]) for text in _SAMPLES]
        if all(row and max(row) < vocabulary for row in found):
            return found
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(min(3, vocabulary - 1), vocabulary, (n,), generator=generator).tolist() for n in (17, 30, 9)]


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


def _runtime(written: Written, blocks: Blocks | None) -> tuple[int, int]:
    # MatMulNBits has 8 bits with products in int8 since 1.22
    return max(written.runtime, (1, 22)) if blocks is not None and blocks.bits == 8 else written.runtime


def _told(how: DecoderOptions, tokenizer: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    if tokenizer is None:
        found += ("there is no tokenizer in it: readers take and give ids of tokens only",)
    if how.padding == "right":
        found += ("rows of a batch may be padded on the right only",)
    return found


def _sizes(work: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in sorted(work.iterdir())}


def _facts(made: DecoderFolder, fast: fx.GraphModule) -> dict[str, Any]:
    import normfuse

    found = report(fast)
    passes = {p.name: len(p.applied) for p in found.passes if p.applied}
    own = {k: v for k, v in made.manifest().items() if k != "path"}
    return {"normfuse": normfuse.__version__, **own, "passes": passes}
