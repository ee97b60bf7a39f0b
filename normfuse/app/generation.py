"""Text from the folder of a decoder: a thin loop over ONNX Runtime, with one buffer for the past and the present."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import UsageError
from normfuse.export.decoder.folder import CONFIG, MANIFEST, MODEL
from normfuse.export.decoder.session import Decoder
from normfuse.export.runtimes import parse_runtime
from normfuse.extras import need
from normfuse.telemetry import no_telemetry

__all__ = ["Rates", "Sampling", "Writer", "check_runtime", "end_tokens", "json_in", "pieces", "tokenizer_of"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: only of the likeliest tokens that together have this probability.
        top_k: only of so many; 0 for all.
        seed: of the draw.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise UsageError(f"temperature={self.temperature}: expected a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: expected a number above 0 and up to 1")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k}: expected 0 or more")

    def choose(self, logits: NDArray[Any], generator: np.random.Generator) -> int:
        """One token for `logits` [vocabulary]."""
        if not self.temperature:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        order = order[: self.top_k] if self.top_k else order
        scaled = logits[order].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled[0])
        weights /= weights.sum()
        kept = int(np.searchsorted(weights.cumsum(), self.top_p * (1 - 1e-12))) + 1
        weights = weights[:kept] / weights[:kept].sum()
        return int(order[generator.choice(len(weights), p=weights)])


@dataclass
class Rates:
    """What a run took: tokens and seconds of the prompt, and of what was written after its first token."""

    prompt: int = 0
    prompt_seconds: float = 0.0
    written: int = 0
    steps: list[float] = field(default_factory=list)

    @property
    def prefill(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode(self) -> float:
        """Steps a second, each of which reads one token and gives the next one."""
        return len(self.steps) / sum(self.steps) if self.steps else 0.0

    def __str__(self) -> str:
        decode = f", {self.decode:.1f} tokens/s" if self.steps else ""
        return f"prompt {self.prompt} tokens, {self.prefill:.1f} tokens/s; written {self.written} tokens{decode}"


def end_tokens(said: Any) -> frozenset[int]:
    """Tokens that end a text: a configuration names one, several or none."""
    return frozenset(int(t) for t in (said if isinstance(said, list) else [] if said is None else [said]))


class Writer:
    """Writes on from prompts.

    Args:
        folder: what `normfuse.export.to_decoder` wrote.
        threads: of ONNX Runtime; default: the CPUs of this process.

    Raises:
        UsageError: it is no such folder, or the installed ONNX Runtime is too old for it.
        ExportError: ONNX Runtime does not take its file.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        self.folder = Path(folder)
        config = json_in(self.folder, CONFIG)
        try:
            model = config["model"]
            self.longest, self.ends = int(model["context_length"]), end_tokens(model["eos_token_id"])
            file = self.folder / Path(str(model["decoder"].get("filename", MODEL))).name  # nothing outside the folder
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"{self.folder / CONFIG} is broken: {type(e).__name__}: {e}") from e
        if not file.is_file():
            raise UsageError(f"{self.folder} is no folder of a decoder: there is no {file.name} in it")
        check_runtime(self.folder)
        self.decoder = Decoder(file, threads=threads)

    def tokens(self, prompt: list[int], new: int, sampling: Sampling | None = None, rates: Rates | None = None) -> Iterator[int]:
        """Up to `new` tokens after `prompt`, each as soon as it is known; ends with a token that ends texts, which is not given.

        Raises:
            UsageError: the prompt is empty or too long.
        """
        if not prompt:
            raise UsageError("the prompt is empty: there is nothing to write on from")
        if len(prompt) >= self.longest:
            raise UsageError(f"the prompt has {len(prompt)} tokens, and the model knows {self.longest} positions")
        if max(prompt) >= self.decoder.vocabulary or min(prompt) < 0:
            raise UsageError(f"the prompt has token {max(prompt)}, and the model knows {self.decoder.vocabulary}")
        how, told = sampling or Sampling(), rates if rates is not None else Rates()
        generator = np.random.default_rng(how.seed)
        last = min(new, self.longest - len(prompt))
        cache = self.decoder.start(1, room=len(prompt) + last)
        start = perf_counter()
        logits = cache.step(np.array([prompt], np.int64))[0, -1]
        told.prompt, told.prompt_seconds = len(prompt), perf_counter() - start
        for i in range(last):
            token = how.choose(logits, generator)
            if token in self.ends:
                return
            told.written += 1
            yield token
            if i + 1 < last:
                start = perf_counter()
                logits = cache.step(np.array([[token]], np.int64))[0, -1]
                told.steps.append(perf_counter() - start)

    def text(self, prompt: str, new: int, sampling: Sampling | None = None, rates: Rates | None = None) -> Iterator[str]:
        """The same with text: pieces as soon as they are whole letters."""
        tokenizer = tokenizer_of(self.folder)
        yield from pieces(tokenizer, self.tokens(tokenizer.encode(prompt).ids, new, sampling, rates))


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, of the library `tokenizers`.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"{folder} has no tokenizer.json: give the prompt as ids of tokens, with --ids")
    try:
        return need("tokenizers", extra="hf").Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain exceptions
        raise UsageError(f"{file} cannot be read: {e}") from e


def pieces(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """What each token adds to the text; a letter of several tokens comes with the last of them."""
    held: list[int] = []
    told = 0  # tokens of `held` whose text has been given; they stay for what the next ones look like behind them
    for token in tokens:
        held.append(token)
        before, now = tokenizer.decode(held[:told]), tokenizer.decode(held)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            held, told = held[told:], len(held) - told
    before, now = tokenizer.decode(held[:told]), tokenizer.decode(held)
    if len(now) > len(before):
        yield now[len(before) :]


def json_in(folder: Path, name: str) -> dict[str, Any]:
    """The object in a file of the folder.

    Raises:
        UsageError: there is none.
    """
    if not (folder / name).is_file():
        raise UsageError(
            f"{folder} is no folder of a decoder: there is no {name} in it; normfuse export hf:DIR --with-past makes one"
        )
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"{folder / name} cannot be read: {e}") from e
    if not isinstance(found, dict):
        raise UsageError(f"{folder / name} cannot be read: it holds no object")
    return found


def check_runtime(folder: Path) -> None:
    """Complain when the installed ONNX Runtime is too old for the folder.

    Raises:
        UsageError: see above.
    """
    no_telemetry()
    ort = need("onnxruntime", extra="onnx")
    if not (folder / MANIFEST).is_file():
        return
    oldest = str(json_in(folder, MANIFEST).get("runtime", ""))
    if oldest and parse_runtime(ort.__version__) < parse_runtime(oldest):
        raise UsageError(f"{folder} needs ONNX Runtime {oldest}, and {ort.__version__} is installed")
