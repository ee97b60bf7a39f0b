"""Why a model could not be captured, in a few lines of the user's language; torch says it in up to four kilobytes."""

from __future__ import annotations

import re
import traceback
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.utils import _pytree as pytree

from normfuse.described import described, first_line

__all__ = ["IN_PARTS", "decides_by_values", "explained"]

IN_PARTS = "; it was optimized by parts, and what stands between them stays Python, which no file holds: use the module in Python"
"""What is to be said behind the reason where a result of `optimize(partial=True)` is to become a file."""

_LONGEST = 300  # characters of torch's own words
_INSTALLED = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def explained(name: str, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """One message: the inputs, the cause, the line of the model, and what to state instead where torch knows it.

    Args:
        name: of the model.
        error: what torch.export raised.
        args, kwargs: example inputs.
    """
    shapes = ", ".join(described(v) for v in pytree.tree_leaves((args, kwargs)))
    return f"{name} could not be captured with inputs ({shapes}): {_cause(error)}{_place(error)}"


def _cause(error: Exception) -> str:
    text = str(error)
    limits = _suggestions(text)
    if limits:
        return f"the model does not take every size that dynamic_shapes leaves free. Give these limits instead:\n  {limits}"
    fixed = re.findall(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", text)
    if fixed:
        sizes = ", ".join(f"{_size(where)} is always {n}" for where, n in fixed)
        return f"{sizes} in this model: leave it out of dynamic_shapes, or write Dim.AUTO there"
    if decides_by_values(error):
        return (
            "it decides by the values of a tensor (if, while, int(...), a size that is computed), which no graph can: "
            "write it with torch.where or torch.cond"
        )
    return f"{type(error).__name__}: {first_line(error)}"


def decides_by_values(error: BaseException | None) -> bool:
    """Did torch come to an `if` on a tensor, an `int(...)` of one, or another size that it could only compute?"""
    return type(error).__name__ == "GuardOnDataDependentSymNode" or "data-dependent" in str(error)


def _suggestions(text: str) -> str:
    """`h = Dim('h', min=5)` and `t = 4`, as torch suggests them."""
    _, found, after = text.partition("Suggested fixes:")
    lines = [line.strip() for line in after.splitlines()] if found else []
    fixes = [line for line in lines if re.fullmatch(r"\w+ = [^;]{1,100}", line)]
    return "\n  ".join(fixes[:5])


def _size(where: str) -> str:
    """`L['x'].size()[1]` -> `x.shape[1]`"""
    return re.sub(r"^L\['(\w+)'\](.*?)\.size\(\)", r"\1\2.shape", where)


def _place(error: BaseException) -> str:
    """The last line of the traceback that is the user's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*_INSTALLED, "<"))]
    frames = [
        f for f in frames if f"{PurePath('torch')}" not in PurePath(f.filename).parts and f.name in ("forward", "__call__")
    ] or []
    return f" ({PurePath(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
