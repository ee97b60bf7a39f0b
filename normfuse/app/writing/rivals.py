"""What a folder of a decoder is measured against: a name for each, and how it becomes two engines, of prompts and of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from normfuse.app.decoders import to_decoder
from normfuse.app.hf_folder import local_folder
from normfuse.app.source_options import Options
from normfuse.app.sources import load_source
from normfuse.app.writing.writers import OPENED, OpenVino
from normfuse.benchmark import Engine
from normfuse.errors import UsageError, did_you_mean
from normfuse.export.decoder.folder import CONFIG, MODEL
from normfuse.extras import need
from normfuse.files import workspace

__all__ = ["RIVALS", "Lengths", "Named", "engines", "is_decoder", "named", "prepared"]

#: Kinds of rivals, and what stands behind the colon.
RIVALS = {
    "genai": "onnxruntime-genai on a folder, by default the one that is measured",
    "hf": "PyTorch on a Hugging Face folder",
    "int4": "ONNX Runtime's own int4 (MatMulNBits, blocks of 32) with GroupQueryAttention, made of a Hugging Face folder",
    "openvino": "OpenVINO GenAI on a GGUF file or a folder of its own",
}
_BLOCK, _LEVEL = 32, 4


@dataclass(frozen=True)
class Lengths:
    """A prompt of so many tokens, and so many that are written."""

    prompt: int = 128
    tokens: int = 128

    @property
    def room(self) -> int:
        return self.prompt + self.tokens


@dataclass(frozen=True)
class Named:
    """Somebody who writes.

    Attributes:
        name: as the user wrote it.
        kind: of `RIVALS`, or `onnxruntime` for a folder in plain ONNX Runtime.
        path: what is opened.
    """

    name: str
    kind: str
    path: Path


def is_decoder(source: str) -> bool:
    """A folder that `normfuse export --with-past` wrote, or another one that genai reads."""
    return (Path(source) / CONFIG).is_file()


def named(text: str, folder: Path) -> Named:
    """One entry of --against, beside the `folder` that is measured.

    Raises:
        UsageError: nothing is called that, or there is no such file.
    """
    kind, _, rest = text.partition(":")
    if kind == "genai":
        return Named(text, kind, _decoder(rest) if rest else folder)
    if kind in ("hf", "int4") and rest:
        return Named(text, kind, local_folder(rest))
    if kind == "openvino" and rest:
        if not Path(rest).exists():
            raise UsageError(f"{text}: there is no {rest}")
        return Named(text, kind, Path(rest))
    if is_decoder(text):
        return Named(text, "onnxruntime", Path(text))
    known = ", ".join(f"{name}:PATH ({what})" for name, what in RIVALS.items())
    raise UsageError(f"unknown rival {text!r}{did_you_mean(kind, RIVALS)}: expected another folder of a decoder, {known}")


def _decoder(path: str) -> Path:
    if not is_decoder(path):
        raise UsageError(f"genai:{path}: there is no {CONFIG} in it")
    return Path(path)


def prepared(rival: Named, folder: Path) -> Named:
    """What is to be made of a rival before it can be opened, in a `folder` for files."""
    if rival.kind != "int4":
        return rival
    made = folder / f"int4-{rival.path.name}"
    if not made.exists():
        _plain_int4(rival.path, made)
    return Named(rival.name, "onnxruntime", made)


def _plain_int4(source: Path, folder: Path) -> None:
    """A folder as others would make it: no pass of ours, the weights by ONNX Runtime's own quantizer."""
    model = load_source(f"hf:{source}", Options()).module
    to_decoder(model, folder, attention="gqa", last_logits=True, passes=(), verify="off", proof_tokens=0, padding="right")
    quantization = need("onnxruntime.quantization.matmul_nbits_quantizer", extra="onnx")
    onnx = need("onnx", extra="onnx")
    with workspace(folder) as work:
        quantizer = quantization.MatMulNBitsQuantizer(
            onnx.load(str(folder / MODEL)), block_size=_BLOCK, is_symmetric=True, accuracy_level=_LEVEL
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(work / MODEL), use_external_data_format=False)
        (work / MODEL).replace(folder / MODEL)


def engines(who: Named, lengths: Lengths) -> tuple[Engine, Engine]:
    """One whose call takes a prompt, and one whose call takes a step behind it."""
    if who.kind == "openvino":
        prompts, steps = (Engine(who.name, partial(_open_whole, who.path, lengths, part)) for part in (0, 1))
        return prompts, steps
    path = f"hf:{who.path}" if who.kind == "hf" else str(who.path.resolve())
    return (
        Engine(who.name, partial(_open_prompt, who.kind, path, lengths)),
        Engine(who.name, partial(_open_steps, who.kind, path, lengths)),
    )


def _prompt(lengths: Lengths) -> list[int]:
    """Tokens that every vocabulary has."""
    return [int(token) for token in np.random.default_rng(0).integers(3, 200, lengths.prompt)]


def _open_prompt(kind: str, path: str, lengths: Lengths, threads: int) -> Callable[[], Any]:
    return partial(OPENED[kind](path, lengths.room, threads).start, _prompt(lengths))


def _open_steps(kind: str, path: str, lengths: Lengths, threads: int) -> Callable[[], Any]:
    writer = OPENED[kind](path, lengths.room, threads)
    writer.start(_prompt(lengths))
    done = 0

    def step() -> None:
        nonlocal done
        if done + 1 == lengths.tokens:
            writer.back(lengths.prompt)
            done = 0
        writer.step()
        done += 1

    return step


class _Whole:
    """Runs a whole text and tells what one part of it took."""

    def __init__(self, writer: OpenVino, lengths: Lengths, part: int) -> None:
        self._writer, self._lengths, self._part = writer, lengths, part

    def __call__(self) -> None:
        self.seconds()

    def seconds(self) -> float:
        tokens = self._lengths.tokens if self._part else 1
        return self._writer.run(_prompt(self._lengths), tokens)[self._part]


def _open_whole(path: Path, lengths: Lengths, part: int, threads: int) -> Callable[[], Any]:
    return _Whole(OpenVino(str(path), lengths.room, threads), lengths, part)
