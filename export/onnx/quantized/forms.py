"""Which form the quantized layers of a file get."""

from __future__ import annotations

from typing import Any

from normfuse import native
from normfuse.errors import UsageError
from normfuse.export.onnx.quantized.attention import float_masks, place_attention
from normfuse.export.onnx.quantized.fuse import fuse
from normfuse.export.onnx.quantized.integer import lower_integer
from normfuse.export.onnx.quantized.native import MIN_NATIVE_OPSET, lower_native
from normfuse.export.onnx.quantized.qdq import check_static, lower_qdq
from normfuse.export.onnx.quantized.sites import sites
from normfuse.export.onnx.quantized.weight_only import INT4_OPSET, check_weight_only, lower_weight_only
from normfuse.export.targets import QUANTIZED_FORMS, Target

__all__ = ["is_quantized", "lower_quantized", "possible_forms"]


def is_quantized(model: Any) -> bool:
    """The translated model has quantized layers."""
    return next(sites(model), None) is not None


def possible_forms(model: Any, target: Target, opset: int, form: str, *, int4: bool = False) -> tuple[str, ...]:
    """The forms to try, the plain one first; () for a model without quantized layers.

    "auto" is, for ONNX Runtime, the native form if the kernel library is here, else whichever of the others is faster; for other
    targets QDQ if all scales are static and all codes fit in int8, else integers, or weights alone where integers are not taken.

    Raises:
        UsageError: there is no such form, or it cannot express the model for the target.
    """
    if form not in ("auto", *QUANTIZED_FORMS):
        raise UsageError(f"unknown form {form!r}: expected auto, {', '.join(QUANTIZED_FORMS)}")
    if not is_quantized(model):
        if form != "auto" or int4:
            asked = f"form={form!r}" if form != "auto" else "int4_initializers=True"
            raise UsageError(
                f"{asked}: the model has no quantized layers; pass quantize=normfuse.ShiftQuant() to normfuse.optimize"
            )
        return ()
    if form != "auto" and form not in target.quantized:
        raise UsageError(f"form={form!r}: target {target.name!r} does not take it; use {_one_of(target.quantized)}")
    if int4 and (form in ("native", "weight_only") or opset < INT4_OPSET):
        packs = form in ("native", "weight_only")
        why = f"the form {form!r} packs its weights anyway" if packs else f"INT4 needs opset {INT4_OPSET}, not {opset}"
        raise UsageError(f"int4_initializers=True: {why}")
    if form == "native" and opset < MIN_NATIVE_OPSET:
        raise UsageError(f"form='native' needs opset {MIN_NATIVE_OPSET}, not {opset}; use form='integer' or form='qdq'")
    if form == "qdq":
        check_static(model, unsigned=target.contrib, others=target.quantized)
    if form == "weight_only":
        check_weight_only(model, others=target.quantized)
    if form != "auto":
        return (form,)
    if target.contrib and native.available() and opset >= MIN_NATIVE_OPSET and not int4:
        return ("native",)
    try:
        check_static(model, unsigned=target.contrib, others=target.quantized)
    except UsageError:
        if "integer" in target.quantized:
            return ("integer",)
        check_weight_only(model, others=target.quantized)
        return ("weight_only",)
    return ("integer", "qdq") if target.contrib else ("qdq",)


def _one_of(forms: tuple[str, ...]) -> str:
    return " or ".join(f"form={f!r}" for f in forms)


def lower_quantized(model: Any, form: str, target: Target, opset: int, *, int4: bool = False) -> None:
    """Write the quantized layers of `model` in `form`, in place."""
    float_masks(model)
    if form == "native":
        place_attention(model)
        lower_native(model)
        fuse(model)
    elif form == "qdq":
        lower_qdq(model, unsigned=target.contrib, int4=int4, one_scale=target.name == "tensorrt")
    elif form == "weight_only":
        lower_weight_only(model, opset=opset)
    else:
        lower_integer(model, int4=int4)
