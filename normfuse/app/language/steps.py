"""Steps that the folder of every language model is made by."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normfuse.api import optimize
from normfuse.app.language.options import DecoderOptions
from normfuse.errors import ExportError, UsageError
from normfuse.export.decoder.blocks import Blocks, parse_blocks
from normfuse.export.decoder.folder import DecoderFolder
from normfuse.ir.constants import weights_shared
from normfuse.passes import PassName
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.words import parse_quantize
from normfuse.reports.record import report

if TYPE_CHECKING:
    from torch import fx

__all__ = ["FOR_BLOCKS", "facts", "in_float32", "optimized", "prompts", "sizes", "stored", "untouched", "weights"]

SAMPLES = (
    "The quick brown fox jumps over the lazy dog, and then",
    "In 1998, a small group of engineers began to write a program that reads a model and writes a faster one. They found that",
    "Once upon a time",
)
#: Before weights are stored in blocks. A norm's gain in the weight behind it would spread the weights of a block, which share a
#: scale, and a runtime multiplies by it anyway: so gains stay where they are.
FOR_BLOCKS: tuple[PassName, ...] = ("bake", "cleanup", "recognise", "select", "cleanup")


def stored(quantize: Any) -> tuple[Blocks | None, ShiftQuant | None]:
    """What the weights become: blocks, or layers of normfuse's kernels."""
    if isinstance(quantize, ShiftQuant):
        return None, quantize
    if quantize is None or isinstance(quantize, Blocks):
        return quantize, None
    if not isinstance(quantize, str):
        raise UsageError(
            f"quantize={quantize!r}: expected 'w4' or 'w8' (weights in blocks), a normfuse.ShiftQuant, or its words 'w4a8'"
        )
    found = parse_blocks(quantize)
    return (found, None) if found is not None else (None, parse_quantize(quantize))


def optimized(module: Any, how: DecoderOptions, blocks: Blocks | None, spec: ShiftQuant | None) -> fx.GraphModule:
    """What `normfuse.optimize` makes of a module with flat caches; weights that stay as they are are those of the module."""
    passes = FOR_BLOCKS if how.passes is None and blocks is not None else how.passes
    with weights_shared():
        return optimize(
            module, module.example(), dynamic_shapes=module.dynamic_shapes(), passes=passes, verify=how.verify, quantize=spec,
        )  # fmt: skip


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Nobody writes into the weights of `model` within the block: what is held against it later shares them.

    Raises:
        ExportError: somebody did.
    """
    tensors = [*model.parameters(), *model.buffers()]
    before = [t._version for t in tensors]
    yield
    if [t._version for t in tensors] != before:
        raise ExportError(f"weights of {type(model).__name__} were written into while it was exported; please report it")


def weights(blocks: Blocks | None, spec: ShiftQuant | None, form: str | None, *graphs: fx.GraphModule) -> str | None:
    """What the folder says of its weights; `form` is that of quantized layers."""
    if spec is None:
        return None if blocks is None else str(blocks)
    layers = [layer for graph in graphs for layer in report(graph).quantization]
    count = sum(not layer.kept for layer in layers)
    return f"W{spec.weight_bits}A{spec.activation_bits} in {count} of {len(layers)} layers ({form})"


def in_float32(model: nn.Module, *, in_place: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, or a copy in float32 (itself, `in_place`): the CPU's attention with a cache computes in nothing else."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode: call .eval() on it")
    if dtypes <= {torch.float32}:
        return model, ()
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    return (model if in_place else copy.deepcopy(model)).float(), (
        f"the model is in {names}; the folder computes in float32 and is held against that",
    )


def prompts(vocabulary: int, tokenizer: Any, texts: Sequence[str] = SAMPLES) -> list[list[int]]:
    """What a proof writes on from: sentences in the tokenizer's words, else random tokens."""
    if tokenizer is not None:
        found = [list(tokenizer(text)["input_ids"]) for text in texts]
        if all(row and max(row) < vocabulary for row in found):
            return found
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(min(3, vocabulary - 1), vocabulary, (n,), generator=generator).tolist() for n in (17, 30, 9)]


def sizes(work: Path) -> dict[str, int]:
    """Names and sizes of the files in a folder."""
    return {f.name: f.stat().st_size for f in sorted(work.iterdir())}


def facts(made: DecoderFolder, *graphs: fx.GraphModule) -> dict[str, Any]:
    """The content of `normfuse.json`."""
    import normfuse

    passes: Counter[str] = Counter()
    for graph in graphs:
        passes.update({p.name: len(p.applied) for p in report(graph).passes if p.applied})
    own = {k: v for k, v in made.manifest().items() if k != "path"}
    return {"normfuse": normfuse.__version__, **own, "passes": dict(passes)}
