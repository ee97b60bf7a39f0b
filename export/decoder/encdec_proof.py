"""Do the files of an encoder and a decoder say what the model says? See `normfuse.export.decoder.proof`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from normfuse.export.decoder.encdec import states_of
from normfuse.export.decoder.encdec_session import EncoderDecoder, Writing
from normfuse.export.decoder.proof import CHUNKS, Logits, Proof, different, greedy, hold
from normfuse.export.decoder.session import padded
from normfuse.extras import need

__all__ = ["SPEECH_BINDINGS", "TEXT_BINDINGS", "Source", "prove_pair"]

#: Each source by itself; tokens several at once; all sources as one batch, text padded on the right.
TEXT_BINDINGS = ("growing", "chunks", "right")
#: The same for speech, and one buffer as past and present.
SPEECH_BINDINGS = ("growing", "shared", "chunks", "batch")
_SPARE = 7  # slots of a shared buffer that are never used

Source = list[int] | NDArray[np.float32]
"""Ids of a text, or features of speech [bins, frames]."""


@dataclass(frozen=True)
class _Wanted:
    """What the model writes of each source after `head`, and the logits in front of each token."""

    sources: list[Source]
    head: list[int]
    tokens: list[list[int]]
    logits: list[Logits]


def prove_pair(
    files: tuple[Path, Path], model: nn.Module, sources: Sequence[Source], head: Sequence[int], *, tokens: int = 64,
    tolerance: float = 1e-3, quantized: bool = False, threads: int | None = None,
) -> Proof:  # fmt: skip
    """Hold an encoder's and a decoder's file against the model; see `prove`.

    Args:
        sources: what texts are written of.
        head: tokens that every text starts with.

    Raises:
        ExportError: a token is another one, or logits are too far away; the message says from where on.
    """
    wanted = _generated(model, sources, list(head), tokens)
    pair = EncoderDecoder(*files, threads=threads)
    return hold(
        lambda binding: _run(pair, binding, wanted), wanted.tokens, wanted.logits,
        bindings=SPEECH_BINDINGS if pair.speech else TEXT_BINDINGS, called="source",
        tolerance=tolerance, quantized=quantized, where=lambda: _where(pair, model, wanted),
    )  # fmt: skip


def _generated(model: Any, sources: Sequence[Source], head: list[int], tokens: int) -> _Wanted:
    # a model of speech has a `generate` of its own, which cuts long recordings; that of all models writes tokens
    generate = need("transformers", extra="hf").GenerationMixin.generate
    found = _Wanted(list(sources), head, [], [])
    with greedy(model, tokens, decoder_start_token_id=head[0]), torch.no_grad():
        for source in sources:
            out = generate(
                model,
                **_named(source),
                decoder_input_ids=torch.tensor([head]),
                past_key_values=_cache(),
                return_dict_in_generate=True,
                output_logits=True,
            )
            found.tokens.append(out.sequences[0, len(head) :].tolist())
            found.logits.append(torch.stack([step[0] for step in out.logits]).float().numpy())
    return found


def _cache() -> Any:
    """An empty one that grows by layers as well: that of `generate` has as many as the encoder of T5."""
    transformers = need("transformers", extra="hf")
    return transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())


def _named(source: Source) -> dict[str, Any]:
    """One source as the model takes it."""
    if isinstance(source, list):
        ids = torch.tensor([source])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"input_features": torch.from_numpy(source)[None]}


def _read(pair: EncoderDecoder, sources: Sequence[Source], room: int = 0) -> Writing:
    texts = [source for source in sources if isinstance(source, list)]
    if texts:
        return pair.read(*padded(texts, "right", 0))
    return pair.read(np.stack(sources), room=room)


def _run(pair: EncoderDecoder, binding: str, wanted: _Wanted) -> Iterator[tuple[int, Logits]]:
    """Number of a source, and the logits [tokens, vocabulary] in front of each token that is written of it."""
    if binding in ("right", "batch"):
        yield from enumerate(_followed(_read(pair, wanted.sources), wanted.head, wanted.tokens, ()))
        return
    room = len(wanted.head) + len(wanted.tokens[0]) + _SPARE if binding == "shared" else 0
    for i, (source, tokens) in enumerate(zip(wanted.sources, wanted.tokens, strict=True)):
        writing = _read(pair, [source], room)
        yield i, next(_followed(writing, wanted.head, [tokens], CHUNKS if binding == "chunks" else ()))


def _followed(writing: Writing, head: list[int], tokens: list[list[int]], chunks: Sequence[int]) -> Iterator[Logits]:
    """Logits of each row in front of each of `tokens`; the first of these go in by `chunks`, the others one by one."""
    rows = np.array([head + row[:-1] for row in tokens])
    ends = np.cumsum([len(head), *chunks]).tolist()
    ends = [e for e in ends if e < rows.shape[1]]
    ends += range(ends[-1] + 1 if ends else 1, rows.shape[1] + 1)
    found = [writing.step(rows[:, start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    yield from np.concatenate(found, 1)[:, len(head) - 1 :]


def _where(pair: EncoderDecoder, model: Any, wanted: _Wanted) -> str:
    """The first layer of the decoder whose keys or values are others when all tokens are read at once."""
    transformers = need("transformers", extra="hf")
    source, ids = wanted.sources[0], np.array([wanted.head + wanted.tokens[0]])
    writing = _read(pair, [source])
    writing.step(ids)
    with torch.no_grad():
        named = _named(source)
        hidden = states_of(model, *named.values())
        theirs = _cache()
        outputs = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)
        model(encoder_outputs=outputs, decoder_input_ids=torch.from_numpy(ids), past_key_values=theirs, use_cache=True)
    at = different(writing.presents(), [t for layer in theirs.self_attention_cache.layers for t in (layer.keys, layer.values)])
    if at is None:
        return "; read at once, keys and values of the decoder's tokens are right"
    return f"; it starts at the {'values' if at % 2 else 'keys'} of layer {at // 2} of the decoder"
