"""Is a program that was converted to other dtypes still the function that was given?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.described import dtype_name, first_line
from normfuse.errors import ExportError
from normfuse.export.onnx.compare import MARGIN, MIN_SQNR, TOLERANCE, deviation, sqnr, tolerance_for
from normfuse.export.onnx.precision.recast import is_quantized_graph
from normfuse.export.onnx.precision.spelling import TORCH
from normfuse.export.onnx.program import Program
from normfuse.export.targets import Target
from normfuse.numerics.modes import Float64, Stirred
from normfuse.proof.proof import moves

__all__ = ["check_double", "in_another_dtype"]

log = logging.getLogger(__name__)

_TRIALS = 6


def in_another_dtype(found: Program, target: Target, asked: str | None, *, verify: bool) -> tuple[str, ...]:
    """What the user should know of a program that is in other dtypes than its module; () for one that is not.

    The converted program is held against the module as it was given, in float64, where both should agree but for the roundings of
    the converted one. Where the module has no float64 form, or decides by a rounding, it is held to the bound of its own dtype.

    Args:
        asked: the dtype that the user asked for; float16 and bfloat16 files are made of float32 programs afterwards.

    Raises:
        ExportError: it gives other outputs.
    """
    given = found.given
    if given is None:
        return ()
    before, after = dtype_name(found.dtype), dtype_name(TORCH[asked]) if asked else _now(found)
    if before == after and after != "bfloat16":
        text = "parts of the model compute in bfloat16, in the file in float32: ONNX Runtime has no bfloat16 kernels on the CPU"
    elif asked:
        text = f"exported in {after}, as asked; the model computes in {before}"
    elif is_quantized_graph(found.exported.graph_module):
        text = f"exported in float32, not in {before}: quantized layers are scaled in float32"
    else:
        text = f"exported in {after}: the model computes in {before}, and {target.runtime} lacks {before} kernels"
    if _inputs_change(given, found) and asked not in ("fp16", "bf16"):
        text += f"; float inputs are {after}"
    if not verify:
        return (f"{text}; not compared: verify=False",)
    gap = _apart(given, found)
    return (f"{text} ({gap:.1e} relative from the model as it was given)" if gap is not None else text,)


def check_double(model: Any, asked: str | None, target: Target) -> None:
    """Complain before any work about a float64 file that the runtime could not run.

    Raises:
        ExportError: ONNX Runtime has no float64 kernel for a convolution of the model.
    """
    if asked != "fp64" or "fp64" in target.lacks or not isinstance(model, nn.Module):
        return
    name = next((n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.conv._ConvNd)), None)
    if name is not None:
        raise ExportError(f"ONNX Runtime has no float64 kernel for convolutions on the CPU ({name}): export the model in fp32")


def _now(found: Program) -> str:
    held = [t.dtype for t in found.exported.state_dict.values() if t.is_floating_point()]
    wide = found.dtype if found.dtype in held else torch.float64 if torch.float64 in held else torch.float32
    return dtype_name(wide if wide is not torch.bfloat16 else torch.float32)


def _inputs_change(given: Program, found: Program) -> bool:
    pairs = zip(given.flat_inputs(), found.flat_inputs(), strict=True)
    return any(isinstance(a, Tensor) and a.dtype != b.dtype for a, b in pairs)


def _apart(given: Program, found: Program) -> float | None:
    """The relative difference in the dtype of the module, None for a quantized one; held to a bound."""
    flat = given.flat_inputs()
    want, have = given.reference(flat), found.reference(found.flat_inputs())
    own = [b.to(a.dtype) if a.is_floating_point() else b for a, b in zip(want, have, strict=True)]
    if is_quantized_graph(found.exported.graph_module):  # a rounding in front of a quantization moves a code
        quality, least = sqnr(want, own), MIN_SQNR
        for seed in range(_TRIALS):  # the later ones are larger: one code that moves is all that it takes
            if quality >= least:
                break
            least = min(least, sqnr(want, _stirred(given, flat, seed, 4.0 if seed else 1.0)) - MARGIN)
        if quality < least:
            raise ExportError(
                f"in {_now(found)} the quantized model has {quality:.0f} dB against the one in {dtype_name(found.dtype)}, and "
                f"{least:.0f} are expected: nothing was written"
            )
        return None
    error = deviation(want, own, found.outputs)
    if _same_in_float64(given, flat, have):
        return error.max_rel
    bound = tolerance_for([t.dtype for t in want])
    if error.max_rel > bound:
        floors = [m / bound for m in moves(want, lambda seed: _stirred(given, flat, seed))]
        error = deviation(want, own, found.outputs, floors=floors)
    if not error.max_rel <= bound:
        raise ExportError(
            f"in {_now(found)} the model deviates from itself in {dtype_name(found.dtype)} by {error.max_rel:.1e} relative, above "
            f"the bound {bound:.0e}; nothing was written. Something in it depends on that dtype: convert the model yourself and "
            "see whether its results are still right"
        )
    return error.max_rel


def _same_in_float64(given: Program, flat: Sequence[Any], have: Sequence[Tensor]) -> bool:
    try:
        with Float64():
            exact = given.reference(flat)
    except Exception as e:  # an operator without a float64 form
        log.debug("the module does not run in float64: %s", first_line(e))
        return False
    bound = max((TOLERANCE.get(t.dtype, 0.0) for t in have), default=math.inf)
    try:
        return deviation([t.to(b.dtype) for t, b in zip(exact, have, strict=True)], have, given.outputs).max_rel <= bound
    except ExportError:  # sizes that depend on values
        return False


def _stirred(given: Program, flat: Sequence[Any], seed: int, times: float = 1.0) -> list[Tensor]:
    """Outputs of the module with roundings of the coarser of the two dtypes."""
    unit = max(torch.finfo(d).eps for d in (given.dtype, torch.float32))
    with Stirred(seed, times * unit):
        return given.reference(flat)
