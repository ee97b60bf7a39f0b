"""Tiny causal language models of transformers with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import nn

VOCABULARY = 320
_SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 256, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WINDOWS = {"sliding_window": 12}
_OWN: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 12, "head_dim": 16},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"], **_WINDOWS},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], **_WINDOWS},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 256},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "mistral": _WINDOWS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3": {"head_dim": 32},
    "starcoder2": _WINDOWS,
}
#: Types that are written as folders.
KINDS = (
    "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo",
    "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip


def tiny(kind: str, **changes: Any) -> nn.Module:
    """A model of the type `kind`, whose greedy tokens are never special ones."""
    torch.manual_seed(0)
    sizes = _SIZES | {"initializer_range": 0.15, "tie_word_embeddings": False} | _OWN.get(kind, {}) | changes
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias"):
                if type(module).__name__.endswith("Norm") and getattr(module, name, None) is not None:
                    getattr(module, name).add_(0.2 * torch.randn_like(getattr(module, name)))
        if head.weight is not model.get_input_embeddings().weight:
            head.weight[:3] = 0
    return model  # type: ignore[no-any-return]


def tokenizer() -> Any:
    """Bytes as tokens, behind three special ones."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(letters, 3)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def prompts(*lengths: int) -> list[list[int]]:
    """Random tokens, none of them special; as many rows as lengths."""
    return [np.random.default_rng(i).integers(3, VOCABULARY, n).tolist() for i, n in enumerate(lengths)]


def greedy(model: nn.Module, rows: list[list[int]], new: int) -> list[list[int]]:
    """What `generate` writes after each row by itself."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        how = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "use_cache": True}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)  # type: ignore[operator]
        found.append(out[0, len(row) :].tolist())
    return found
