"""The tokenizer in a local Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normfuse.app.hf_folder import offline
from normfuse.errors import CaptureError, UsageError
from normfuse.extras import need

__all__ = ["tokenizer_in"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def tokenizer_in(folder: Path, *, trust: bool = False, without: str = "") -> Any:
    """The tokenizer, as transformers loads it.

    Args:
        folder: with its files.
        trust: code of the folder may run.
        without: how to go on without it, for the message.

    Raises:
        UsageError: there is none.
        CaptureError: it cannot be loaded.
    """
    if not any((folder / name).is_file() for name in _FILES):
        raise UsageError(f"hf:{folder} has no tokenizer: put its tokenizer.json there{f', or pass {without}' if without else ''}")
    transformers = need("transformers", extra="hf")
    try:
        with offline():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except Exception as e:  # of many kinds, from several libraries
        said = " ".join(str(e).split())[:300]
        hint = f"; {without} leaves it out" if without else ""
        raise CaptureError(f"the tokenizer of hf:{folder} could not be loaded: {said}{hint}") from e
