"""Other readers of a folder than ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from normfuse.export.decoder.session import padded


def genai_tokens(
    folder: Path, rows: list[list[int]], new: int, *, more: list[int] | None = None, **search: object
) -> list[list[int]]:
    """What onnxruntime-genai writes; `more` are tokens that are added after half of the new ones (one row)."""
    og = pytest.importorskip("onnxruntime_genai")
    model, (ids, _) = og.Model(str(folder)), padded(rows, "right", 0)
    params = og.GeneratorParams(model)
    length = ids.shape[1] + new + len(more or [])
    params.set_search_options(do_sample=False, max_length=length, batch_size=len(rows), **search)
    generator = og.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    for step in range(new):
        if more and step == new // 2:
            generator.get_logits()  # puts the newest token into the cache, which append_tokens does not
            generator.append_tokens(np.array([more], np.int32))
        generator.generate_next_token()
    return [np.array(generator.get_sequence(i))[ids.shape[1] :].tolist() for i in range(len(rows))]


def genai_writes(folder: Path, features: np.ndarray, head: list[int], new: int, **search: object) -> list[list[int]]:
    """What onnxruntime-genai writes of speech [rows, bins, frames], behind the tokens `head`."""
    og = pytest.importorskip("onnxruntime_genai")
    model, rows = og.Model(str(folder)), len(features)
    params = og.GeneratorParams(model)
    length = len(head) + new
    params.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=rows, **search)
    generator = og.Generator(model, params)
    kept = np.ascontiguousarray(features)  # genai does not copy it
    generator.set_model_input("audio_features", kept)
    generator.append_tokens(np.array([head] * rows, np.int32))
    for _ in range(new):
        generator.generate_next_token()
    return [np.array(generator.get_sequence(i))[len(head) :].tolist() for i in range(rows)]
