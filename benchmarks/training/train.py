"""One training run: AdamW, one cycle of the learning rate, the same recipe for all norms of a task."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.data import Images, Text

__all__ = ["Recipe", "Trained", "held_out", "measure", "train"]

_POINTS = 50  # of the loss curve


@dataclass(frozen=True)
class Recipe:
    """What all variants of a task share.

    Attributes:
        steps: optimizer steps.
        batch: images or texts a step.
        rate: highest learning rate.
        decay: weight decay.
        smoothing: label smoothing.
        shift: images move by up to so many pixels.
        context: characters of a text.
    """

    steps: int
    batch: int = 64
    rate: float = 2e-3
    decay: float = 0.05
    smoothing: float = 0.0
    shift: int = 0
    context: int = 0


@dataclass(frozen=True)
class Trained:
    """What a run leaves beside the weights.

    Attributes:
        losses: training loss, averaged over equal parts of the run.
        finite: False when a loss was infinite or no number; the run stopped there.
    """

    losses: list[float] = field(default_factory=list)
    finite: bool = True


def train(
    model: nn.Module, data: Images | Text, recipe: Recipe, *, seed: int, on_step: Callable[[int], None] | None = None
) -> Trained:
    """Train `model` in place and leave it in eval mode; the order of the data depends on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]  # gains and biases are not decayed
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.rate, total_steps=recipe.steps, pct_start=0.1)
    model.train()
    losses: list[float] = []
    for step in range(recipe.steps):
        x, y = _batch(data, recipe, generator)
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), label_smoothing=recipe.smoothing)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1)
    model.eval()
    part = max(1, recipe.steps // _POINTS)
    curve = [sum(losses[i : i + part]) / len(losses[i : i + part]) for i in range(0, len(losses), part)]
    return Trained(curve, math.isfinite(losses[-1]))


@torch.no_grad()
def measure(model: Callable[[Tensor], Tensor], data: Images | Text, recipe: Recipe) -> dict[str, Any]:
    """Accuracy on the held-out data with all predictions; for a text the bits a character as well."""
    x, y = held_out(data, recipe)
    logits = torch.cat([model(part) for part in x.split(250)]).flatten(0, -2)
    found = {"accuracy": (logits.argmax(1) == y.flatten()).double().mean().item(), "predictions": logits.argmax(1)}
    if isinstance(data, Text):
        found["bits"] = F.cross_entropy(logits.double(), y.flatten()).item() / math.log(2)
    return found


def held_out(data: Images | Text, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the held-out data, all of one shape."""
    if isinstance(data, Images):
        return data.test_images, data.test_labels
    return _sequences(data.test, recipe.context)


def _sequences(text: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """A text cut into pieces (N, context), and the characters that follow each; what is left over at the end is dropped."""
    count = (len(text) - 1) // context
    return text[: count * context].view(count, context), text[1 : count * context + 1].view(count, context)


def _batch(data: Images | Text, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if isinstance(data, Text):
        starts = torch.randint(0, len(data.training) - recipe.context, (recipe.batch, 1), generator=generator)
        at = starts + torch.arange(recipe.context)
        return data.training[at], data.training[at + 1]
    chosen = torch.randint(0, len(data.images), (recipe.batch,), generator=generator)
    return _shifted(data.images[chosen], recipe.shift, generator), data.labels[chosen]


def _shifted(images: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `by` pixels in either direction, zeros coming in."""
    if not by:
        return images
    size, count = images.shape[-1], len(images)
    padded = F.pad(images[:, 0], (by,) * 4)
    y, x = torch.randint(0, 2 * by + 1, (2, count, 1, 1), generator=generator)
    at = torch.arange(size)
    return padded[torch.arange(count).view(-1, 1, 1), y + at.view(-1, 1), x + at].unsqueeze(1)
