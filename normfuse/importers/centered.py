"""`LinearZeroMeanOutput` of ZixuanJiang/pre-rmsnorm-transformer and `CCLinear` of Whsjrczr/cbwc-vit and /CBWC-cuda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, expect, share
from normfuse.nn.zero_mean import LinearZeroMeanOutput

__all__ = ["CENTERED_LINEAR", "LINEAR_ZERO_MEAN_OUTPUT"]


class _ZeroMeanOfX(LinearZeroMeanOutput):
    """`LinearZeroMeanOutput` whose input has its official name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _build_zero_mean(module: nn.Module) -> Sequence[nn.Module]:
    sizes = expect(module, {"weight": ("O", "I"), "bias": ("O",)})
    return (share(_ZeroMeanOfX(sizes["I"], sizes["O"], device=torch.device("meta")), module),)


def _build_centered(module: nn.Module) -> Sequence[nn.Module]:
    """A linear layer with the weight that the module uses in eval mode.

    That weight is a plain attribute, which the module computes in training and rounds; it is no function of `weight` any more
    once a checkpoint was loaded, so that centering `weight` here could give another model.
    """
    if isinstance(module._parameters.get("v_weight"), Tensor):  # CBWC-cuda
        sizes = expect(module, {"v_weight": ("O", "I"), "v_bias": ("O",)}, ["v_bias"])
        weight, bias = vars(module).get("weight"), vars(module).get("bias")
    else:
        sizes = expect(module, {"weight": ("O", "I"), "bias": ("O",)}, ["bias"])
        weight, bias = vars(module).get("compute_weight"), vars(module).get("compute_bias")
    if not isinstance(weight, Tensor) or weight.shape != (sizes["O"], sizes["I"]):
        raise Unrecognised("holds no centered weight in an attribute `compute_weight` or `weight`")
    new = nn.Linear(sizes["I"], sizes["O"], bias is not None, device=torch.device("meta"))
    new.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return (new,)


def _warning(module: nn.Module) -> str | None:
    """After `load_state_dict` the official layer computes with the weight of before, until its own eval() is called."""
    own = module._parameters.get("v_weight", module._parameters.get("weight"))
    used = vars(module).get("compute_weight", vars(module).get("weight"))
    if own is None or not isinstance(used, Tensor) or own.is_meta:
        return None
    centered = own.detach().double() - own.detach().double().mean(0)
    error = (centered - used.detach().double()).abs().max() / centered.abs().max().clamp(min=1e-30)
    if float(error) <= 16 * torch.finfo(own.dtype).eps:
        return None
    return "centered weight is not that of its parameter (call eval() of each such layer after loading a checkpoint)"


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    weight = module._parameters.get("v_weight", module._parameters.get("weight"))
    assert weight is not None
    features = weight.shape[1]
    return Call((random(2, 5, features),)), Call((random(3, features) * 100 + 7,))


LINEAR_ZERO_MEAN_OUTPUT = Family(("LinearZeroMeanOutput",), "pre-rmsnorm-transformer", _build_zero_mean, _calls)
CENTERED_LINEAR = Family(("CCLinear",), "CBWC", _build_centered, _calls, warning=_warning)
