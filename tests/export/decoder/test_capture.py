"""Causal language models with flat caches: what is captured, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from normfuse.errors import CaptureError, UsageError
from normfuse.export.decoder.capture import cached
from normfuse.export.decoder.causality import window_of
from tests.export.decoder.models import KINDS, tiny

_WINDOWS = {"cohere2": [12, 12], "gemma2": [12, 0], "gemma3_text": [12, 0], "mistral": [12, 12], "starcoder2": [12, 12]}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_say_what_the_whole_says(kind: str) -> None:
    model = tiny(kind)
    flat = cached(model)
    assert [site.window for site in flat.sites] == _WINDOWS.get(kind, [0, 0])
    ids = torch.randint(3, 320, (2, 20), generator=torch.Generator().manual_seed(1))
    pasts = [torch.zeros(2, site.kv_heads, 0, site.width) for site in flat.sites for _ in range(2)]
    found = []
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        for start, end in ((0, 14), (14, 15), (15, 20)):
            logits, *pasts = flat(ids[:, start:end], torch.ones(2, end, dtype=torch.int64), pasts)
            found.append(logits)
    assert torch.allclose(torch.cat(found, 1), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_the_model_attends_as_before_afterwards() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    cached(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, r"transformer\.h\.0\.self_attention \(BloomAttention\)"),  # ALiBi
        ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": True}, r"transformer\.h\.0"),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, r"transformer\.h\.0"),
        ("deepseek_v3", {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                         "n_routed_experts": 4, "first_k_dense_replace": 2, "num_key_value_heads": 4, "v_head_dim": 8},
         r"model\.layers\.0\.self_attn .*latent"),
        ("qwen3_next", {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                        "linear_value_head_dim": 8, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
         r"model\.layers\.0"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, r"model\.layers\.0\.self_attn .*s_aux"),
    ],
)  # fmt: skip
def test_other_attention_is_refused_by_the_name_of_its_layer(kind: str, sizes: dict[str, object], said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        cached(tiny(kind, **sizes))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_logits_of_the_newest_token(kind: str) -> None:
    model = tiny(kind)
    whole, last = cached(model), cached(model, last_logits=True)
    ids, mask, pasts = whole.example(past=4, new=3)
    mask[0, -1] = 0  # a row that ends before the others do
    with torch.no_grad():
        wanted, found = (m(ids, mask, pasts)[0] for m in (whole, last))
    assert found.shape == (2, 1, 320)
    assert torch.allclose(found[:, 0], wanted[range(2), [1, 2]], atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks  # type: ignore[operator]


def test_pytorchs_function_is_itself_again() -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    assert cached(tiny("falcon")).route == "function"
    assert torch.nn.functional.scaled_dot_product_attention is before


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_models_that_write_no_text_by_themselves(kind: str) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "d_kv": 16,
        "d_model": 32,
        "d_ff": 32,
    }
    config = (
        transformers.AutoConfig.for_model(kind, num_layers=1, **sizes)
        if kind == "t5"
        else transformers.AutoConfig.for_model(kind, **sizes)
    )
    cls = transformers.T5ForConditionalGeneration if kind == "t5" else transformers.BertModel
    with pytest.raises(UsageError, match="causal language model"):
        cached(cls(config).eval())
    with pytest.raises(UsageError, match="no model of transformers"):
        cached(nn.Linear(2, 2))


def test_masks_are_read_by_their_values() -> None:
    masking = transformers.masking_utils
    assert window_of(masking.causal_mask_function, False, 300) == 0
    assert window_of(masking.sliding_window_causal_mask_function(7), False, 300) == 7
    assert window_of(masking.bidirectional_mask_function, False, 300) is None
    chunked = masking.and_masks(masking.chunked_overlay(16, torch.zeros(1, dtype=torch.int64)), masking.causal_mask_function)
    assert window_of(chunked, False, 300) is None
