"""Does a decoder's file say what the model says? Greedy tokens of `generate`, in every way in which readers bind a cache.

The model writes tokens; the file is given the same tokens one by one and must ask for the next one each time. That is the same as
comparing what both write by themselves, and where they part it tells at which token and by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normfuse.errors import ExportError
from normfuse.export.decoder.session import Cache, Decoder, Ids, padded
from normfuse.extras import need

__all__ = ["BINDINGS", "CHUNKS", "Logits", "Proof", "different", "greedy", "hold", "prove"]

#: Ways of binding the cache: it grows with each token; one buffer is past and present; the prompt comes in pieces; rows of several
#: lengths are padded on either side.
BINDINGS = ("growing", "shared", "chunks", "left", "right")
CHUNKS = (8, 1, 5)  # tokens of the first pieces of a prompt
_PAD = 0  # a token that is never looked at
_SPARE = 7  # slots of a shared buffer that are never used

Logits = NDArray[Any]


@dataclass(frozen=True)
class Proof:
    """What the comparison found.

    Attributes:
        bindings: those that were run.
        prompts, tokens: prompts, and tokens after each.
        error: largest difference of logits, relative to the largest logit.
        ties: tokens at which the model itself is undecided within that error, so that the file may take another.
        sqnr: of the logits against the model's, in dB; None unless the file is quantized.
        agreed: of a quantized file, the share of tokens that are the model's.
    """

    bindings: tuple[str, ...]
    prompts: int
    tokens: int
    error: float
    ties: int = 0
    sqnr: float | None = None
    agreed: float | None = None

    def __str__(self) -> str:
        how = f"{self.tokens} greedy tokens after {self.prompts} prompts, {', '.join(self.bindings)}"
        if self.sqnr is not None:
            return f"{how}: logits {self.sqnr:.1f} dB, {self.agreed:.0%} of the tokens the model's"
        return f"{how}: the model's own (logits within {self.error:.1e}{f', {self.ties} ties' if self.ties else ''})"


@dataclass(frozen=True)
class _Written:
    """What was written after each prompt, and the logits in front of each token."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[Logits]


def prove(
    file: Path, model: nn.Module, prompts: Sequence[Sequence[int]], *, tokens: int = 64, tolerance: float = 1e-3,
    quantized: bool = False, bindings: Sequence[str] = BINDINGS, threads: int | None = None,
) -> Proof:  # fmt: skip
    """Hold the file against the model.

    Args:
        model: the original, whose `generate` says what is right.
        prompts: ids of tokens; rows of several lengths.
        tolerance: bound on the logits' error, relative to the largest; of a quantized file, on its bindings against each other.
        quantized: the file need not write the model's tokens; its bindings must agree with each other, and the SQNR is told.

    Raises:
        ExportError: a token is another one, or logits are too far away; the message says from where on.
    """
    wanted = _generated(model, prompts, tokens)
    decoder = Decoder(file, threads=threads)
    return hold(
        lambda binding: _run(decoder, binding, wanted), wanted.tokens, wanted.logits, bindings=bindings, called="prompt",
        tolerance=tolerance, quantized=quantized, where=lambda: _where(decoder, model, wanted),
    )  # fmt: skip


# -- the model -------------------------------------------------------------------------------------------------------------


def _generated(model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int) -> _Written:
    found = _Written([list(p) for p in prompts], [], [])
    with greedy(model, tokens), torch.no_grad():
        for prompt in found.prompts:
            ids = torch.tensor([prompt])
            out = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True
            )
            found.tokens.append(out.sequences[0, len(prompt) :].tolist())
            found.logits.append(torch.stack([step[0] for step in out.logits]).float().numpy())
    return found


@contextmanager
def greedy(model: Any, tokens: int, **more: Any) -> Iterator[None]:
    """The model writes its likeliest tokens, and does not stop early: what it was saved with says otherwise."""
    transformers = need("transformers", extra="hf")
    before = model.generation_config
    how = {"do_sample": False, "max_new_tokens": tokens, "use_cache": True, "pad_token_id": 0, **more}
    model.generation_config = transformers.GenerationConfig(**how)
    try:
        yield
    finally:
        model.generation_config = before


# -- the file --------------------------------------------------------------------------------------------------------------


def _run(decoder: Decoder, binding: str, wanted: _Written) -> Iterator[tuple[int, Logits]]:
    """Number of a prompt, and the logits [tokens, vocabulary] in front of each token after it."""
    if binding in ("left", "right"):
        yield from enumerate(_rows(decoder, binding, wanted.prompts, wanted.tokens))
        return
    way: Callable[..., Iterator[Logits]] = {"growing": _growing, "shared": _shared, "chunks": _chunks}[binding]
    for i, (prompt, tokens) in enumerate(zip(wanted.prompts, wanted.tokens, strict=True)):
        yield i, next(way(decoder, [prompt], [tokens]))


def _growing(decoder: Decoder, prompts: list[list[int]], tokens: list[list[int]]) -> Iterator[Logits]:
    ids, _ = padded(prompts, "left", _PAD)
    cache = decoder.start(len(prompts))
    yield from _followed(cache, cache.step(ids)[:, -1], np.array(tokens))


def _shared(decoder: Decoder, prompts: list[list[int]], tokens: list[list[int]]) -> Iterator[Logits]:
    ids, _ = padded(prompts, "left", _PAD)
    cache = decoder.start(len(prompts), room=ids.shape[1] + len(tokens[0]) + _SPARE)
    yield from _followed(cache, cache.step(ids)[:, -1], np.array(tokens))


