"""Tiny models with an encoder and a decoder, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from normfuse.export.decoder.proof import greedy
from tests.export.decoder.models import VOCABULARY

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
_BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128, "init_std": 0.15,
    "forced_eos_token_id": None, "forced_bos_token_id": None,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "t5": _T5, "mt5": _T5, "umt5": _T5,
    "bart": _BART, "mbart": _BART, "marian": _BART, "pegasus": _BART, "blenderbot": _BART,
    "blenderbot-small": _BART,
    "whisper": {**_BART, "max_target_positions": 64, "max_source_positions": 20, "num_mel_bins": 80},
}  # fmt: skip
#: Types from text to text that are written as folders, and the one from speech to text.
TEXT_KINDS = tuple(kind for kind in _OWN if kind != "whisper")
SPEECH_KIND = "whisper"


def tiny_pair(kind: str, **changes: Any) -> nn.Module:
    """A model of the type `kind`, whose greedy tokens are never special ones."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_TOKENS, **_OWN.get(kind, {}), **changes})
    auto = transformers.AutoModelForSpeechSeq2Seq if kind in ("whisper", "speech_to_text") else transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias"):
                if type(module).__name__.endswith("Norm") and getattr(module, name, None) is not None:
                    getattr(module, name).add_(0.2 * torch.randn_like(getattr(module, name)))
    return model  # type: ignore[no-any-return]


def written(model: Any, new: int, head: list[int], **source: torch.Tensor) -> list[list[int]]:
    """What `generate` writes, which is no special token, of each row of the source."""
    rows = next(iter(source.values())).shape[0]
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with greedy(model, new, decoder_start_token_id=head[0]), torch.no_grad():
        ids = torch.tensor([head] * rows)
        out = transformers.GenerationMixin.generate(model, **source, decoder_input_ids=ids, past_key_values=cache)
    found: list[list[int]] = out[:, len(head) :].tolist()
    return found
