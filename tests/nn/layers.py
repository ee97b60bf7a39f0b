"""Every layer of `normfuse.nn`, small, with an input that fits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normfuse.nn as nnn
from tests.zoo_family import trained

__all__ = ["LAYERS", "Case"]

C = 8


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        make: builds it, fresh.
        shape: of an input; the batch stands first, unless `batch_axis` says otherwise.
        batch_axis: axis that may be empty.
        train_needs: what training does with an empty batch: "refuse" or "pass".
        optimizable: does the eval form depend on the sample alone?
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_axis: int = 0
    train_needs: str = "pass"
    optimizable: bool = True

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """With seeded weights, gains, shifts and statistics that are no identities."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = self.make()
            for name, value in (*layer.named_parameters(), *layer.named_buffers()):
                leaf = name.rpartition(".")[2]
                with torch.no_grad():
                    if leaf in ("running_var", "running_phi", "running_scale"):
                        value.uniform_(0.5, 2)
                    elif leaf == "running_mean" or "beta" in leaf or leaf == "bias":
                        value.normal_()
                    elif "gamma" in leaf or (leaf == "weight" and value.ndim == 1):
                        value.uniform_(0.5, 1.5)
            return trained(layer).to(dtype)

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Region(nn.Module):
    """RegionNormB with a fixed mask, so that it is called with one input like the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nnn.RegionNormB(C)
        self.register_buffer("mask", (torch.arange(36).reshape(1, 1, 6, 6) % 3 == 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.mask.to(x.dtype).expand(x.shape[0], -1, -1, -1))


def _companded() -> nn.Module:
    layer = nn.Linear(C, C)
    parametrize.register_parametrization(layer, "weight", nnn.WeightCompander())
    return layer


TOKENS, IMAGE = (4, 5, C), (4, C, 6, 6)
LAYERS: dict[str, Case] = {
    "UnifiedNorm": Case(lambda: nnn.UnifiedNorm(C, warmup_iters=2, window_size=2), TOKENS, train_needs="refuse"),
    "UnifiedNorm-filtered": Case(
        lambda: nnn.UnifiedNorm(C, warmup_iters=2, window_size=2, outlier_filtration=True), TOKENS, train_needs="refuse"
    ),
    "PowerNorm": Case(lambda: nnn.PowerNorm(C, group_num=2, warmup_iters=2), (5, 4, C), 1, train_needs="refuse"),
    "CRMSNorm": Case(lambda: nnn.CRMSNorm(C), TOKENS),
    "LinearZeroMeanOutput": Case(lambda: nnn.LinearZeroMeanOutput(C, 6), TOKENS),
    "ScaledNorm": Case(lambda: nnn.ScaledNorm(nn.LayerNorm(C), 3), TOKENS),
    "L1LayerNorm": Case(lambda: nnn.L1LayerNorm(C), TOKENS),
    "L1BatchNorm": Case(lambda: nnn.L1BatchNorm(C), IMAGE, train_needs="refuse"),
    "DynamicTanh": Case(lambda: nnn.DynamicTanh(C), TOKENS),
    "DynamicErf": Case(lambda: nnn.DynamicErf(C), TOKENS),
    "WeightStandardizedConv1d": Case(lambda: nnn.WeightStandardizedConv1d(C, 6, 3), (4, C, 9)),
    "WeightStandardizedConv2d": Case(lambda: nnn.WeightStandardizedConv2d(C, 6, 3), IMAGE),
    "WeightStandardizedConv3d": Case(lambda: nnn.WeightStandardizedConv3d(C, 6, 3), (4, C, 5, 5, 5)),
    "BatchChannelNorm": Case(lambda: nnn.BatchChannelNorm(C, groups=2), IMAGE),
    "BatchChannelNorm-estimate": Case(lambda: nnn.BatchChannelNorm(C, groups=2, estimate=True), IMAGE),
    "AlphaBatchNorm-frozen": Case(lambda: nnn.AlphaBatchNorm(C, source_weight=1.0), IMAGE, train_needs="refuse"),
    "AlphaBatchNorm-live": Case(lambda: nnn.AlphaBatchNorm(C, source_weight=0.7), IMAGE, train_needs="refuse", optimizable=False),
    "RegionNormB": Case(Region, IMAGE, train_needs="refuse", optimizable=False),
    "RegionNormL": Case(lambda: nnn.RegionNormL(C), IMAGE, train_needs="refuse", optimizable=False),
    "ShiftQuantLinear": Case(lambda: nnn.ShiftQuantLinear(C, 6), TOKENS),
    "ShiftQuantConv2d": Case(lambda: nnn.ShiftQuantConv2d(C, 6, 3), IMAGE),
    "QuantizedL1LayerNorm": Case(lambda: nnn.QuantizedL1LayerNorm(C), TOKENS),
    "WeightCompander": Case(_companded, TOKENS),
    **{
        f"EvoNorm-{kind}": Case(lambda kind=kind: nnn.EvoNorm(kind, C, **({} if kind.startswith("B") else {"groups": 2})), IMAGE)
        for kind in ("B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a")
    },
}
