"""`genai_config.json`: what onnxruntime-genai reads of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normfuse.errors import UsageError
from normfuse.export.decoder.call import Site

__all__ = ["LONGEST", "genai_config", "length_of", "token_of", "whisper_config"]

#: Slots of a cache unless another number is asked for: a reader allocates all of them.
LONGEST = 4096


def length_of(positions: int, asked: int | None) -> int:
    """Slots of the cache: `asked`, or as many as the model has positions, at most `LONGEST`.

    Raises:
        UsageError: there are no positions for so many.
    """
    if asked is None:
        return min(positions, LONGEST)
    if not 1 <= asked <= positions:
        raise UsageError(f"max_length={asked}: the model has {positions} positions")
    return asked


def genai_config(
    config: Any,
    generation: Any,
    sites: Sequence[Site],
    *,
    vocabulary: int,
    positions: int,
    max_length: int,
    library: str | None = None,
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Args:
        config, generation: of the model, as transformers has them; `generation` may be None.
        vocabulary: size of the logits' last axis.
        positions: how many the model knows.
        max_length: slots of the cache.
        library: file name of normfuse's kernels, where the graph needs them.
    """
    decoder: dict[str, Any] = {
        "session_options": _session(library),
        "filename": "model.onnx",
        "head_size": sites[0].width,
        "hidden_size": int(config.hidden_size),
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        "num_attention_heads": sites[0].heads,
        "num_hidden_layers": len(sites),
        "num_key_value_heads": sites[0].kv_heads,
    }  # fmt: skip
    model: dict[str, Any] = {
        # a neutral type that takes any graph with these names; `gpt2` would mean other ones
        "type": "decoder",
        **_tokens(config, generation),
        "context_length": positions,
        "vocab_size": vocabulary,
        "decoder": decoder,
    }
    return {"model": model, "search": _search(generation, max_length)}


def whisper_config(
    config: Any, generation: Any, sites: Sequence[Site], *, files: tuple[str, str], vocabulary: int, positions: int,
    max_length: int, library: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same for an encoder of speech and its decoder; `files` are their names. See `genai_config`."""
    encoder = {
        "session_options": _session(library),
        "filename": files[0],
        "head_size": int(config.d_model) // int(config.encoder_attention_heads),
        "hidden_size": int(config.d_model),
        "inputs": {"audio_features": "audio_features"},
        "outputs": {
            "encoder_hidden_states": "encoder_hidden_states",
            "cross_present_key_names": "present_key_cross_%d", "cross_present_value_names": "present_value_cross_%d",
        },
        "num_attention_heads": int(config.encoder_attention_heads),
        "num_hidden_layers": int(config.encoder_layers),
        "num_key_value_heads": int(config.encoder_attention_heads),
    }  # fmt: skip
    decoder = {
        "session_options": _session(library),
        "filename": files[1],
        "head_size": sites[0].width,
        "hidden_size": int(config.d_model),
        "inputs": {
            "input_ids": "input_ids", "past_sequence_length": "past_sequence_length",
            "past_key_names": "past_key_self_%d", "past_value_names": "past_value_self_%d",
            # these have no default
            "cross_past_key_names": "past_key_cross_%d", "cross_past_value_names": "past_value_cross_%d",
        },
        "outputs": {"logits": "logits", "present_key_names": "present_key_self_%d", "present_value_names": "present_value_self_%d"},
        "num_attention_heads": sites[0].heads,
        "num_hidden_layers": len(sites),
        "num_key_value_heads": sites[0].kv_heads,
    }  # fmt: skip
    model = {
        "type": "whisper", **_tokens(config, generation), "context_length": positions, "vocab_size": vocabulary,
        "encoder": encoder, "decoder": decoder,
    }  # fmt: skip
    return {"model": model, "search": _search(generation, max_length)}


def _session(library: str | None) -> dict[str, Any]:
    return {"log_id": "onnxruntime-genai", "provider_options": []} | ({"custom_ops_library": library} if library else {})


def _tokens(config: Any, generation: Any) -> dict[str, Any]:
    eos, pad, bos = (token_of(config, generation, kind) for kind in ("eos", "pad", "bos"))
    first = eos[0] if isinstance(eos, list) else eos
    found = {
        "eos_token_id": 0 if eos is None else eos,
        "pad_token_id": pad if pad is not None else first if first is not None else 0,
    }
    return found | ({} if bos is None else {"bos_token_id": bos})


def _search(generation: Any, max_length: int) -> dict[str, Any]:
    found: dict[str, Any] = {"max_length": max_length, "min_length": 0, "num_beams": 1, "past_present_share_buffer": True}
    found["do_sample"] = bool(getattr(generation, "do_sample", None) or False)
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        value = getattr(generation, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value
    return found


def token_of(config: Any, generation: Any, kind: str) -> Any:
    """The token `bos`, `eos` (or a list of these), `pad` or `decoder_start`; None where there is none."""
    for source in (generation, config):
        value = getattr(source, f"{kind}_token_id", None)
        if isinstance(value, (list, tuple)) and value:
            return [int(v) for v in value] if kind == "eos" else int(value[0])
        if isinstance(value, int):
            return value
    return None
