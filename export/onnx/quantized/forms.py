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
from normfuse.export.targets import QUANTIZED_FORMS, Target

__all__ = ["is_quantized", "lower_quantized", "possible_forms"]

_INT4_OPSET = 21


def is_quantized(model: Any) -> bool:
    """The translated model has quantized layers."""
    return next(sites(model), None) is not None


def possible_forms(model: Any, target: Target, opset: int, form: str, *, int4: bool = False) -> tuple[str, ...]:
    """The forms to try, the plain one first; () for a model without quantized layers.

    "auto" is, for ONNX Runtime, the native form if the kernel library is here, else whichever of the others is faster; for other
    targets QDQ if all scales are static, else integers.

    Raises:
        UsageError: there is no such form, or it cannot express the model for the target.
    """
    if form not in ("auto", *QUANTIZED_FORMS):
        raise UsageError(f"unknown form {form!r}: expected auto, {', '.join(QUANTIZED_FORMS)}")
    if not is_quantized(model):
        if form != "auto" or int4:
            raise UsageError(
                f"form={form!r}, int4_initializers={int4}: the model has no quantized layers; "
                "pass quantize=normfuse.ShiftQuant() to normfuse.optimize"
            )
        return ()
    if int4 and (form == "native" or opset < _INT4_OPSET):
        why = "the native form packs its weights anyway" if form == "native" else f"INT4 needs opset {_INT4_OPSET}, not {opset}"
        raise UsageError(f"int4_initializers=True: {why}")
    if form == "native" and (not target.contrib or opset < MIN_NATIVE_OPSET):
        raise UsageError(
            f"form='native' is for target 'onnxruntime' from opset {MIN_NATIVE_OPSET} on, not for {target.name!r} at {opset}; "
            "use form='integer' or 'qdq'"
        )
    if form == "qdq":
        check_static(model, unsigned=target.contrib)
    if form != "auto":
        return (form,)
    if target.contrib and native.available() and opset >= MIN_NATIVE_OPSET and not int4:
        return ("native",)
    try:
        check_static(model, unsigned=target.contrib)
    except UsageError:
        return ("integer",)
    return ("integer", "qdq") if target.contrib else ("qdq",)


def lower_quantized(model: Any, form: str, target: Target, opset: int, *, int4: bool = False) -> None:
    """Write the quantized layers of `model` in `form`, in place."""
    float_masks(model)
    if form == "native":
        place_attention(model)
        lower_native(model)
        fuse(model)
    elif form == "qdq":
        lower_qdq(model, unsigned=target.contrib, int4=int4)
    else:
        lower_integer(model, int4=int4)
