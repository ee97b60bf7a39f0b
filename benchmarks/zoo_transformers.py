"""Tiny random models of transformers: the configuration class of a model type with small sizes, by one table."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from torch import nn

__all__ = ["build", "model_types"]

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "d_vocab", "text_vocab_size", "entity_vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim", "projection_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "encoder_hidden_dim", "encoder_hidden_size", "entity_emb_size", "out_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "feed_forward_size"), 64
    ),
    **dict.fromkeys(("ffn_hidden_size", "inner_size", "mlp_dim", "feedforward_size", "dim_feedforward", "mlp_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "expert_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "n_encoder_layers", "n_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "kv_channels", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "global_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "rotary_dim", "indexer_head_dim", "o_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_group", "num_labels"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k", "topk_group", "num_experts_per_token"), 2),
    **dict.fromkeys(("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions", "n_ctx"), 64),
    **dict.fromkeys(("image_size", "input_size", "img_size"), 32),
    **dict.fromkeys(("patch_size", "patch_stride", "conv_stride_size"), 8),
    **dict.fromkeys(("num_queries", "num_query_tokens", "num_feature_levels", "hidden_dim", "encoder_in_channels"), 32),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "time_step_rank", "lru_width", "conv_dim_out"), 8),
    **dict.fromkeys(("num_conv_pos_embeddings",), 16),
    **dict.fromkeys(("num_conv_pos_embedding_groups",), 2),
}
"""Upper bounds of attributes by name; a default that is smaller stays."""

LISTS: dict[str, Any] = {
    **dict.fromkeys(("depths", "layers_depths", "num_blocks_per_stage", "decoder_depths"), lambda i, n: 1),
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim", "encoder_hidden_size"), lambda i, n: 16 * 2**i),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_heads_per_stage"), lambda i, n: 2**i),
    **dict.fromkeys(("conv_dim", "tdnn_dim"), lambda i, n: 32),
}
"""Entry i of n of attributes that are lists of integers."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "xglm": {"attention_heads": 4},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64},
    "clip": {},
    "convbert": {"embedding_size": 32, "head_ratio": 2},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16, "embedding_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hashes": 1,
        "num_buckets": 2,
        "max_position_embeddings": 16,
    },
    "big_bird": {"block_size": 4, "attention_type": "original_full"},
    "longformer": {"attention_window": [8, 8]},
    "ibert": {"quant_mode": False},
    "splinter": {},
}
"""What a model type needs beyond the tables."""

UNUSABLE = frozenset({"timm_backbone", "timm_wrapper", "encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"})


def model_types() -> list[str]:
    """All model types that have a base model, but those that wrap another library."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(name for name in MODEL_MAPPING_NAMES if name not in UNUSABLE)


def build(model_type: str) -> nn.Module:
    """The base model of a type with small sizes and random weights.

    Raises:
        Exception: whatever the configuration or the model class objects to.
    """
    auto = importlib.import_module("transformers.models.auto")
    config_class = auto.configuration_auto.CONFIG_MAPPING[model_type]
    config = config_class(**tiny(config_class) | EXCEPTIONS.get(model_type, {}))
    found = auto.modeling_auto.MODEL_MAPPING[config_class]
    model_class = found[0] if isinstance(found, (tuple, list)) else found
    return model_class(config).eval()  # type: ignore[no-any-return]


def tiny(config_class: Any) -> dict[str, Any]:
    """Arguments for a configuration class, its parts included."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    parts = {n: c for n, c in _parts(config_class).items() if n in fields}
    return {name: small for name, f in fields.items() if (small := _small(name, _default(f))) is not None} | {
        n: {"model_type": c.model_type, **tiny(c)} for n, c in parts.items()
    }


def _parts(config_class: Any) -> dict[str, Any]:
    """Classes of the configurations within one, those that it chooses by default included."""
    named = getattr(config_class, "sub_configs", None) or {}
    if not named:
        return {}
    try:
        default = config_class()
    except Exception:  # it wants arguments
        return {n: c for n, c in named.items() if dataclasses.is_dataclass(c)}
    return {n: type(c) for n in named if dataclasses.is_dataclass(c := getattr(default, n, None)) and c is not None}


def _default(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _small(name: str, default: Any) -> Any:
    """A smaller value than the default, or None."""
    if isinstance(default, bool):
        return None
    if isinstance(default, int) and isinstance(SIZES.get(name), int):
        return SIZES[name] if default > SIZES[name] else None
    if isinstance(default, (list, tuple)) and default and all(isinstance(v, int) for v in default):
        if name in LISTS:
            return [LISTS[name](i, len(default)) for i in range(len(default))]
        if isinstance(SIZES.get(name), int) and len(default) == 2:
            return [min(v, SIZES[name]) for v in default]
    return None
