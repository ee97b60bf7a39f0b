"""Runtimes that write text, behind one interface: take a prompt, take one step, forget what came later.

Each takes the likeliest token, as its own loop does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from normfuse.app.generation import Writer as OrtWriter
from normfuse.app.source_options import Options
from normfuse.app.sources import load_source
from normfuse.errors import NormfuseError
from normfuse.extras import need
from normfuse.telemetry import no_telemetry

__all__ = ["OPENED", "OpenVino", "Writer"]


class Writer(Protocol):
    """A model with a cache of one text."""

    def start(self, prompt: list[int]) -> None:
        """Take a prompt into an empty cache, and choose a token."""

    def step(self) -> None:
        """Take the token that was chosen, and choose the next one."""

    def back(self, length: int) -> None:
        """Forget all but the first `length` tokens; the next step takes the token that was chosen last."""


class _OnnxRuntime:
    """A folder of a decoder in plain ONNX Runtime, with one buffer for past and present."""

    def __init__(self, folder: str, room: int, threads: int) -> None:
        self._cache = OrtWriter(folder, threads=threads).decoder.start(1, room=room)

    def start(self, prompt: list[int]) -> None:
        self.back(0)
        self._take(prompt)

    def step(self) -> None:
        self._take([self._token])

    def back(self, length: int) -> None:
        self._cache.mask = self._cache.mask[:, :length]

    def _take(self, tokens: list[int]) -> None:
        self._token = int(self._cache.step(np.array([tokens], np.int64))[0, -1].argmax())


class _Genai:
    """A folder of a decoder in onnxruntime-genai."""

    def __init__(self, folder: str, room: int, threads: int) -> None:
        no_telemetry()
        og = need("onnxruntime_genai", extra="against")
        try:
            config = og.Config(folder)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
            params = og.GeneratorParams(model := og.Model(config))
            params.set_search_options(do_sample=False, max_length=room + 1, min_length=room + 1)
            self._generator = og.Generator(model, params)
        except Exception as e:  # genai raises plain exceptions
            raise NormfuseError(f"onnxruntime-genai cannot open {folder}: {' '.join(str(e).split())[:300]}") from e
        self._prompt: list[int] = []

    def start(self, prompt: list[int]) -> None:
        self._prompt = prompt
        if self._generator.token_count():
            self._generator.rewind_to(0)
        self._generator.append_tokens(np.array([prompt], np.int32))
        self._generator.generate_next_token()  # chooses; the next one runs the model first

    def step(self) -> None:
        self._generator.generate_next_token()

    def back(self, length: int) -> None:
        self._generator.rewind_to(length - 1)
        self._generator.append_tokens(np.array([self._prompt[length - 1 : length]], np.int32))
        self._generator.generate_next_token()


class _Torch:
    """A Hugging Face folder in PyTorch, called as `generate` calls it, without what it does between two calls."""

    def __init__(self, source: str, room: int, threads: int) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(threads)
        self._model = load_source(source, Options()).module
        self._cache: Any = None

    def start(self, prompt: list[int]) -> None:
        self._cache = need("transformers", extra="hf").DynamicCache(config=self._model.config)
        self._take(prompt)

    def step(self) -> None:
        self._take([self._token])

    def back(self, length: int) -> None:
        self._cache.crop(length - self._cache.get_seq_length())  # negative: so many are removed

    def _take(self, tokens: list[int]) -> None:
        with self._torch.inference_mode():
            ids = self._torch.tensor([tokens])
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token = int(out.logits[0, -1].argmax())


class OpenVino:
    """A GGUF file, or a folder of OpenVINO, in OpenVINO GenAI, which has no steps: it says itself how long they took."""

    def __init__(self, path: str, room: int, threads: int) -> None:
        genai = need("openvino_genai", extra="against")
        try:
            self._pipeline = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
        except Exception as e:  # OpenVINO raises plain exceptions
            raise NormfuseError(f"OpenVINO GenAI cannot open {path}: {' '.join(str(e).split())[:300]}") from e
        self._inputs: Callable[..., Any] = genai.TokenizedInputs
        self._tensor: Callable[..., Any] = need("openvino", extra="against").Tensor

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds of the prompt, and of one step after it."""
        ids = np.array([prompt], np.int64)
        given = self._inputs(self._tensor(ids), self._tensor(np.ones_like(ids)))
        found = self._pipeline.generate(given, max_new_tokens=tokens + 1, ignore_eos=True, do_sample=False)
        times: Any = found.perf_metrics
        return times.get_ttft().mean / 1e3, times.get_tpot().mean / 1e3


#: By kind: how a path is opened, for so many tokens, on so many threads.
OPENED: dict[str, Callable[[str, int, int], Writer]] = {"onnxruntime": _OnnxRuntime, "genai": _Genai, "hf": _Torch}
