"""Texts, one a line, as what a language model takes: by the model's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normfuse.app.data.inputs import tensors_of
from normfuse.errors import UsageError

__all__ = ["TEXT_SUFFIXES", "read_texts", "text_batches"]

TEXT_SUFFIXES = (".txt", ".jsonl")


def read_texts(path: Path) -> list[str]:
    """The texts of a file: a `.txt` has one a line, a `.jsonl` an object a line with the entry `text`.

    Raises:
        UsageError: it cannot be read, or holds no text.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as text: {e}") from e
    if path.suffix == ".jsonl":
        try:
            lines = [str(json.loads(line)["text"]) for line in lines]
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(f"{path}: expected an object a line with the entry 'text' ({type(e).__name__}: {e})") from e
    if not lines:
        raise UsageError(f"{path} holds no text")
    return lines


def text_batches(texts: Sequence[str], tokenizer: Any, example: Mapping[str, Any], source: str) -> Iterator[dict[str, Any]]:
    """Batches of the sizes of the example: texts are cut or padded to its length.

    A tokenizer that pads nothing (GPT-2's) gets one long text in pieces instead. What is left over is not used.

    Raises:
        UsageError: the model takes what no tokenizer gives.
    """
    tensors = tensors_of(example)
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise UsageError(f"texts are for a model that takes input_ids [batch, tokens], and {source} takes {', '.join(tensors)}")
    rows, length = (int(n) for n in ids.shape)
    if tokenizer.pad_token_id is None:
        encoded = _in_pieces(texts, tokenizer, length)
    else:
        encoded = dict(tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"))
    missing = [k for k in tensors if k not in encoded]
    if missing:
        raise UsageError(f"{source} takes {', '.join(missing)}, which its tokenizer does not give ({', '.join(encoded)})")
    count = len(encoded["input_ids"])
    if count < rows:
        raise UsageError(f"there are {count} texts of {length} tokens, and one batch of the example has {rows}; pass --batch 1")
    for i in range(0, count - rows + 1, rows):
        yield dict(example) | {k: encoded[k][i : i + rows].to(tensors[k].dtype) for k in tensors}


def _in_pieces(texts: Sequence[str], tokenizer: Any, length: int) -> dict[str, Any]:
    import torch

    flat = [token for text in texts for token in tokenizer(text)["input_ids"]]
    pieces = torch.tensor(flat[: len(flat) // length * length]).view(-1, length)
    return {"input_ids": pieces, "attention_mask": torch.ones_like(pieces), "token_type_ids": torch.zeros_like(pieces)}
