"""Short fine-tuning of a graph with the integers that it will be deployed with, against the float graph.

    Ŵ[n, k] = S[n] 2^(-e[k]) clamp(rne(W[n, k] 2^e[k] / S[n])),   X̂ = s A with the codes of `quantize_rows` or `quantize_static`

Rounding passes gradients straight through. W and S are trained, S as in LSQ; exponents stay. So are biases and the gains and
shifts of norms. The loss is the squared error of the outputs relative to their variance, on the calibration data.

Sources: Bengio et al., arXiv 1308.3432 (straight-through estimator); Esser et al., *Learned Step Size Quantization*,
arXiv 1902.08153; Hinton et al., arXiv 1503.02531 (distillation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.errors import NormfuseError, UsageError
from normfuse.ir.graph import Graph
from normfuse.numerics.evaluate import evaluate
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.student import Student
from normfuse.quant.weight import QuantizedWeight

__all__ = ["Finetuned", "finetune"]

Progress = Callable[[int, float], None] | None


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What fine-tuning found.

    Attributes:
        weights: the integers of each layer, one a group of a convolution; the constants of the graph hold their values.
        input_scales: static scales of what the layers read, where there were some.
        losses: of each step, on its batch.
        before, after: mean loss over all batches with the integers it started from, and with those that it returns.
    """

    weights: dict[fx.Node, tuple[QuantizedWeight, ...]]
    input_scales: dict[fx.Node, Tensor]
    losses: list[float]
    before: float
    after: float


def finetune(
    graph: Graph, samples: Sequence[Sequence[Any]], spec: ShiftQuant, *, weights: Mapping[fx.Node, Sequence[QuantizedWeight]],
    input_scales: Mapping[fx.Node, Tensor] | None = None, steps: int | None = None, rate: float = 2e-3,
    progress: Progress = None,
) -> Finetuned:  # fmt: skip
    """Train the layers of a graph with their integers; the float graph, as it is now, is what they are to equal.

    Constants of the graph are replaced: the weights by Ŵ, for the node alone, and biases, gains and shifts by the trained
    ones. Whoever quantizes Ŵ takes the returned integers, or finds them again. If the loss over all batches does not fall,
    the integers are those that were given and biases, gains and shifts stay as they were.

    Args:
        graph: of ATen calls; float32. It is not changed if there is an error.
        samples: batches, as `normfuse.ir.passes.Samples`; taken in a random order that depends on `spec.seed` alone.
        spec: widths of activations, layer by layer, and the seed.
        weights: the layers that are quantized (linear, addmm, matmul with a constant, conv1d, conv2d) with the integers to
            start from: one matrix a group of a convolution, else one, in the layout of `as_matrices`.
        input_scales: static scales of their inputs; layers that are not named have dynamic ones.
        steps: optimizer steps, one batch each; None for `spec.finetune_steps`.
        rate: of Adam, relative to the root mean square of each tensor; falls to zero as a cosine.
        progress: called after each step with its number, from 1, and its loss.

    Raises:
        UsageError: there is no batch, a node is no such layer, or the graph computes in half precision.
        NormfuseError: the loss is infinite or no number.
    """
    steps = spec.finetune_steps if steps is None else steps
    batches = [list(batch) for batch in samples]
    if not batches:
        raise UsageError("fine-tuning: there is no batch; pass calibration= or example inputs")
    student = Student(graph, spec, weights, input_scales or {})
    targets = [_targets(graph, batch) for batch in batches]
    before = _mean_loss(student, batches, targets)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(spec.seed)
        losses = list(_trained(student, list(zip(batches, targets, strict=True)), spec.seed, steps, rate, progress))
    after = _mean_loss(student, batches, targets) if losses else before
    if not after < before:
        student, after = Student(graph, spec, weights, input_scales or {}), before
    return Finetuned(*student.written_to(graph), losses, before, after)


def _trained(
    student: Student, data: Sequence[tuple[Sequence[Any], Sequence[Tensor]]], seed: int, steps: int, rate: float, progress: Progress
) -> Iterator[float]:
    """Train it; the loss of each step."""
    optimizer = torch.optim.Adam(student.groups(rate), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / max(1, steps))))
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for step in range(1, steps + 1):
        queue = queue or torch.randperm(len(data), generator=order).tolist()
        batch, target = data[queue.pop()]
        loss = _loss(student(batch), target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NormfuseError(
                f"fine-tuning: the loss is {value} at step {step} of {steps}; lower the rate ({rate:g}), "
                "or look for NaN and infinity in the calibration data"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, value)
        yield value


def _targets(graph: Graph, batch: Sequence[Any]) -> list[Tensor]:
    return [t.detach() for t in evaluate(graph, batch, exact=False)]


@torch.no_grad()
def _mean_loss(student: Student, batches: Sequence[Sequence[Any]], targets: Sequence[Sequence[Tensor]]) -> float:
    return sum(float(_loss(student(b), t)) for b, t in zip(batches, targets, strict=True)) / len(batches)


def _loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean over the floating outputs of |y − t|² / |t − mean t|²."""
    terms = [
        (y - t).square().sum() / (t - t.mean()).square().sum().clamp(min=1e-12)
        for y, t in zip(found, wanted, strict=True)
        if t.is_floating_point() and t.numel()
    ]
    if not terms:
        raise UsageError("fine-tuning: the model has no floating-point output to compare")
    return torch.stack(terms).mean()
