"""The preprocessing that a model was trained with, from where it is written down: timm, torchvision, a Hugging Face folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from normfuse.app.data.preprocess import IMAGENET, Preprocess, parse_preprocess
from normfuse.errors import UsageError, did_you_mean
from normfuse.extras import need

__all__ = ["preprocess_of"]

_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic")  # by Pillow's number
_WAYS = "imagenet, unit (0 to 1), symmetric (-1 to 1), bytes, timm:NAME, torchvision:NAME, hf:DIR, or mean=...,std=...,crop=..."


def preprocess_of(source: str, model: Any, asked: str | None = None) -> Preprocess:
    """How images become inputs of the model.

    Args:
        source: the name of the model on the command line.
        model: as it was loaded.
        asked: `--preprocess`.

    Raises:
        UsageError: nothing says how, or `asked` is not understood.
    """
    if asked is not None:
        kind, _, name = asked.partition(":")
        try:
            return _NAMED[kind](name) if name and kind in _NAMED else parse_preprocess(asked, _written_down(source, model))
        except UsageError as e:
            raise UsageError(f"--preprocess {asked}: {e}") from e
    found = _written_down(source, model)
    if found is None:
        raise UsageError(f"{source} does not say how images are prepared for it: pass --preprocess ({_WAYS})")
    return found


def _written_down(source: str, model: Any) -> Preprocess | None:
    kind, _, name = source.partition(":")
    if (config := getattr(model, "pretrained_cfg", None)) is not None:
        return _of_timm(dict(config) if isinstance(config, Mapping) else config.to_dict())
    if kind == "torchvision":
        return _torchvision(name)
    if kind == "hf":
        return _hugging_face(str(getattr(model, "name_or_path", "") or name))
    return None


def _timm(name: str) -> Preprocess:
    timm = need("timm", extra="timm")
    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name.split(".")[0]) else None
    if config is None:
        raise UsageError(f"timm has no model {name!r}{did_you_mean(name.split('.')[0], timm.list_models(), most=3)}")
    return _of_timm(config.to_dict())


def _of_timm(config: Mapping[str, Any]) -> Preprocess:
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise UsageError(f"its images are cut in the mode {mode!r}, which is not known here: pass --preprocess ({_WAYS})")
    return Preprocess(
        mean=tuple(config.get("mean") or IMAGENET.mean),
        std=tuple(config.get("std") or IMAGENET.std),
        crop=float(config.get("crop_pct") or IMAGENET.crop),
        resize="squash" if mode == "squash" else "shorter",
        interpolation=str(config.get("interpolation") or "bicubic"),
    )


def _torchvision(name: str) -> Preprocess:
    need("torchvision", extra="torchvision")
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise UsageError(f"torchvision has no model {name!r}{did_you_mean(name, models.list_models(), most=3)}")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    if type(preset).__name__ != "ImageClassification":
        raise UsageError(f"torchvision:{name} takes no plain images ({type(preset).__name__}); give arrays or a factory")
    return Preprocess(
        mean=tuple(preset.mean), std=tuple(preset.std), interpolation=preset.interpolation.value, resized=preset.resize_size[0],
        of=preset.crop_size[0],
    )  # fmt: skip


def _hugging_face(folder: str) -> Preprocess | None:
    """From `preprocessor_config.json`, which is only read; None where there is none."""
    try:
        given = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UsageError(f"{folder}/preprocessor_config.json cannot be read: {e}") from e
    if not isinstance(given, Mapping) or not isinstance(given.get("size", {}), (Mapping, int)):
        raise UsageError(f"{folder}/preprocessor_config.json does not say the size of images: pass --preprocess ({_WAYS})")
    normalized = given.get("do_normalize", True)
    if normalized and not (given.get("image_mean") and given.get("image_std")):  # classes have defaults of their own
        raise UsageError(f"{folder}/preprocessor_config.json has no image_mean and image_std: pass --preprocess ({_WAYS})")
    resample = given.get("resample", 2)
    found: dict[str, Any] = {
        "mean": tuple(given["image_mean"]) if normalized else (0.0,),
        "std": tuple(given["image_std"]) if normalized else (1.0,),
        "scale": float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 1.0,
        "interpolation": _RESAMPLING[resample] if resample in range(len(_RESAMPLING)) else "bilinear",
    }
    size, crop = given.get("size", {}), given.get("crop_size")
    shorter = size.get("shortest_edge") if isinstance(size, Mapping) else None
    side = crop.get("height") if isinstance(crop, Mapping) else crop
    if isinstance(share := given.get("crop_pct"), float) and (shorter or 0) < 384:
        return Preprocess(**found, crop=share)
    if isinstance(shorter, int) and isinstance(side, int) and given.get("do_center_crop", True):
        return Preprocess(**found, resized=shorter, of=side)
    return Preprocess(**found, resize="shorter" if shorter else "squash", crop=1.0)


def _in_folder(folder: str) -> Preprocess:
    found = _hugging_face(folder)
    if found is None:
        raise UsageError(f"there is no {Path(folder) / 'preprocessor_config.json'}")
    return found


_NAMED: Mapping[str, Callable[[str], Preprocess]] = {"timm": _timm, "torchvision": _torchvision, "hf": _in_folder}
