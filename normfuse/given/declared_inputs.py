"""Example inputs that a model declares by itself: timm, Hugging Face and torchvision say what they take.

Nothing is downloaded or drawn from the global random generator: attributes of the model are read, and the settings of the
tokenizer or processor in the folder that it comes from. Two calls give the same tensors.
"""

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["declared_inputs"]

_TOKENS = 16  # default sequence length: long enough for every relative position bucket that matters, cheap to run
_DETECTED = (3, 320, 320)  # of one image; detectors resize each by themselves
_LARGEST = 4096  # side of an image; a folder may say anything
_LONGEST_AUDIO = 16_000  # samples: one second


def declared_inputs(
    model: nn.Module, *, batch: int = 2, tokens: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Positional and keyword example inputs for a model of timm, transformers or torchvision.

    Args:
        model: any module.
        batch: leading size of every input; 2 so that a dynamic batch can be captured from it.
        tokens: sequence length of token inputs; at most 16 by default, never more than the model has positions for.

    Returns:
        `(args, kwargs)` on the model's device and in its dtype, or None when the model declares nothing.
    """
    like = _Like.of(model)
    if (config := getattr(model, "config", None)) is not None and hasattr(model, "main_input_name"):
        kwargs = _hugging_face(model, config, like, batch, tokens)
        return None if kwargs is None else ((), kwargs)
    if type(model).__module__.startswith("torchvision.models.detection"):
        return ([like.image(*_DETECTED) for _ in range(batch)],), {}
    if (size := _timm_size(model)) is not None or (size := _torchvision_size(model)) is not None:
        return (like.image(batch, *size),), {}
    return None


@dataclass(frozen=True)
class _Like:
    """Makes inputs in the dtype and on the device of a model."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> "_Like":
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        return cls(torch.device("cpu"), torch.get_default_dtype()) if first is None else cls(first.device, first.dtype)

    def image(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def ids(self, batch: int, tokens: int, config: Any) -> Tensor:
        vocabulary = int(config.vocab_size)
        ids = (torch.arange(batch * tokens) * 7 + 3) % vocabulary
        pad = getattr(config, "pad_token_id", None)
        # models that count positions from the padding would see a shorter text
        ids = torch.where(ids == pad, (ids + 1) % vocabulary, ids) if isinstance(pad, int) else ids
        return ids.view(batch, tokens).to(self.device)

    def mask(self, batch: int, tokens: int) -> Tensor:
        """Ones, and zeros at the end of every other text, the first one included: a text of full length would prove no masking."""
        padding = torch.tensor([tokens // 4 if i % 2 == 0 else 0 for i in range(batch)])
        return (torch.arange(tokens) < tokens - padding[:, None]).long().to(self.device)

    def types(self, batch: int, tokens: int) -> Tensor:
        """The second half of a text is its second sentence."""
        return (torch.arange(tokens) >= tokens // 2).long().expand(batch, tokens).contiguous().to(self.device)


def _timm_size(model: nn.Module) -> tuple[int, ...] | None:
    """(channels, height, width) of a timm model, as built and not as pretrained: `img_size=` and `in_chans=` count."""
    cfg = getattr(model, "pretrained_cfg", None)
    size = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
    if size is None or len(size) != 3:
        return None
    channels, *plane = (int(n) for n in size)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, (tuple, list)) and len(built) == 2:
        plane = [int(n) for n in built]
    first = cfg.get("first_conv") if isinstance(cfg, Mapping) else getattr(cfg, "first_conv", None)
    if isinstance(first, str):
        stem = dict(model.named_modules()).get(first)
        channels = int(getattr(stem, "in_channels", channels))
    return (channels, *plane)


def _torchvision_size(model: nn.Module) -> tuple[int, ...] | None:
    module = type(model).__module__
    if not module.startswith("torchvision.models") or any(s in module for s in (".detection", ".optical_flow")):
        return None
    if ".video" in module:
        return (3, 16, 112, 112) if module.endswith("resnet") else (3, 16, 224, 224)
    side = getattr(model, "image_size", None)
    if not isinstance(side, int):
        side = 299 if module.endswith("inception") else 224
    return (3, side, side)


def _hugging_face(model: nn.Module, config: Any, like: _Like, batch: int, tokens: int | None) -> dict[str, Any] | None:
    takes = inspect.signature(model.forward).parameters
    main = str(model.main_input_name)
    inputs: dict[str, Any] = {}
    if main == "input_ids":
        text = config if hasattr(config, "vocab_size") else getattr(config, "text_config", None)
        if text is None or not hasattr(text, "vocab_size"):
            return None
        length = min(tokens or _TOKENS, _positions(text))
        inputs["input_ids"] = like.ids(batch, length, text)
        given = _tokenizer_gives(model, text)
        if "attention_mask" in given and "attention_mask" in takes:
            inputs["attention_mask"] = like.mask(batch, length)
        if "token_type_ids" in given and "token_type_ids" in takes:
            inputs["token_type_ids"] = like.types(batch, length) if _sentences(text) > 1 else like.types(batch, length) * 0
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            inputs["decoder_input_ids"] = like.ids(batch, length, text)
    if main == "pixel_values" or (main == "input_ids" and {"pixel_values", "return_loss"} <= takes.keys()):
        size = _pixels(model, config)
        if size is None:
            return None
        inputs["pixel_values"] = like.image(batch, *size)
    elif main == "input_values":
        inputs["input_values"] = like.image(batch, _LONGEST_AUDIO)
    elif main == "input_features" and (spectrogram := _spectrogram(config)) is not None:
        inputs["input_features"] = like.image(batch, *spectrogram)
        if "decoder_input_ids" in takes:
            inputs["decoder_input_ids"] = like.ids(batch, min(tokens or _TOKENS, _positions(config)), config)
    elif main != "input_ids":
        return _own_dummies(model)
    if "use_cache" in takes and getattr(config, "use_cache", False) and _decodes(config):
        # a cache object is no tensor: it can be neither exported nor compared
        inputs["use_cache"] = False
    return inputs


def _tokenizer_gives(model: nn.Module, config: Any) -> Sequence[str]:
    """Names of the inputs that the model's tokenizer returns."""
    settings = _settings(model, "tokenizer_config.json")
    named = settings.get("model_input_names")
    if named is None and isinstance(tokenizer := settings.get("tokenizer_class"), str):
        cls = getattr(sys.modules.get("transformers"), tokenizer, None)
        named = getattr(cls, "model_input_names", None) if isinstance(cls, type) else None
    if isinstance(named, list) and all(isinstance(n, str) for n in named):
        return named
    # as tokenizers of models with two sentences do; others that take types of tokens (GPT-2) are not given any
    return ["input_ids", "attention_mask", *(["token_type_ids"] if _sentences(config) > 1 else [])]


def _sentences(config: Any) -> int:
    found = getattr(config, "type_vocab_size", None)
    return found if isinstance(found, int) else 0


def _settings(model: nn.Module, file: str) -> Mapping[str, Any]:
    """A JSON file in the folder that the model comes from; empty where there is none."""
    folder = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    try:
        found = json.loads(Path(str(folder), file).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _own_dummies(model: nn.Module) -> dict[str, Any] | None:
    """`dummy_inputs`, but only where the model's class wrote its own: the base class gives every model token ids."""
    owner = next(c for c in type(model).__mro__ if "dummy_inputs" in vars(c) or c is object)
    if owner is object or owner.__name__ == "PreTrainedModel":
        return None
    found = model.dummy_inputs
    return dict(found) if isinstance(found, Mapping) else None


def _positions(config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(longest, int):
        return 1 << 30  # relative positions: any length
    return max(1, longest - 2)  # position tables of the RoBERTa family are two longer than the texts that they hold


def _pixels(model: nn.Module, config: Any) -> tuple[int, int, int] | None:
    """(channels, height, width) that the processor in the model's folder gives, else those of the configuration.

    A processor that only scales the shorter side is asked last: it does not say what becomes of the other.
    """
    vision = config if hasattr(config, "image_size") else getattr(config, "vision_config", None)
    given = _settings(model, "preprocessor_config.json") or _settings(model, "processor_config.json").get("image_processor", {})
    given = given if isinstance(given, Mapping) else {}
    crop = given.get("crop_size") if given.get("do_center_crop", True) else None
    size = given.get("size")
    shorter = size.get("shortest_edge") if isinstance(size, Mapping) and not size.get("longest_edge") else None
    plane = next((p for s in (crop, size, getattr(vision, "image_size", None), shorter) if (p := _plane(s)) is not None), None)
    if plane is None:
        return None
    return int(getattr(vision or config, "num_channels", 3)), *plane


def _plane(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size as configurations spell it."""
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    return (sides[0], sides[1]) if len(sides) == 2 and all(isinstance(s, int) and 0 < s <= _LARGEST for s in sides) else None


def _spectrogram(config: Any) -> tuple[int, int] | None:
    """(mel bins, frames) of Whisper and its kind, whose encoder halves the frames and takes one length only."""
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    return (bins, 2 * positions) if isinstance(bins, int) and isinstance(positions, int) else None


def _decodes(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", True))
