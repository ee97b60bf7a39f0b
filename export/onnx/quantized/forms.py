"""Which form the quantized layers of a file get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from normfuse.errors import UsageError
from normfuse.export.lowering.layers import Layer
from normfuse.export.onnx.program import Program
from normfuse.export.onnx.quantized.attention import float_masks
from normfuse.export.onnx.quantized.form import INT4_OPSET, Form, Wanted
from normfuse.export.onnx.quantized.integer import Integer
from normfuse.export.onnx.quantized.native import Native
from normfuse.export.onnx.quantized.qdq import Qdq
from normfuse.export.onnx.quantized.weight_only import WeightOnly
from normfuse.export.targets import QUANTIZED_FORMS, Target
from normfuse.ir.passes import Pass

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS", "lower_quantized", "passes_of", "possible_forms"]

#: The forms by name.
FORMS: dict[str, Form] = {form.name: form for form in (Native(), Integer(), Qdq(), WeightOnly())}


def possible_forms(layers: Sequence[Layer], target: Target, opset: int, form: str, *, int4: bool = False) -> tuple[str, ...]:
    """The forms to try for these quantized layers, the plain one first; () without any.

    "auto" is what the target likes best of the forms that can express the model: several where only a measurement can tell.

    Raises:
        UsageError: there is no such form, or it cannot express the model for the target.
    """
    if form not in ("auto", *QUANTIZED_FORMS):
        raise UsageError(f"unknown form {form!r}: expected auto, {', '.join(QUANTIZED_FORMS)}")
    if not layers:
        if form != "auto" or int4:
            asked = f"form={form!r}" if form != "auto" else "int4_initializers=True"
            raise UsageError(
                f"{asked}: the model has no quantized layers; pass quantize=normfuse.ShiftQuant() to normfuse.optimize"
            )
        return ()
    if form != "auto" and form not in target.quantized:
        raise UsageError(f"form={form!r}: target {target.name!r} does not take it; use {_one_of(target.quantized)}")
    packs = form != "auto" and FORMS[form].packs
    if int4 and (packs or opset < INT4_OPSET):
        why = f"the form {form!r} packs its weights anyway" if packs else f"INT4 needs opset {INT4_OPSET}, not {opset}"
        raise UsageError(f"int4_initializers=True: {why}")
    ranks: list[tuple[str, ...]] = [(form,)] if form != "auto" else [*target.forms]
    refused = {f: FORMS[f].refuses(layers, Wanted(target, opset, int4)) for rank in ranks for f in rank}
    if form == "auto":
        refused |= {f: "" for f in refused if not FORMS[f].offers_itself()}
        if int4:  # what packs anyway comes last: it takes no notice of what was asked for
            ranks.sort(key=lambda rank: any(FORMS[f].packs for f in rank))
    for rank in ranks:
        possible = tuple(f for f in rank if refused[f] is None)
        if possible:
            return possible
    raise UsageError(next(why for why in reversed(refused.values()) if why))


def passes_of(forms: Sequence[str]) -> tuple[Pass, ...]:
    """What is done to the graph before it is written in one of `forms`: what all of them want."""
    wanted = [FORMS[form].passes for form in forms]
    return wanted[0] if wanted and all(passes == wanted[0] for passes in wanted) else ()


def _one_of(forms: tuple[str, ...]) -> str:
    return " or ".join(f"form={f!r}" for f in forms)


def lower_quantized(
    model: ir.Model, form: str, target: Target, opset: int, *, int4: bool = False, program: Program | None = None
) -> None:
    """Write the quantized layers of `model` in `form`, in place; `program` is what it was translated from."""
    float_masks(model)
    FORMS[form].write(model, Wanted(target, opset, int4, program))
