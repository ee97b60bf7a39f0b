"""How an image becomes what a model takes: resized, cropped, scaled and normalized, as timm and torchvision do it with Pillow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError, did_you_mean
from normfuse.extras import need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IMAGENET", "Preprocess", "parse_preprocess"]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_RESIZE = ("shorter", "squash")


@dataclass(frozen=True)
class Preprocess:
    """Resize, center crop, scale to 0 … 1, subtract a mean and divide by a deviation.

    Attributes:
        mean, std: of each channel, or one for all.
        crop: the side of what is cut out as a share of the side that the image is resized to.
        resize: "shorter" keeps the proportions; "squash" makes the image as it is wanted, with the crop around it.
        interpolation: nearest, bilinear, bicubic or lanczos.
        resized: the side that it is resized to, where that is stated and not a share; for the height `of`.
        of: the height of the result that `resized` belongs to.
        scale: what values of 0 … 255 are multiplied by.

    Raises:
        UsageError: a value is wrong.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    resize: str = "shorter"
    interpolation: str = "bilinear"
    resized: int | None = None
    of: int | None = None
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        for name, known in (("interpolation", _INTERPOLATIONS), ("resize", _RESIZE)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"{name}={value}: expected {', '.join(known)}{did_you_mean(value, known)}")
        if not 0 < self.crop <= 1:
            raise UsageError(f"crop={self.crop:g}: expected a share above 0 and up to 1")
        if not all(math.isfinite(v) and v > 0 for v in self.std):
            raise UsageError("std: expected numbers above 0")

    def __call__(self, image: Any, channels: int, height: int, width: int) -> Tensor:
        """An image of Pillow as float32 [channels, height, width]."""
        import numpy as np
        import torch

        taken = image.convert("L" if channels == 1 else "RGB")
        filters = need("PIL.Image", extra="data").Resampling
        taken = taken.resize(self._size(taken.size, height, width), filters[self.interpolation.upper()])
        left, top = round((taken.width - width) / 2), round((taken.height - height) / 2)
        taken = taken.crop((left, top, left + width, top + height))
        values = torch.from_numpy(np.array(taken, dtype=np.float32)).reshape(height, width, channels).permute(2, 0, 1)
        mean, std = (torch.tensor(self._of_each(v, channels)).view(-1, 1, 1) for v in (self.mean, self.std))
        return ((values * self.scale - mean) / std).contiguous()

    def _size(self, given: tuple[int, int], height: int, width: int) -> tuple[int, int]:
        """(width, height) before the crop."""
        if self.resized is not None and self.of:
            scaled = [math.floor(side * self.resized / self.of) for side in (height, width)]
        else:
            scaled = [math.floor(side / self.crop) for side in (height, width)]
        if self.resize == "squash":
            return scaled[1], scaled[0]
        if height != width:  # as large as the crop needs, in the proportions of the image
            ratio = max(scaled[0] / given[1], scaled[1] / given[0])
            return max(width, round(given[0] * ratio)), max(height, round(given[1] * ratio))
        short = scaled[0]
        return (short, int(short * given[1] / given[0])) if given[0] <= given[1] else (int(short * given[0] / given[1]), short)

    def _of_each(self, values: tuple[float, ...], channels: int) -> list[float]:
        if len(values) == channels:
            return list(values)
        if len(values) == 1:
            return list(values) * channels
        if channels == 1:
            return [sum(values) / len(values)]  # as timm does for models of one channel
        raise UsageError(f"the preprocessing is for {len(values)} channels, and the model takes {channels}")

    def __str__(self) -> str:
        def told(values: tuple[float, ...]) -> str:
            return "/".join(f"{v:.4g}" for v in (values if len(set(values)) > 1 else values[:1]))

        side = f"{self.resized}/{self.of}" if self.resized is not None else f"{self.crop:g}"
        return f"{self.resize}, crop {side}, {self.interpolation}, mean {told(self.mean)}, std {told(self.std)}"


IMAGENET = Preprocess()
_NAMED: Mapping[str, Preprocess] = {
    "imagenet": IMAGENET,
    "unit": Preprocess((0.0,), (1.0,)),  # 0 … 1
    "symmetric": Preprocess((0.5,), (0.5,)),  # -1 … 1
    "bytes": Preprocess((0.0,), (1.0,), scale=1.0),  # 0 … 255
}


def parse_preprocess(text: str, known: Preprocess | None = None) -> Preprocess:
    """`imagenet`, `unit`, `symmetric` or `bytes`, and `NAME=VALUE` for what differs: `mean=0.5/0.5/0.5,std=0.5,crop=0.9`.

    Args:
        text: the words.
        known: what is changed where no name is given.

    Raises:
        UsageError: a word or a value is not known.
    """
    found, values = known or IMAGENET, {}
    for part in (p.strip() for p in text.split(",")):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals and name in _NAMED:
            found = _NAMED[name]
        elif equals and name in _READ:
            values[name] = _READ[name](name, value)
        else:
            hint = did_you_mean(name, [*_NAMED, *_READ])
            raise UsageError(f"{part!r} is not understood{hint}; expected {', '.join(_NAMED)}, or {'=, '.join(_READ)}=")
    return dataclasses.replace(found, **values)


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as e:
        raise UsageError(f"{name}={value}: expected a number") from e


_READ: Mapping[str, Callable[[str, str], Any]] = {
    "mean": lambda name, value: tuple(_number(name, v) for v in value.split("/")),
    "std": lambda name, value: tuple(_number(name, v) for v in value.split("/")),
    "crop": _number,
    "scale": _number,
    "resize": lambda _, value: value,
    "interpolation": lambda _, value: value,
}
