"""How far axes can vary: torch finds it by tracing, and the result is read back under the names that the user gave.

torch.export takes a `Dim` only with limits that a model keeps, and says one guard at a time which it does not. With `Dim.AUTO`
it finds limits itself, silently fixing what the model fixes; that is read back here, and told.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from normfuse.app.dynamic_axes import Axis, Free, input_names
from normfuse.capture.capture import capture, flat_inputs
from normfuse.errors import UsageError
from normfuse.surroundings import undisturbed

__all__ = ["found_shapes"]

log = logging.getLogger(__name__)

_UNBOUNDED = 1 << 62
_SMALLEST = 2  # torch takes sizes 0 and 1 for fixed, so that no found range reaches below
_TORCH = str(Path(torch.__file__).parent)


def found_shapes(model: nn.Module, example_inputs: Any, free: Free) -> dict[str, Any]:
    """`dynamic_shapes` for `free` with the ranges that torch finds in `model`.

    Axes that need nothing but a range are `Dim`s; the others, which torch guards in ways that no `Dim` can say, are hints that
    carry the name.

    Raises:
        UsageError: an axis is fixed by the model, or cannot go as far as the user asked.
        CaptureError: the model cannot be captured at all.
    """

    def hint(_input: str, _number: int, axis: Axis) -> Any:
        return Dim.AUTO(min=axis.min, max=axis.max)

    with undisturbed(), _specializations() as fixed:
        captured = capture(model, example_inputs, free.shapes(hint))
    names = input_names(free.inputs)
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    values = flat_inputs(captured.gm, captured.args, captured.kwargs or {})
    traced = {
        names[id(value)]: node.meta["val"]
        for node, value in zip(placeholders, values, strict=True)
        if isinstance(value, Tensor) and id(value) in names
    }
    dims: dict[str, Any] = {}

    def found(name: str, number: int, axis: Axis) -> Any:
        low, high, guarded = _range(traced[name].shape[number])
        if low == high:
            raise UsageError(_why_fixed(name, number, axis, low, fixed))
        _check_range(axis, low, high)
        low = max(low, axis.min or 0) if low > _SMALLEST or axis.min else 0
        log.info("%s (axis %d of %s): %d to %s", axis.name, number, name, low, high or "any size")
        if guarded:
            named = Dim.DYNAMIC(min=low or None, max=high)
            named.__name__ = axis.name  # where the exporter looks for the name of a `Dim`
            return named
        return dims.setdefault(axis.name, Dim(axis.name, min=low or None, max=high))

    return free.shapes(found)


def _range(size: Any) -> tuple[int, int | None, bool]:
    """(smallest, largest, is there more to it than a range) of a size; a number where it is fixed."""
    if isinstance(size, int):
        return size, size, False
    expression, shapes = size.node.expr, size.node.shape_env
    bounds = shapes.bound_sympy(expression)
    high = None if bounds.upper > _UNBOUNDED else int(bounds.upper)
    return max(int(bounds.lower), 0), high, not expression.is_Symbol or any(_says_more(g.expr, expression) for g in shapes.guards)


def _says_more(guard: Any, symbol: Any) -> bool:
    """More than a bound on `symbol` alone, or its equality with another size?"""
    if symbol not in guard.free_symbols:
        return False
    relation, sides = getattr(guard, "rel_op", ""), getattr(guard, "args", ())
    if relation == "==":
        return not all(side.is_Symbol for side in sides)
    return relation not in ("<", "<=", ">", ">=") or not all(side == symbol or side.is_number for side in sides)


def _check_range(axis: Axis, low: int, high: int | None) -> None:
    short = axis.max is not None and high is not None and high < axis.max
    if short or (axis.min is not None and low > max(axis.min, _SMALLEST)):
        least = low if low > _SMALLEST else axis.min
        written = f"{axis.name}{f':{least}' if least else ''}..{'' if high is None else high}"
        where = written if axis.input is None else f"{axis.input}:{axis.axis}={written}"
        raise UsageError(f"{axis.flag}: the model takes {low} to {high or 'any size'} there; write --dynamic {where}")


# -- why an axis is fixed --------------------------------------------------------------------------------------------------


@dataclass
class _Watch(logging.Handler):
    """Hears from torch which sizes it fixes, and looks up the call stack for the line of the model that made it do so."""

    symbols: dict[str, str] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(logging.INFO)

    def __hash__(self) -> int:
        return id(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if (made := re.match(r"create_symbol (\w+) = \d+ for L(.+?)\.size\(\)\[(\d+)\]", text)) is not None:
            parts = re.findall(r"\['?([^'\]]+)'?\]", made[2])
            self.symbols[made[1]] = f"{'.'.join(parts)}:{made[3]}"
        elif (fixed := re.match(r"set_replacement (\w+) = \d+ ", text)) is not None and fixed[1] in self.symbols:
            self.lines.setdefault(self.symbols[fixed[1]], _line_of_the_model())


@contextmanager
def _specializations() -> Iterator[dict[str, str]]:
    """Yields, for `input:axis`, where the model fixed that size; filled while the block runs."""
    heard = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, propagate, disabled = heard.level, heard.propagate, heard.manager.disable
    watch = _Watch()
    heard.addHandler(watch)
    heard.setLevel(logging.INFO)
    heard.propagate = False
    others = [h for h in heard.handlers if h is not watch]
    for other in others:
        heard.removeHandler(other)
    logging.disable(logging.NOTSET)
    try:
        yield watch.lines
    finally:
        heard.removeHandler(watch)
        for other in others:
            heard.addHandler(other)
        heard.setLevel(level)
        heard.propagate = propagate
        logging.disable(disabled)


def _line_of_the_model() -> str:
    """The innermost line on the stack that is no part of torch's machinery: of a module, or outside of torch."""
    frame = sys._getframe()
    here = Path(__file__).parent
    while frame.f_back is not None:
        frame = frame.f_back
        file = Path(frame.f_code.co_filename)
        if not file.is_file() or file.is_relative_to(here) or file.parent.name == "logging":
            continue
        owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))  # self, whatever it is called
        layer = isinstance(owner, nn.Module) and file.is_relative_to(Path(_TORCH, "nn")) and file.name != "module.py"
        if layer or not file.is_relative_to(_TORCH):
            where = f"{type(owner).__name__}.{frame.f_code.co_name}" if isinstance(owner, nn.Module) else frame.f_code.co_name
            return f"{where} ({file.name}:{frame.f_lineno})"
    return ""


def _why_fixed(name: str, number: int, axis: Axis, size: int, lines: dict[str, str]) -> str:
    at = lines.get(f"{name}:{number}", "")
    where = f", in {at}" if at else ""
    return (
        f"{axis.flag}: the model fixes axis {number} of {name} at {size}{where}; leave {axis.name} out, or change the model there"
    )
