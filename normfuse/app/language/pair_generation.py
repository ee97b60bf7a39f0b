"""Text from the folder of an encoder and a decoder: a thin loop over ONNX Runtime, of a text or of a recording."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.app.generation import Rates, Sampling, check_runtime, end_tokens, json_in, pieces, tokenizer_of
from normfuse.errors import UsageError
from normfuse.export.decoder.encdec_session import EncoderDecoder, Writing, files_in
from normfuse.export.decoder.folder import MANIFEST
from normfuse.extras import need

__all__ = ["PairWriter", "samples_in"]

_RATE = 16000  # samples a second
_SECONDS = 30  # that a model of speech reads
_AS_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}  # by bytes of a sample

Features = NDArray[np.float32]


class PairWriter:
    """Writes texts of what an encoder reads.

    Args:
        folder: what `normfuse.export.to_decoder` wrote of a model with an encoder and a decoder.
        threads: of ONNX Runtime; default: the CPUs of this process.

    Raises:
        UsageError: it is no such folder, or the installed ONNX Runtime is too old for it.
        ExportError: ONNX Runtime does not take its files.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        self.folder = Path(folder)
        files = files_in(self.folder)
        if files is None:
            raise UsageError(f"{self.folder} is no folder of an encoder and a decoder: there are no two files of these in it")
        said = json_in(self.folder, "config.json")
        if (self.folder / "generation_config.json").is_file():
            said |= {k: v for k, v in json_in(self.folder, "generation_config.json").items() if v is not None}
        start: Any = said.get("decoder_start_token_id", said.get("bos_token_id"))
        try:
            self.longest, self.start = int(json_in(self.folder, MANIFEST)["positions"]), int(start)
            self.ends = end_tokens(said.get("eos_token_id"))
            self.never, self.never_first = _never(said)
        except (KeyError, TypeError, ValueError) as e:
            raise UsageError(f"the configuration in {self.folder} is broken: {type(e).__name__}: {e}") from e
        self.said = said
        check_runtime(self.folder)
        self.model = EncoderDecoder(*files, threads=threads)

    @property
    def speech(self) -> bool:
        """It reads recordings, and not text."""
        return self.model.speech

    def head(self, language: str) -> list[int]:
        """Tokens that a text starts with: of speech, in which language it is, and that it is written down without times.

        Raises:
            UsageError: the model does not know the language.
        """
        found = [self.start]
        languages, tasks = self.said.get("lang_to_id"), self.said.get("task_to_id")
        if self.speech and isinstance(languages, dict):
            token = languages.get(f"<|{language}|>")
            if token is None:
                known = ", ".join(sorted(name.strip("<|>") for name in languages))
                raise UsageError(f"--language {language}: the model knows {known}")
            found += [token, *([tasks["transcribe"]] if isinstance(tasks, dict) and "transcribe" in tasks else [])]
        silent = self.said.get("no_timestamps_token_id")
        return [*found, *([int(silent)] if self.speech and isinstance(silent, int) else [])]

    def tokens(
        self, source: list[int] | Features, new: int, sampling: Sampling | None = None, rates: Rates | None = None,
        *, language: str = "en",
    ) -> Iterator[int]:  # fmt: skip
        """Up to `new` tokens of `source`, each as soon as it is known; ends with a token that ends texts, which is not given.

        Args:
            source: ids of a text, or features of speech [bins, frames].

        Raises:
            UsageError: there is nothing to read, or it is of another kind.
        """
        how, told, head = sampling or Sampling(), rates if rates is not None else Rates(), self.head(language)
        generator = np.random.default_rng(how.seed)
        last = min(new, self.longest - len(head))
        start = perf_counter()
        writing = self._read(source, len(head) + last)
        logits = writing.step(np.array([head], np.int64))[0, -1]
        told.prompt, told.prompt_seconds = len(source) if isinstance(source, list) else len(head), perf_counter() - start
        for i in range(last):
            token = how.choose(self._allowed(logits, i), generator)
            if token in self.ends:
                return
            told.written += 1
            yield token
            if i + 1 < last:
                start = perf_counter()
                logits = writing.step(np.array([[token]], np.int64))[0, -1]
                told.steps.append(perf_counter() - start)

    def _read(self, source: list[int] | Features, room: int) -> Writing:
        if isinstance(source, list) is self.speech:
            raise UsageError(f"{self.folder} reads {'recordings: pass --audio' if self.speech else 'text: pass --prompt'}")
        if not isinstance(source, list):
            return self.model.read(source[None], room=room)
        if not source:
            raise UsageError("the prompt is empty: there is nothing to read")
        known = int(self.said.get("vocab_size") or self.model.vocabulary)
        if max(source) >= known or min(source) < 0:
            raise UsageError(f"the prompt has token {max(source)}, and the model knows {known}")
        return self.model.read(np.array([source], np.int64), np.ones((1, len(source)), np.int64))

    def _allowed(self, logits: NDArray[Any], at: int) -> NDArray[Any]:
        """The logits of what may be the token `at`: some are never written, and the first one may be given."""
        forced = self.said.get("forced_bos_token_id")
        if at == 0 and isinstance(forced, int) and 0 <= forced < len(logits):
            only = np.full_like(logits, -np.inf)
            only[forced] = 0
            return only
        allowed = logits.copy()
        never = [*self.never, *(self.never_first if at == 0 else ())]
        allowed[[token for token in never if 0 <= token < len(logits)]] = -np.inf
        return allowed

    def text(self, prompt: str, new: int, sampling: Sampling | None = None, rates: Rates | None = None) -> Iterator[str]:
        """The same of a text: pieces as soon as they are whole letters."""
        tokenizer = tokenizer_of(self.folder)
        yield from pieces(tokenizer, self.tokens(tokenizer.encode(prompt).ids, new, sampling, rates))

    def heard(
        self, audio: Path, new: int, sampling: Sampling | None = None, rates: Rates | None = None, *, language: str = "en"
    ) -> Iterator[str]:
        """The same of a recording; ids of tokens where the folder has no tokenizer."""
        if not self.speech:
            raise UsageError(f"{self.folder} reads text: pass --prompt")
        tokens = self.tokens(self._features(samples_in(audio)), new, sampling, rates, language=language)
        if (self.folder / "tokenizer.json").is_file():
            yield from pieces(tokenizer_of(self.folder), tokens)
        else:
            yield from (f"{token} " for token in tokens)

    def _features(self, samples: Features) -> Features:
        if not (self.folder / "preprocessor_config.json").is_file():
            raise UsageError(
                f"{self.folder} does not say how a recording becomes features: there is no preprocessor_config.json in it"
            )
        extractor = need("transformers", extra="hf").WhisperFeatureExtractor.from_pretrained(self.folder, local_files_only=True)
        found = extractor(samples, sampling_rate=_RATE, return_tensors="np")["input_features"][0]
        return np.asarray(found, np.float32)


