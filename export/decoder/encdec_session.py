"""The two files of an encoder and a decoder in ONNX Runtime, with the decoder's cache bound to inputs and outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import ExportError
from normfuse.export.decoder.session import Ids
from normfuse.export.onnx.runtime import session
from normfuse.extras import need

__all__ = ["SPEECH_FILES", "TEXT_FILES", "EncoderDecoder", "Writing", "files_in"]

#: Encoder and decoder of a model from text to text, as optimum names them, and of one from speech to text.
TEXT_FILES = ("encoder_model.onnx", "decoder_model_merged.onnx")
SPEECH_FILES = ("encoder.onnx", "decoder.onnx")
_TEXT_PAST, _SPEECH_PAST = "past_key_values.", "past_"


def files_in(folder: Path) -> tuple[Path, Path] | None:
    """The two files in a folder; None where there are none."""
    for names in (TEXT_FILES, SPEECH_FILES):
        encoder, decoder = (folder / name for name in names)
        if encoder.is_file() and decoder.is_file():
            return encoder, decoder
    return None


class EncoderDecoder:
    """Runs an encoder once and its decoder step by step.

    Args:
        encoder, decoder: the ONNX files.
        threads: of ONNX Runtime; default: the CPUs of this process.

    Raises:
        ExportError: the runtime does not take a file, or a file is of another kind.
        UsageError: a file takes weights from elsewhere.
    """

    def __init__(self, encoder: Path, decoder: Path, *, threads: int | None = None) -> None:
        self.encoder, self.decoder = (session(os.fspath(file), threads=threads) for file in (encoder, decoder))
        inputs = {i.name: i for i in self.decoder.get_inputs()}
        self.speech = "past_sequence_length" in inputs
        prefix = _SPEECH_PAST if self.speech else _TEXT_PAST
        pasts = [n for n, i in inputs.items() if n.startswith(prefix) and len(i.shape) == 4]
        cross = "_cross_" if self.speech else ".encoder."
        self.own, self.cross = [n for n in pasts if cross not in n], [n for n in pasts if cross in n]
        if not self.own or not self.cross or "input_ids" not in inputs:
            raise ExportError(f"{decoder} is no decoder behind an encoder: expected input_ids and caches of own and other states")
        try:
            self.sizes = {name: (int(inputs[name].shape[1]), int(inputs[name].shape[3])) for name in pasts}
            self.vocabulary = int({o.name: o.shape for o in self.decoder.get_outputs()}["logits"][-1])
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise ExportError(f"{decoder} is no decoder whose cache can be bound: {type(e).__name__}: {e}") from e

    def present(self, past: str) -> str:
        """The output that belongs to an input of a cache."""
        return past.replace(
            "past_key_values" if past.startswith(_TEXT_PAST) else "past_", "present" if not self.speech else "present_", 1
        )

    def read(self, source: NDArray[Any], mask: Ids | None = None, *, room: int = 0) -> Writing:
        """Ids [rows, source] with their mask, or features of speech [rows, bins, frames], as what a text is written of.

        Args:
            room: slots of one buffer for past and present (of a decoder of speech); 0 for caches that grow.

        Raises:
            ExportError: the runtime fails.
        """
        names = [i.name for i in self.encoder.get_inputs()]
        given = (source,) if mask is None else (source, mask)
        ort = need("onnxruntime", extra="onnx")
        outputs = [o.name for o in self.encoder.get_outputs()]
        try:
            feeds = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in zip(names, given, strict=True)}
            found = dict(zip(outputs, self.encoder.run_with_ort_values(outputs, feeds), strict=True))
        except Exception as e:  # onnxruntime has an exception class for every status code, all private
            raise ExportError(f"ONNX Runtime fails on the encoder: {' '.join(str(e).split())[-300:]}") from e
        return Writing(self, found, feeds.get("attention_mask"), len(source), room)


@dataclass
class Writing:
    """A text that is being written of what an encoder read."""

    model: EncoderDecoder
    states: dict[str, Any]
    mask: Any
    rows: int
    room: int
    filled: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        model = self.model
        self._binding = model.decoder.io_binding()
        for name in model.own:
            value = self._zeros(name, self.room)
            self._binding.bind_ortvalue_input(name, value)
            if self.room:
                self._binding.bind_ortvalue_output(model.present(name), value)
        for name in model.cross:
            value = self.states[name.replace("past_", "present_")] if model.speech else self._zeros(name, 0)
            self._binding.bind_ortvalue_input(name, value)
        if not model.speech:
            self._binding.bind_ortvalue_input("encoder_hidden_states", self.states["last_hidden_state"])
            self._binding.bind_ortvalue_input("encoder_attention_mask", self.mask)

    def _zeros(self, name: str, slots: int) -> Any:
        heads, width = self.model.sizes[name]
        zeros = np.zeros((self.rows, heads, slots, width), np.float32)
        return need("onnxruntime", extra="onnx").OrtValue.ortvalue_from_numpy(zeros)

    def step(self, ids: Ids) -> NDArray[Any]:
        """Logits [rows, new, vocabulary] after the new tokens [rows, new].

        Raises:
            ExportError: the runtime fails.
        """
        model, binding = self.model, self._binding
        told = np.array([self.filled], np.int32) if model.speech else np.array([self.filled > 0])
        self._held = {"input_ids": np.ascontiguousarray(ids), "past_sequence_length" if model.speech else "use_cache_branch": told}
        for name, value in self._held.items():
            binding.bind_cpu_input(name, value)
        kept = [] if self.room else model.own
        made = [] if model.speech else model.cross
        for name in (*kept, *made):
            binding.bind_output(model.present(name))
        binding.bind_output("logits")
        try:
            model.decoder.run_with_iobinding(binding)
        except Exception as e:  # see above
            raise ExportError(f"ONNX Runtime fails on {ids.shape[1]} new tokens: {' '.join(str(e).split())[-300:]}") from e
        outputs = dict(zip(self._order(kept, made), binding.get_outputs(), strict=True))
        for name in kept:
            binding.bind_ortvalue_input(name, outputs[model.present(name)])
        for name in made if not self.filled else ():
            binding.bind_ortvalue_input(name, outputs[model.present(name)])
        self.filled += ids.shape[1]
        logits: NDArray[Any] = outputs["logits"].numpy()
        return logits

    def _order(self, kept: list[str], made: list[str]) -> list[str]:
        """Names of the outputs in the order in which they were bound."""
        shared = self.model.own if self.room else []
        return [*(self.model.present(name) for name in (*shared, *kept, *made)), "logits"]

    def presents(self) -> list[NDArray[Any]]:
        """Own keys and values after the last step, in the order of the file's outputs."""
        return [value.numpy() for value in self._binding.get_outputs()[: len(self.model.own)]]
