"""`BCNorm`, `GN` and `EstBN` of joe-siyuan-qiao/Batch-Channel-Normalization."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, attribute, expect, share
from normfuse.nn.batch_channel import BatchChannelNorm, EstimatedBatchNorm2d

__all__ = ["BATCH_CHANNEL_NORM", "ESTIMATED_BATCH_NORM"]

_NORM: dict[str, tuple[int | str, ...]] = {
    "weight": ("C",),
    "bias": ("C",),
    "running_mean": ("C",),
    "running_var": ("C",),
    "num_batches_tracked": (),
}
_ESTIMATED = _NORM | {"estbn_moving_speed": (1,)}


class _BatchChannelNorm(BatchChannelNorm):
    """`BatchChannelNorm` whose input has its official name."""

    def forward(self, inp: Tensor) -> Tensor:
        return super().forward(inp)


class _EstimatedBatchNorm2d(EstimatedBatchNorm2d):
    """`EstimatedBatchNorm2d` whose input has its official name."""

    def forward(self, inp: Tensor) -> Tensor:
        return super().forward(inp)


def _norm_name(module: nn.Module) -> str:
    name = next((n for n in ("pbn", "bn") if isinstance(getattr(module, n, None), nn.Module)), None)
    if name is None:
        raise Unrecognised("has neither `pbn` (ImageNet code) nor `bn` (README)")
    return name


def _build(module: nn.Module) -> Sequence[nn.Module]:
    name = _norm_name(module)
    norm = module.get_submodule(name)
    estimate = hasattr(norm, "estbn_moving_speed")
    state = {f"{name}.{k}": shape for k, shape in (_ESTIMATED if estimate else _NORM).items()}
    sizes = expect(module, {"weight": (1, "G", 1), "bias": (1, "G", 1), **state}, [f"{name}.num_batches_tracked"])
    if sizes["C"] % sizes["G"]:
        raise Unrecognised(f"has {sizes['G']} groups for {sizes['C']} channels")
    new = _BatchChannelNorm(sizes["C"], sizes["G"], _eps(module), estimate)
    new.pbn.eps = _eps(norm)  # type: ignore[assignment]
    return (share(new, module, {key: f"pbn{key[len(name) :]}" for key in state}),)


def _build_estimated(module: nn.Module) -> Sequence[nn.Module]:
    channels = expect(module, _ESTIMATED, ["num_batches_tracked"])["C"]
    return (share(_EstimatedBatchNorm2d(channels, _eps(module)), module),)


def _eps(module: nn.Module) -> float:
    """ε; where the official code writes 1e-5 into its forward, there is no attribute."""
    return float(attribute(module, "eps", float)) if hasattr(module, "eps") else 1e-5


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    return _images(int(module.get_parameter(f"{_norm_name(module)}.weight").numel()), random)


def _calls_estimated(module: nn.Module, random: Random) -> Sequence[Call]:
    return _images(module.get_parameter("weight").numel(), random)


def _images(channels: int, random: Random) -> Sequence[Call]:
    return Call((random(2, channels, 3, 4),)), Call((random(1, channels, 5, 2) * 100 + 7,))


def _has_group_gain(module: nn.Module) -> bool:
    """`GN` and `BCNorm` are names of many layers; a batch norm inside, or a gain of shape (1, G, 1), is what is meant here."""
    gain = getattr(module, "weight", None)
    return (isinstance(gain, Tensor) and gain.ndim == 3) or isinstance(getattr(module, "pbn", None), nn.Module)


BATCH_CHANNEL_NORM = Family(("BCNorm", "GN"), "Batch-Channel-Normalization", _build, _calls, _has_group_gain)
ESTIMATED_BATCH_NORM = Family(("EstBN",), "Batch-Channel-Normalization", _build_estimated, _calls_estimated)
