"""Accuracy before and after on labelled data, how often the two agree, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Evaluation", "classes_of", "evaluate"]

_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Evaluation:
    """What two models say of the same samples.

    Attributes:
        samples: how many.
        agree: samples of which both name the same class.
        before, after: samples that each names rightly; None without labels.
        only_before, only_after: samples that only one of them names rightly.
    """

    samples: int
    agree: int
    before: int | None = None
    after: int | None = None
    only_before: int = 0
    only_after: int = 0

    @property
    def drop(self) -> tuple[float, float, float]:
        """Accuracy lost, as a share, with the ends of its 95 % interval: both models saw the same samples (McNemar)."""
        n, b, c = self.samples, self.only_before, self.only_after
        found = (b - c) / n
        half = _Z * math.sqrt(max(b + c + 1 - (b - c) ** 2 / n, 0.0)) / n  # one more, so that no difference at all is not certainty
        return found, found - half, found + half

    def share(self, count: int) -> tuple[float, float, float]:
        """A share of the samples with its 95 % interval (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
        n, p = self.samples, count / self.samples
        middle, half = (
            (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n),
            _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n),
        )
        return p, max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"samples": self.samples, "agreement": self.share(self.agree)}
        if self.before is not None and self.after is not None:
            told |= {"accuracy_before": self.share(self.before), "accuracy_after": self.share(self.after), "drop": self.drop}
        return told

    def __str__(self) -> str:
        def told(name: str, values: tuple[float, float, float]) -> str:
            found, low, high = (100 * v + 0.0 for v in values)
            return f"{name:<10} {found:>7.2f} %   {low:.2f} to {high:.2f}"

        lines = [f"{self.samples} samples; intervals of 95 %"]
        if self.before is not None and self.after is not None:
            lines += [told("before", self.share(self.before)), told("after", self.share(self.after)), told("lost", self.drop)]
        return "\n".join([*lines, told("agreement", self.share(self.agree))])


def evaluate(
    before: Callable[[Any], Tensor],
    after: Callable[[Any], Tensor],
    batches: Any,
    labels: Sequence[int] | None,
    each: Callable[[], None],
) -> Evaluation:
    """Compare two models on all batches.

    Args:
        before, after: take a call of the model and give its scores, [batch, classes].
        batches: calls, and how many rows of each count.
        labels: the class of each sample in their order; None without.
        each: called after each batch.
    """
    import torch

    said: list[Tensor] = []
    for call, count in batches:
        said.append(torch.stack([scores(call)[:count].argmax(1) for scores in (before, after)]))
        each()
    old, new = torch.cat(said, 1)
    agree = int((old == new).sum())
    if labels is None:
        return Evaluation(len(old), agree)
    right = torch.tensor(labels)
    a, b = old == right, new == right
    return Evaluation(len(old), agree, int(a.sum()), int(b.sum()), int((a & ~b).sum()), int((b & ~a).sum()))


def classes_of(labels: Sequence[int | str], outputs: int, model: Any, stated: Sequence[str] | None) -> list[int]:
    """The output that each label stands for.

    Labels that are numbers are outputs. Names are found among the `stated` ones, those of the model's configuration
    (`label2id`), or in alphabetical order where there are as many as outputs.

    Raises:
        UsageError: a label stands for no output.
    """
    names = sorted({str(v) for v in labels})
    known: Mapping[str, int]
    if stated is not None:
        known = {name: i for i, name in enumerate(stated)}
    elif all(isinstance(v, int) for v in labels) or all(name.isdecimal() for name in names):
        known = {name: int(name) for name in names}
    elif (configured := getattr(getattr(model, "config", None), "label2id", None)) and set(names) <= set(configured):
        known = configured
    elif len(names) == outputs:
        known = {name: i for i, name in enumerate(names)}
    else:
        raise UsageError(
            f"there are {len(names)} classes ({', '.join(names[:3])}, ...) and the model has {outputs} outputs: "
            "pass --classes FILE with the name of each output, one a line"
        )
    for name in names:
        if not 0 <= known.get(name, -1) < outputs:
            why = (
                f"is no class{did_you_mean(name, known)}" if name not in known else f"is beyond the {outputs} outputs of the model"
            )
            raise UsageError(f"the label {name!r} {why}")
    return [known[str(v)] for v in labels]
