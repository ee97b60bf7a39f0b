"""Which models the zoo holds, and how each is built: timm, torchvision and transformers, with random weights."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import zoo_transformers
from normfuse.given.declared_inputs import declared_inputs

__all__ = ["LIBRARIES", "SIZES", "Subject", "sizes", "subject", "subjects"]

LIBRARIES = ("timm", "torchvision", "transformers")
SIZES = Path(__file__).parent / "results" / "zoo-models.json"
"""Parameters of every model of timm and torchvision by name, so that a list need not build all of them again."""

_BATCH = 2
_SIZE_WORDS = re.compile(r"_(?:tiny|small|base|large|[tsmlb])$")


@dataclass(frozen=True)
class Subject:
    """A model by name.

    Attributes:
        library, model: as in `library:model`.
        family: the module of the library that defines it.
        group: what it is the smallest of, within its family.
        size: number of parameters; 0 where it is not known before it is built.
    """

    library: str
    model: str
    family: str
    group: str
    size: int = 0

    @property
    def name(self) -> str:
        return f"{self.library}:{self.model}"

    def build(self) -> nn.Module:
        """The model with random weights, from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _BUILDERS[self.library](self.model)

    def inputs(self, model: nn.Module) -> tuple[bool, tuple[Any, ...], dict[str, Any]]:
        """Does the model declare its inputs? And these inputs, else explicit ones for its kind."""
        found = declared_inputs(model)
        return (False, *_explicit(self, model)) if found is None else (True, *found)


def subjects(library: str) -> list[Subject]:
    """The models of a library, smallest first: of each family and group the one with the fewest parameters."""
    smallest: dict[tuple[str, str], Subject] = {}
    for s in sorted(_names(library), key=lambda s: (s.size or math.inf, s.name)):  # size unknown: last
        smallest.setdefault((s.family, s.group), s)
    return sorted(smallest.values(), key=lambda s: (s.size, s.name))


def subject(name: str) -> Subject:
    """The model called `library:model`, whether or not `subjects` holds it."""
    library, _, model = name.partition(":")
    return Subject(library, model, *_FAMILIES[library](model))


def sizes(library: str) -> dict[str, int]:
    """Parameters of every model of timm or torchvision, each built on the device `meta` where it can be."""
    return {name: _on_meta(library, name) for name in _known(library)}


def _names(library: str) -> Iterator[Subject]:
    if library == "transformers":
        for name in zoo_transformers.model_types():
            yield Subject(library, name, name, "")
        return
    for name, size in json.loads(SIZES.read_text(encoding="utf-8"))[library].items():
        yield Subject(library, name, *_FAMILIES[library](name), size)


def _known(library: str) -> list[str]:
    if library == "timm":
        return list(importlib.import_module("timm").list_models())
    return list(importlib.import_module("torchvision.models").list_models())


def _on_meta(library: str, name: str) -> int:
    try:
        with torch.device("meta"):
            model = _BUILDERS[library](name)
    except Exception:  # values are read while it is built
        model = _BUILDERS[library](name)
    return sum(p.numel() for p in model.parameters())


# -- libraries ---------------------------------------------------------------------------------------------------------


def _timm(name: str) -> nn.Module:
    return importlib.import_module("timm").create_model(name)  # type: ignore[no-any-return]


def _timm_family(name: str) -> tuple[str, str]:
    """The first word or two: `resnet`, `wide_resnet`, `vit_tiny`."""
    registry = importlib.import_module("timm.models._registry")
    found = re.match(r"[a-z]+(?:_[a-z]+)?", name)
    return str(registry._model_to_module.get(name, "")), _SIZE_WORDS.sub("", found[0] if found else name)


def _torchvision(name: str) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    takes = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in takes else {}
    if ".detection" in models.get_model_builder(name).__module__ and not name.startswith("ssd"):
        options |= {"min_size": 192, "max_size": 256}  # of 800 and 1333: norms do not depend on it
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def _torchvision_family(name: str) -> tuple[str, str]:
    """The name without its size: `vgg_bn`; of detection, segmentation, video and quantization all models."""
    models = importlib.import_module("torchvision.models")
    family = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    return family, name if "." in family else _SIZE_WORDS.sub("", re.sub(r"\d\w*?(?=_bn|$)", "", name))


_BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": zoo_transformers.build,
}
_FAMILIES: dict[str, Callable[[str], tuple[str, str]]] = {
    "timm": _timm_family,
    "torchvision": _torchvision_family,
    "transformers": lambda name: (name, ""),
}


# -- inputs ------------------------------------------------------------------------------------------------------------


def _explicit(s: Subject, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a user would pass where the model declares nothing."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    if ".detection" in type(model).__module__:
        return ([drawn(3, 240, 320), drawn(3, 320, 256)],), {}
    if ".optical_flow" in type(model).__module__:
        return (drawn(1, 3, 128, 128), drawn(1, 3, 128, 128)), {}
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") == "input_features":
        bins = next((getattr(config, n) for n in ("num_mel_bins", "feature_size", "input_dim") if hasattr(config, n)), 80)
        frames = 2 * int(getattr(config, "max_source_positions", 50))
        return (), {"input_features": drawn(_BATCH, int(bins), frames)}
    return (drawn(_BATCH, 3, 224, 224),), {}