def samples_in(file: Path) -> Features:
    """Samples of a recording of 16 kHz, between -1 and 1: a .wav file, whose channels are averaged, or a .npy file of samples.

    Raises:
        UsageError: it cannot be read, has another rate, or is too long.
    """
    try:
        found = np.load(file, allow_pickle=False) if file.suffix == ".npy" else _wave(file)
    except (OSError, EOFError, ValueError, wave.Error) as e:
        raise UsageError(f"{file} is no recording that can be read (.wav with integers, .npy): {e}") from e
    if found.ndim != 1 or not found.size:
        raise UsageError(f"{file} holds an array of the shape {found.shape}: expected samples, one axis")
    if len(found) > _SECONDS * _RATE:
        raise UsageError(f"{file} is {len(found) / _RATE:.0f} seconds long, and the model reads {_SECONDS}: cut it")
    return np.asarray(found, np.float32)


def _wave(file: Path) -> NDArray[Any]:
    with wave.open(str(file), "rb") as held:
        if held.getframerate() != _RATE:
            raise UsageError(f"{file} has {held.getframerate()} samples a second: expected {_RATE}")
        kind = _AS_INTEGERS.get(held.getsampwidth())
        if kind is None:
            raise UsageError(f"{file} has samples of {8 * held.getsampwidth()} bits: expected 8, 16 or 32")
        values = np.frombuffer(held.readframes(held.getnframes()), kind).reshape(-1, held.getnchannels())
    scale = float(2 ** (8 * values.itemsize - 1))
    found: NDArray[Any] = (values.mean(1) - (scale if kind is np.uint8 else 0)) / scale
    return found


def _never(said: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens that are never written, and those that are never written first."""
    alone = [words[0] for words in said.get("bad_words_ids") or [] if len(words) == 1]
    never = [int(t) for t in (*(said.get("suppress_tokens") or []), *alone)]
    return never, [int(t) for t in said.get("begin_suppress_tokens") or []]