def _chunks(decoder: Decoder, prompts: list[list[int]], tokens: list[list[int]]) -> Iterator[Logits]:
    ids, _ = padded(prompts, "left", _PAD)
    cache = decoder.start(len(prompts), room=ids.shape[1] + len(tokens[0]) + _SPARE)
    ends = [e for e in np.cumsum(CHUNKS).tolist() if e < ids.shape[1]]
    for start, end in zip([0, *ends], [*ends, ids.shape[1]], strict=True):
        logits = cache.step(ids[:, start:end])
    yield from _followed(cache, logits[:, -1], np.array(tokens))


def _rows(decoder: Decoder, side: str, prompts: list[list[int]], tokens: list[list[int]]) -> Iterator[Logits]:
    ids, mask = padded(prompts, side, _PAD)
    cache = decoder.start(len(prompts))
    logits = cache.step(ids, mask)
    ends = [len(p) - 1 if side == "right" and logits.shape[1] > 1 else -1 for p in prompts]
    yield from _followed(cache, logits[np.arange(len(prompts)), ends], np.array(tokens))


def _followed(cache: Cache, first: Logits, tokens: Ids) -> Iterator[Logits]:
    """Logits of each row: `first`, and those after each of `tokens` [rows, new] but the last."""
    found = [first] + [cache.step(tokens[:, i : i + 1])[:, -1] for i in range(tokens.shape[1] - 1)]
    yield from np.stack(found, 1)


# -- comparing ---------------------------------------------------------------------------------------------------------------


def hold(
    run: Callable[[str], Iterator[tuple[int, Logits]]], tokens: list[list[int]], logits: list[Logits], *, bindings: Sequence[str],
    called: str, tolerance: float, quantized: bool, where: Callable[[], str],
) -> Proof:  # fmt: skip
    """Hold what files give against what a model wrote; see `prove`.

    Args:
        run: by binding, `growing` among them: the number of a text, and the logits in front of each of its tokens.
        tokens: what the model wrote, by text; `logits` are those in front of them.
        called: what a text is written of.
        where: says more of a difference.
    """
    noise = share = None
    choices, held = tokens, logits
    if quantized:
        held = [found for _, found in run("growing")]
        noise, share = sqnr(held, logits), agreed(held, tokens)
        choices, tolerance = [found.argmax(-1).tolist() for found in held], max(tolerance, 10 ** (-noise / 20))
    error, ties = 0.0, 0
    for binding in bindings:
        for at, found in run(binding):
            here = f"binding {binding!r}, {called} {at + 1}"
            worst, undecided = compare(found, held[at], choices[at], tolerance, here, where)
            error, ties = max(error, worst), max(ties, undecided)
    return Proof(tuple(bindings), len(tokens), len(tokens[0]), error, ties, noise, share)


def compare(
    found: Logits, wanted: Logits, tokens: list[int], tolerance: float, here: str, where: Callable[[], str]
) -> tuple[float, int]:
    """Relative error, and the number of ties.

    Raises:
        ExportError: a token is another one, or logits are too far away; `where` is asked for more.
    """
    scale = float(np.abs(wanted).max()) or 1.0
    error = np.abs(found - wanted).max(-1) / scale
    choice = found.argmax(-1)
    rows = np.arange(len(tokens))
    gap = (wanted[rows, tokens] - wanted[rows, choice]) / scale  # by how much the model prefers its own
    wrong = (~(error <= tolerance)) | (gap > 2 * tolerance)
    if wrong.any():
        i = int(wrong.argmax())
        raise ExportError(
            f"the folder would be wrong: {here}, token {i + 1}: {int(choice[i])} in the place of {tokens[i]}, logits "
            f"{error[i]:.1e} apart (bound {tolerance:.0e}){where()}; nothing was written"
        )
    return float(error.max()), int((choice != np.array(tokens)).sum())


def _where(decoder: Decoder, model: Any, wanted: _Written) -> str:
    """The first layer whose keys or values are others when prompt and tokens are read at once."""
    transformers = need("transformers", extra="hf")
    ids = np.array([wanted.prompts[0] + wanted.tokens[0]])
    cache = decoder.start(1)
    cache.step(ids)
    with torch.no_grad():
        theirs: Any = transformers.DynamicCache()
        model(input_ids=torch.from_numpy(ids), past_key_values=theirs, use_cache=True)
    flat: list[Tensor] = [t for layer in theirs.layers for t in (layer.keys, layer.values)]
    at = different(cache.presents(), flat)
    if at is None:
        return "; read at once, keys and values of all layers are right"
    return f"; it starts at the {'values' if at % 2 else 'keys'} of layer {at // 2}"


def different(ours: Sequence[NDArray[Any]], theirs: Sequence[Tensor]) -> int | None:
    """The first of some keys and values that are others."""
    for i, (a, b) in enumerate(zip(map(torch.from_numpy, ours), theirs, strict=False)):
        if a.shape != b.shape or not torch.allclose(a, b.float(), rtol=1e-2, atol=1e-2 * float(b.abs().max())):
            return i
    return None


def sqnr(found: Sequence[Logits], wanted: Sequence[Logits]) -> float:
    """Of logits against the wanted ones, in dB."""
    signal = sum(float((w.astype(np.float64) ** 2).sum()) for w in wanted)
    noise = sum(float(((f - w).astype(np.float64) ** 2).sum()) for f, w in zip(found, wanted, strict=True))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def agreed(found: Sequence[Logits], tokens: Sequence[Sequence[int]]) -> float:
    """Share of the tokens that the logits choose."""
    return float(np.mean([(f.argmax(-1) == np.array(t)).mean() for f, t in zip(found, tokens, strict=True)]))
