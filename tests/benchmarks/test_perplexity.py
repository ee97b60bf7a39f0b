"""Perplexity of a folder against that of the model it was made of."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

import normfuse
from benchmarks.perplexity import perplexity
from tests.export.decoder.models import tiny, tokenizer


def test_it_is_that_of_the_model(tmp_path: Path) -> None:
    model, words = tiny("llama"), tokenizer()
    text = "one two three four five six seven eight"
    ids = torch.tensor([words(text)["input_ids"][:12]])
    with torch.no_grad():
        wanted = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).exp()
    normfuse.export.to_decoder(model, tmp_path / "folder", tokenizer=words, proof_tokens=0)
    torch.testing.assert_close(
        torch.tensor(perplexity(tmp_path / "folder", text, 12)), wanted, rtol=1e-4, atol=0, check_dtype=False
    )
