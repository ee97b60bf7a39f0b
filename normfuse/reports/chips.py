"""The operators of a block in a row, with what is gone and what is new marked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from normfuse.reports.answer import kind_in_words
from normfuse.reports.model import Block

__all__ = ["Chip", "before_and_after"]

_WORDS = {
    "scaled_dot_product_attention": "attention", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv", "hardtanh": "clip",
    "addmm": "linear",    "adaptive_avg_pool2d": "avg pool", "max_pool2d": "max pool", "avg_pool2d": "avg pool",
}  # fmt: skip
_NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")
_OURS = "normfuse::"
_MOST = 40  # chips in a row


@dataclass(frozen=True)
class Chip:
    """One operator, or several alike in a row; `tone` is its class on the page."""

    text: str
    tone: str = ""


def before_and_after(block: Block) -> tuple[tuple[Chip, ...], tuple[Chip, ...]]:
    """Both rows of a block."""
    steps = difflib.SequenceMatcher(None, block.before, block.after, autojunk=False).get_opcodes()
    gone, new = set(), set()
    for kind, a, b, c, d in steps:
        if kind != "equal":
            gone |= set(range(a, b))
            new |= set(range(c, d))
    before = ((name, "gone" if i in gone else "") for i, name in enumerate(block.before))
    after = ((name, "new" if i in new else "") for i, name in enumerate(block.after))
    return tuple(_row(before)), tuple(_row(after))


def _row(operators: Iterable[tuple[str, str]]) -> Iterator[Chip]:
    runs: list[tuple[str, str, int]] = []
    for name, tone in operators:
        if runs and runs[-1][:2] == (name, tone):
            runs[-1] = (name, tone, runs[-1][2] + 1)
        else:
            runs.append((name, tone, 1))
    for name, tone, count in runs[:_MOST]:
        kind = "int" if name.startswith(f"{_OURS}shiftquant") else "norm" if name in _NORMS else ""
        yield Chip(_in_words(name) + (f" ×{count}" if count > 1 else ""), " ".join(filter(None, (kind, tone))))
    if len(runs) > _MOST:
        yield Chip(f"… {len(runs) - _MOST} more")


def _in_words(name: str) -> str:
    """`LayerNorm` for `layer_norm`, `linear in integers` for `normfuse::shiftquant_linear`."""
    if name in _NORMS:
        return kind_in_words(name)
    if name.startswith(f"{_OURS}shiftquant_"):
        return f"{name.removeprefix(f'{_OURS}shiftquant_').replace('_', ' ').removesuffix('2d')} in integers"
    return _WORDS.get(name, name.removeprefix(_OURS).replace("_", " "))
