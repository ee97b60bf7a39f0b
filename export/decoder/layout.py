"""Names, order and sizes of inputs and outputs, as the readers of such files expect them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normfuse.export.decoder.call import Site

__all__ = ["Layout", "cache_names", "causal", "speech_decoder", "speech_encoder", "text_decoder", "text_encoder"]

Sizes = dict[str, tuple[str | int, ...]]
_BATCH, _NEW, _SOURCE = "batch_size", "sequence_length", "encoder_sequence_length"


@dataclass(frozen=True)
class Layout:
    """Of one file: sizes by name, in order. The size of an output that is 0 is what the graph says."""

    inputs: Sizes
    outputs: Sizes

    def state(self, model: Any, ir: Any) -> None:
        """Write the axes into the inputs and outputs of a graph."""
        for values, sizes in ((model.graph.inputs, self.inputs), (model.graph.outputs, self.outputs)):
            for value in values:
                known = value.shape.dims
                value.shape = ir.Shape([size or known[i] for i, size in enumerate(sizes[value.name])])


def cache_names(layers: int, prefix: str) -> list[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, …"""
    return [f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def causal(sites: Sequence[Site], *, last_logits: bool = False) -> Layout:
    """Of `CausalModel`: what onnxruntime-genai and optimum read."""
    inputs: Sizes = {"input_ids": (_BATCH, _NEW), "attention_mask": (_BATCH, "total_sequence_length")}
    outputs: Sizes = {"logits": (_BATCH, 1 if last_logits else _NEW, 0)}
    for i, site in enumerate(sites):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{i}.{kind}"] = (_BATCH, site.kv_heads, "past_sequence_length", site.width)
            # in a shared buffer it is the buffer's length, so it has a name of its own
            outputs[f"present.{i}.{kind}"] = (_BATCH, site.kv_heads, "present_sequence_length", site.width)
    return Layout(inputs, outputs)


def text_encoder() -> Layout:
    """Of `TextEncoder`: optimum's `encoder_model.onnx`."""
    sizes = (_BATCH, _SOURCE)
    return Layout({"input_ids": sizes, "attention_mask": sizes}, {"last_hidden_state": (*sizes, 0)})


def text_decoder(sites: Sequence[Site], cross: tuple[int, int], features: int) -> Layout:
    """Of `TextDecoder`: optimum's `decoder_model_merged.onnx`.

    Args:
        cross: heads and width of the attention to the encoder's states.
        features: of a state of the encoder.
    """
    inputs: Sizes = {
        "encoder_attention_mask": (_BATCH, _SOURCE), "input_ids": (_BATCH, "decoder_sequence_length"),
        "encoder_hidden_states": (_BATCH, _SOURCE, features),
    }  # fmt: skip
    outputs: Sizes = {"logits": (_BATCH, "decoder_sequence_length", 0)}
    heads, width = cross
    for i, site in enumerate(sites):
        for part, sizes, slots in (("decoder", (site.kv_heads, site.width), "decoder"), ("encoder", (heads, width), "encoder")):
            for kind in ("key", "value"):
                past, present = f"past_{slots}_sequence_length", f"present_{slots}_sequence_length"
                inputs[f"past_key_values.{i}.{part}.{kind}"] = (_BATCH, sizes[0], past, sizes[1])
                outputs[f"present.{i}.{part}.{kind}"] = (_BATCH, sizes[0], present, sizes[1])
    return Layout({**inputs, "use_cache_branch": (1,)}, outputs)


def speech_encoder(features: tuple[int, int], states: tuple[int, int], layers: int, cross: tuple[int, int]) -> Layout:
    """Of `SpeechEncoder`: the encoder of onnxruntime-genai's type `whisper`.

    Args:
        features: rows and frames of what is read.
        states: how many states there are, and features of one.
        layers: of the decoder.
        cross: heads and width of the attention to the states.
    """
    outputs: Sizes = {"encoder_hidden_states": (_BATCH, *states)}
    for i in range(layers):
        for kind in ("key", "value"):
            outputs[f"present_{kind}_cross_{i}"] = (_BATCH, cross[0], states[0], cross[1])
    return Layout({"audio_features": (_BATCH, *features)}, outputs)


def speech_decoder(sites: Sequence[Site], states: int, cross: tuple[int, int]) -> Layout:
    """Of `SpeechDecoder`: the decoder of onnxruntime-genai's type `whisper`."""
    inputs: Sizes = {"input_ids": (_BATCH, _NEW), "past_sequence_length": (1,)}
    outputs: Sizes = {"logits": (_BATCH, _NEW, 0)}
    for i, site in enumerate(sites):
        for kind in ("key", "value"):
            inputs[f"past_{kind}_self_{i}"] = (_BATCH, site.kv_heads, "past_length", site.width)
            outputs[f"present_{kind}_self_{i}"] = (_BATCH, site.kv_heads, "present_length", site.width)
    for i in range(len(sites)):
        for kind in ("key", "value"):
            inputs[f"past_{kind}_cross_{i}"] = (_BATCH, cross[0], states, cross[1])
    return Layout(inputs, outputs)
