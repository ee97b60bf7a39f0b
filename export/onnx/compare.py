"""How far the file is from the module, on the example inputs and on others like them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfuse.described import described, dtype_name
from normfuse.errors import ExportError
from normfuse.export.onnx.out_of_range import finite, within_range
from normfuse.export.onnx.program import Program
from normfuse.export.session import Session
from normfuse.numerics.compare import TOLERANCE, distance, like, magnitude, resembling
from normfuse.numerics.compare import sqnr as in_decibels
from normfuse.numerics.modes import Stirred
from normfuse.proof.proof import moves
from normfuse.reports.model import Error

__all__ = ["MIN_SQNR", "TOLERANCE", "Comparison", "compare", "deviation", "sqnr", "tolerance_for"]

log = logging.getLogger(__name__)

#: A quantized model is held to this SQNR in dB against the module, or to `MARGIN` below what roundings alone do to it.
MIN_SQNR = 40.0
MARGIN = 10.0
_ROUNDING = 2.0**-22  # relative; two units in the last place of a float32
_ROUNDING_HALF = 2.0**-9
_ORDINARY = "standard normal"
_AGAIN = 6  # a file below that may have met the one value on a tie that a single trial of roundings did not: more and larger ones


def tolerance_for(dtypes: Sequence[torch.dtype]) -> float:
    """The bound for a model that computes in `dtypes`: that of the coarsest."""
    return max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=TOLERANCE[torch.float32])


@dataclass(frozen=True)
class Comparison:
    """How far a file is from its module.

    Attributes:
        error: the largest deviation.
        sqnr: the least SQNR, in dB.
        wanted: the SQNR to ask for; means nothing for a model that is not quantized.
        notes: a sentence on values that could not be compared, if there are any.
        fault: where the file is NaN or infinite and the module is not, as a sentence; empty where it nowhere is so.
    """

    error: Error
    sqnr: float
    wanted: float
    notes: tuple[str, ...] = ()
    fault: str = ""


def compare(
    program: Program, session: Session, *, quantized: bool = False, half: bool = False, bound: float = math.inf
) -> Comparison:
    """How far the file in `session` is from the module: on the example inputs, on random ones like them, and, where axes may vary,
    at another size; on standard normal ones too, if the module gave no finite value on the others.

    A deviation above `bound` is held against how far the module itself moves when its operators round another way: values that
    cancel, scores that decide between candidates. It is then relative to the scale at which those moves keep the bound.

    Module and file round floats in front of a quantization, not always alike, and a value on a tie then gets the neighbouring
    code. What that leads to depends on the model, its depth and its widths: it is measured, on the module with all its floats
    changed by roundings.

    Args:
        program: what was written.
        session: the file, opened.
        quantized: it rounds to integers on its way.
        half: it was converted to float16; its inputs and outputs may be, too.
        bound: what the relative deviation will be held to.

    Raises:
        ExportError: the runtime fails on inputs on which the module runs, or gives other shapes.
    """
    torch.manual_seed(0)
    worst: Error | None = None
    rounding = _ROUNDING_HALF if half else _ROUNDING
    taken = {i.name: i.dtype for i in session.inputs} if half else {}
    quality, wanted = math.inf, MIN_SQNR
    left_out, fault = "", ""
    compared: list[str] = []  # trials with a value that can be
    for label, flat in _trials(program):
        if label == _ORDINARY and compared:
            continue
        try:
            expected = program.reference(flat)
        except Exception as e:
            if label == "example":
                raise
            log.info("the module itself does not run on %s inputs: %s", label, e)
            continue
        feeds = {k: v.half() if taken.get(k) == "float16" else v for k, v in program.feeds(flat).items()}
        got = session.outputs(feeds)
        found = [got[name].to(want.dtype) if half else got[name] for name, want in zip(program.outputs, expected, strict=True)]
        error = deviation(expected, found, program.outputs, label)
        compared += [label] if finite(expected) else []
        if math.isinf(error.max_abs):
            judged = within_range(program, flat, expected, found, label)
            found, left_out, fault = judged.found, left_out or judged.note, fault or judged.fault
            error = deviation(expected, found, program.outputs, label)
        if error.max_rel > bound:
            error = deviation(expected, found, program.outputs, label, _floors(program, flat, expected, bound, half=half))
        quality = min(quality, sqnr(expected, found))
        if quantized:
            wanted = min(wanted, sqnr(expected, program.reference(flat, rounding=rounding)) - MARGIN)
            for _ in range(_AGAIN if sqnr(expected, found) < wanted else 0):
                wanted = min(wanted, sqnr(expected, program.reference(flat, rounding=4 * rounding)) - MARGIN)
        log.debug("%s inputs: %s, %.1f dB", label, error, quality)
        worst = error | worst
    assert worst is not None
    if not compared:
        left_out = "nothing was compared: on the example inputs and on random ones all outputs are NaN or infinite"
    elif compared == [_ORDINARY]:
        why = left_out or "on example inputs all outputs of the module are NaN or infinite"
        left_out = f"{why}; compared on {_ORDINARY} inputs instead"
    return Comparison(worst, quality, wanted, (left_out,) if left_out else (), fault)


def sqnr(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The least 10 log10(Σ expected² / Σ difference²) of the outputs, in dB; infinite for equal ones, -infinite where only one of
    the two is finite."""
    found = []
    for a, b in zip(expected, got, strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        x, y = a.detach().double(), b.detach().double()
        same = (x == y) | (x.isnan() & y.isnan())
        noise = float(torch.where(same, 0.0, x - y).square().sum())
        signal = float(torch.where(x.isfinite(), x, 0.0).square().sum())
        found.append(in_decibels(signal, noise))
    return min(found, default=math.inf)


def deviation(
    expected: Sequence[Tensor],
    got: Sequence[Tensor],
    names: Sequence[str],
    label: str = "example",
    floors: Sequence[float] | None = None,
) -> Error:
    """Largest difference over all outputs; NaN and infinity must stand at the same places.

    Outputs that are no floating point count the fraction of values that differ.

    Args:
        expected, got: outputs of the module and of the file.
        names: of the outputs.
        label: of the inputs, for the error.
        floors: for each output, the least scale that its difference is relative to.

    Raises:
        ExportError: a shape or a dtype differs.
    """
    worst = Error(0.0, 0.0, "float32")
    dtypes = []
    for name, want, have, floor in zip(names, expected, got, floors or [0.0] * len(names), strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            raise ExportError(
                f"output {name} on {label} inputs is {described(have)} in the file and {described(want)} in the module"
            )
        if want.numel() == 0:
            continue
        if want.is_floating_point():
            dtypes.append(want.dtype)
            gap, scale = distance(want, have), magnitude(want)
            scale = max(scale, torch.finfo(want.dtype).tiny)  # what is smaller is rounded as coarsely
        else:
            gap, scale = float((want != have).float().mean()), 1.0
        scale = max(scale, floor)
        worst = worst | Error(gap, 0.0 if math.isinf(floor) or gap == 0 else gap / scale if scale else gap, worst.dtype)
    coarsest = max(dtypes, key=lambda d: TOLERANCE.get(d, 0.0), default=torch.float32)
    return Error(worst.max_abs, worst.max_rel, dtype_name(coarsest))


def _floors(program: Program, flat: Sequence[Any], expected: Sequence[Tensor], bound: float, *, half: bool) -> list[float]:
    """The scale of each output at which the module's own moves, when it rounds another way, are within the bound."""
    unit = torch.finfo(torch.float16).eps if half else None

    def moved(seed: int) -> list[Tensor]:
        with Stirred(seed, unit):
            return program.reference(flat)

    return [move / bound if bound else 0.0 for move in moves(expected, moved)]


def _trials(program: Program) -> Iterator[tuple[str, list[Any]]]:
    flat = list(program.flat_inputs())
    yield "example", flat
    yield "random", like(flat, seed=0)
    sizes = _other_sizes(program, flat)
    if sizes is not None:
        generator = torch.Generator("cpu").manual_seed(1)
        pairs = zip(flat, sizes, strict=True)
        yield "resized", [resembling(leaf, generator, size) if isinstance(leaf, Tensor) else leaf for leaf, size in pairs]
    yield _ORDINARY, [_ordinary(leaf) for leaf in flat]


def _ordinary(leaf: Any) -> Any:
    """Standard normal values in the place of floats."""
    return torch.randn(leaf.shape).to(leaf.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _other_sizes(program: Program, flat: Sequence[Any]) -> list[tuple[int, ...]] | None:
    """Shapes of the inputs with every varying size one larger (or smaller, where its range ends); None without such sizes."""
    exported = program.exported
    signature = exported.graph_signature
    metas = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    names = [s.arg.name for s in signature.input_specs if s.kind == torch.export.graph_signature.InputKind.USER_INPUT]
    chosen: dict[Any, int] = {}
    shapes: list[tuple[Any, ...]] = []
    for name, leaf in zip(names, flat, strict=True):
        value = metas.get(name)
        if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
            shapes.append(())
            continue
        shapes.append(tuple(value.shape))
        for size, now in zip(value.shape, leaf.shape, strict=True):
            if isinstance(size, torch.SymInt):
                chosen |= _next(size.node.expr, now, exported.range_constraints)
    expressions = [d.node.expr for shape in shapes for d in shape if isinstance(d, torch.SymInt)]
    if not chosen or any(not e.free_symbols <= chosen.keys() for e in expressions):
        return None
    return [tuple(int(d.node.expr.subs(chosen)) if isinstance(d, torch.SymInt) else d for d in shape) for shape in shapes]


def _next(size: Any, now: int, ranges: Any) -> dict[Any, int]:
    """The symbol that a size depends on, one larger than now, or smaller where its range ends; a size may be a multiple of it."""
    import sympy  # comes with torch, whose sizes are its expressions

    symbols = size.free_symbols
    if len(symbols) != 1:
        return {}
    (symbol,) = symbols
    values = sympy.solve(size - now, symbol)
    if len(values) != 1 or not values[0].is_integer:
        return {}
    value, bounds = int(values[0]), ranges.get(symbol)
    return {symbol: value + 1 if bounds is None or value + 1 <= bounds.upper else value - 1}
