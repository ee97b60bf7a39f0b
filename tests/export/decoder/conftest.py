"""Folders that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.decoder.models import tiny, tokenizer


@pytest.fixture(scope="session")
def hf_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    tiny("llama").save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    return folder
