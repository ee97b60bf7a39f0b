"""`RMSNorm` and `CRMSNorm` of ZixuanJiang/pre-rmsnorm-transformer: LayerNorms by inheritance, whose γ and β are not used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, attribute, expect
from normfuse.nn.crms import CRMSNorm

__all__ = ["CRMS_NORM", "RMS_NORM"]


def _width(module: nn.Module) -> int:
    expect(module, {"weight": ("C",), "bias": ("C",)}, ["weight", "bias"])
    shape = attribute(module, "normalized_shape", tuple)
    if len(shape) != 1:
        raise Unrecognised(f"has normalized_shape = {shape}; expected one axis")
    return int(shape[0])


def _build_rms(module: nn.Module) -> Sequence[nn.Module]:
    return (nn.RMSNorm(_width(module), attribute(module, "eps", float), elementwise_affine=False),)


def _build_crms(module: nn.Module) -> Sequence[nn.Module]:
    return (CRMSNorm(_width(module), attribute(module, "eps", float)),)


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    width = _width(module)
    return Call((random(2, 5, width),)), Call((random(3, width) * 100 + 7,))


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


# many libraries have an `RMSNorm`; only the authors' inherits from LayerNorm
RMS_NORM = Family(("RMSNorm",), "pre-rmsnorm-transformer", _build_rms, _calls, _is_layer_norm)
CRMS_NORM = Family(("CRMSNorm",), "pre-rmsnorm-transformer", _build_crms, _calls)
