"""A decoder's file in ONNX Runtime, with its cache bound to inputs and outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import ExportError
from normfuse.export.onnx.runtime import session
from normfuse.extras import need

__all__ = ["Decoder", "Ids", "padded"]

Ids = NDArray[np.int64]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class Decoder:
    """Runs `model.onnx` of a folder step by step.

    Args:
        file: the ONNX file.
        threads: of ONNX Runtime; default: the CPUs of this process.

    Raises:
        ExportError: the runtime does not take the file.
        UsageError: it takes weights from elsewhere.
    """

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        self.session = session(os.fspath(file), threads=threads)
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.pairs = [(n, n.replace("past_key_values", "present")) for n in inputs if n.startswith("past_key_values.")]
        if not self.pairs or "attention_mask" not in inputs or "input_ids" not in inputs:
            raise ExportError(f"{file} is no decoder with a cache: expected input_ids, attention_mask and past_key_values.0.key")
        self.asks_positions = "position_ids" in inputs
        outputs = {o.name: o.shape for o in self.session.get_outputs()}
        try:
            self.sizes = {name: (int(inputs[name].shape[1]), int(inputs[name].shape[3])) for name, _ in self.pairs}
            self.dtype = _TYPES[inputs[self.pairs[0][0]].type]
            self.vocabulary = int(outputs["logits"][-1])
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise ExportError(f"{file} is no decoder whose cache can be bound: {type(e).__name__}: {e}") from e

    def start(self, rows: int, *, room: int = 0) -> Cache:
        """An empty cache: with `room` slots in one buffer for past and present, or growing with each step where that is 0."""
        return Cache(self, rows, room)


@dataclass
class Cache:
    """Keys and values of some rows, and the mask of their slots."""

    decoder: Decoder
    rows: int
    room: int
    mask: Ids = field(init=False)

    def __post_init__(self) -> None:
        ort = need("onnxruntime", extra="onnx")
        self.mask = np.zeros((self.rows, 0), np.int64)
        self._binding = self.decoder.session.io_binding()
        for past, present in self.decoder.pairs:
            heads, width = self.decoder.sizes[past]
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros((self.rows, heads, self.room, width), self.decoder.dtype))
            self._binding.bind_ortvalue_input(past, value)
            if self.room:
                self._binding.bind_ortvalue_output(present, value)
            # values that are bound live as long as the binding does

    def step(self, ids: Ids, mask: Ids | None = None) -> NDArray[Any]:
        """Logits [rows, new, vocabulary] ([rows, 1, vocabulary] where the file gives those of the newest token alone).

        Args:
            ids: [rows, new], the new tokens.
            mask: [rows, new], 0 for padding among them; None where there is none.

        Raises:
            ExportError: the runtime fails, for example because the buffer is full.
        """
        new = np.ones_like(ids) if mask is None else mask
        self.mask = np.concatenate([self.mask, new], 1)
        if self.room and self.mask.shape[1] > self.room:
            raise ExportError(f"{self.mask.shape[1]} tokens do not fit into a cache of {self.room}")
        feeds = {"input_ids": ids, "attention_mask": self.mask}
        if self.decoder.asks_positions:
            feeds["position_ids"] = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        self._held = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        for name, value in self._held.items():
            self._binding.bind_cpu_input(name, value)
        if not self.room:
            for _, present in self.decoder.pairs:
                self._binding.bind_output(present)
        self._binding.bind_output("logits")
        try:
            self.decoder.session.run_with_iobinding(self._binding)
        except Exception as e:  # onnxruntime has an exception class for every status code, all private
            raise ExportError(f"ONNX Runtime fails on {ids.shape[1]} new tokens: {' '.join(str(e).split())[-300:]}") from e
        *presents, logits = self._binding.get_outputs()  # in the order in which they were bound
        if not self.room:
            for (past, _), value in zip(self.decoder.pairs, presents, strict=True):
                self._binding.bind_ortvalue_input(past, value)
        out: NDArray[Any] = logits.numpy()
        return out

    def presents(self) -> list[NDArray[Any]]:
        """Keys and values after the last step, in the order of the file's outputs."""
        return [value.numpy() for value in self._binding.get_outputs()[: len(self.decoder.pairs)]]


def padded(rows: Sequence[Sequence[int]], side: str, pad: int) -> tuple[Ids, Ids]:
    """Rows of one length, padded on the `left` or on the `right`, and their mask."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask
