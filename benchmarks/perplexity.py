"""Perplexity of folders that `normfuse export --with-past` wrote, on the first tokens of a text.

    python -m benchmarks.perplexity LICENSE smollm2-onnx smollm2-w4

A token at a time, as text is written: exp of the mean of −log p(token | the tokens before it).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click
import numpy as np

from normfuse.extras import need
from normfuse.telemetry import no_telemetry

__all__ = ["perplexity"]


def perplexity(folder: Path, text: str, tokens: int) -> float:
    """Of the first `tokens` tokens of `text`, the first of which is given."""
    no_telemetry()
    session = need("onnxruntime", extra="onnx").InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = need("tokenizers", extra="hf").Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:tokens]
    names = [output.name for output in session.get_outputs()]
    caches = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    past: dict[str, Any] = {name: np.zeros((1, heads, 0, width), np.float32) for name, (_, heads, _, width) in caches.items()}
    surprise = []
    for done, (token, following) in enumerate(itertools.pairwise(ids), 1):
        feeds = {"input_ids": np.array([[token]]), "attention_mask": np.ones((1, done), np.int64), **past}
        found = dict(zip(names, session.run(names, feeds), strict=True))
        logits = found["logits"][0, -1].astype(np.float64)
        surprise.append(float(np.logaddexp.reduce(logits) - logits[following]))
        past = {name: found[name.replace("past_key_values.", "present.")] for name in caches}
    return float(np.exp(np.mean(surprise)))


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(min=2), default=300, show_default=True, help="Of the text.")
def main(text: Path, folders: tuple[Path, ...], tokens: int) -> None:
    """Print the perplexity of each of FOLDERS on the beginning of TEXT."""
    for folder in folders:
        print(f"{folder}: {perplexity(folder, text.read_text(encoding='utf-8'), tokens):.2f}")


if __name__ == "__main__":
    main()
