"""What takes the place of a norm: one builder a target of `convert`, each keeping what has the same meaning in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from normfuse.nn.layouts import BatchNormAnyRank, ChannelsLast, Rows
from normfuse.nn.reading import Reading

__all__ = ["OPTIONS", "Kind", "Left", "New", "build"]

Kind = Literal["unified", "power", "l1", "rms", "dyt", "derf", "scaled", "layer", "batch", "bcn", "evo", "shiftquant"]
"""The keys of `OPTIONS`, for type checkers."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "unified": ("window_size", "warmup_iters", "outlier_filtration", "eps", "momentum", "per_channel_threshold", "rows"),
    "power": ("eps", "alpha_fwd", "alpha_bkw", "affine", "warmup_iters", "group_num", "group_scaling", "group_eps", "rows"),
    "l1": ("eps", "scale_const"),
    "rms": ("eps",),
    "dyt": ("alpha_init",),
    "derf": ("alpha_init", "shift_init"),
    "scaled": ("base", "depths"),
    "layer": ("eps",),
    "batch": ("eps", "momentum"),
    "bcn": ("groups", "eps", "estimate", "momentum", "convention"),
    "evo": ("kind", "groups", "group_size", "eps"),
    "shiftquant": ("bits", "activation_bits", "gradient_bits", "shift_groups", "seed"),
}
"""What a norm (for "shiftquant" a linear layer or convolution) can be converted to, and the options of each."""


_CLOSED = {
    "evo": "contains an activation, which would be lost",
    "crms": "works on a stream without one coordinate, whose mean it knows",
}


class Left(Exception):
    """The norm stays as it is; the message is the reason."""


@dataclass
class New:
    """A replacement.

    Attributes:
        module: what takes the place of the norm.
        layer: the layer in it that has γ and β.
        kept: what was taken over.
        notes: what else there is to know.
        act: does it contain the activation that stood behind the norm?
        buffers: running statistics to set: the module, the name, the value.
    """

    module: nn.Module
    layer: nn.Module
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    act: bool = False
    buffers: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)


def build(to: str, old: Reading, path: str, options: Mapping[str, Any], *, act: bool = False, like: Tensor | None = None) -> New:
    """The replacement for a norm.

    Args:
        to: a key of `OPTIONS`, other than "scaled", which wraps a norm, and "shiftquant", which leaves norms alone.
        old: what the norm computes.
        path: its module path.
        options: those of the caller.
        act: does an activation stand right behind the norm?
        like: a tensor whose device and dtype a norm without parameters takes.

    Raises:
        Left: the norm cannot be replaced by that.
    """
    if old.kind == to or (to == "l1" and old.kind == "l1 batch"):
        raise Left("is of that kind already")
    if old.kind in _CLOSED:
        raise Left(_CLOSED[old.kind])
    new = _BUILDERS[to](old, path, dict(options), act)
    own = [t for t in (old.gamma, old.beta, old.mean) if t is not None]
    if own or like is not None:
        model = own[0] if own else like
        assert model is not None
        new.module.to(device=model.device, dtype=model.dtype)
    if any(isinstance(t, nn.Parameter) for t in own) and not any(t.requires_grad for t in own):
        new.module.requires_grad_(False)
    _keep_parameters(old, new)
    for module, name, value in new.buffers:
        buffer = getattr(module, name)
        setattr(module, name, value.detach().to(buffer.device, own[-1].dtype if own else buffer.dtype).clone())
    if new.buffers:
        new.kept.append("running statistics")
    return new


# -- features ----------------------------------------------------------------------------------------------------------


def _unified(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    from normfuse.nn.unified import UnifiedNorm

    rows = options.pop("rows", False)
    return _over_features(old, UnifiedNorm(_width(old), **_eps(old, options)), "statistics start fresh", rows=rows)


def _power(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    from normfuse.nn.power import PowerNorm

    rows = options.pop("rows", False)
    return _over_features(old, PowerNorm(_width(old), **_eps(old, options)), "statistics start fresh", rows=rows)


def _rms(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    layer = nn.RMSNorm(old.shape, elementwise_affine=_gain(old), **_eps(old, options))
    new = _over_features(old, layer, "the mean is no longer removed")
    if old.beta is not None and (old.beta.is_meta or bool(old.beta.detach().any())):
        new.notes.append("β is dropped")
    return new


def _layer(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    affine, bias = _gain(old) or old.beta is not None, old.kind == "rms" or old.beta is not None
    return _over_features(old, nn.LayerNorm(old.shape, elementwise_affine=affine, bias=bias, **_eps(old, options)))


def _dynamic(name: str, old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    from normfuse.nn.dynamic import DynamicErf, DynamicTanh

    options = dict(options)
    alpha = options.get("alpha_init")
    if callable(alpha):
        options["alpha_init"] = alpha(path)
    options |= {"elementwise_affine": _gain(old) or old.beta is not None, "bias": old.kind != "rms" or old.beta is not None}
    make = DynamicTanh if name == "dyt" else DynamicErf
    if old.first and old.rank == 4:
        layer = make(old.shape, channels_last=False, **options)
        return New(layer, layer)
    return _over_features(old, make(old.shape, **options))


def _l1(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    from normfuse.nn.l1 import L1BatchNorm, L1LayerNorm

    if old.kind not in ("batch", "alpha"):
        affine = _gain(old) or old.beta is not None
        bias = old.kind != "rms" or old.beta is not None
        layer = L1LayerNorm(old.shape, elementwise_affine=affine, bias=bias, **options)
        return _over_features(old, layer, *(["the mean is removed too"] if old.kind == "rms" else []))
    batch = L1BatchNorm(_width(old), momentum=old.momentum, affine=_gain(old), **options)
    new = New(batch, batch)
    if old.mean is not None and old.var is not None and old.eps is not None:
        scale = (old.var.detach().double() + old.eps).sqrt() - batch.eps
        new.buffers += [(batch, "running_mean", old.mean), (batch, "running_scale", scale)]
        new.notes.append("the same function in eval mode")
    return new


# -- channels ----------------------------------------------------------------------------------------------------------


def _batch(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    options = {"momentum": old.momentum, "affine": _gain(old) or old.beta is not None, **_eps(old, options)}
    if not old.first:
        layer = nn.BatchNorm1d(_width(old), **options)
        return New(Rows(layer), layer, notes=["batch statistics over tokens start fresh"])
    whole = (nn.BatchNorm2d if old.rank == 4 else BatchNormAnyRank)(_width(old), **options)
    return _with_statistics(old, New(whole, whole), whole)


def _bcn(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    from normfuse.nn.batch_channel import BatchChannelNorm

    c = _images(old, "BatchChannelNorm")
    given = {"momentum": 0.1 if old.momentum is None else old.momentum, "groups": _groups(c), **_eps(old, options)}
    given.pop("convention", None)  # of the convolutions
    if c % given["groups"]:
        raise Left(f"{c} channels do not split into {given['groups']} groups")
    layer = BatchChannelNorm(c, **given)
    return _with_statistics(old, New(layer, layer.pbn, notes=[f"{given['groups']} groups"]), layer.pbn)


def _evo(old: Reading, path: str, options: dict[str, Any], act: bool) -> New:
    from normfuse.nn.evonorm import EvoNorm

    c = _images(old, "EvoNorm")
    fused = any(name == "act" for name, _ in old.tail)
    if not fused and not act:
        raise Left("no activation is known to follow it, and EvoNorm contains one")
    given = dict(options)
    kind = str(given.pop("kind", "S0"))
    if kind.startswith("S") and "group_size" not in given:
        given.setdefault("groups", _groups(c))
    layer = EvoNorm(kind, c, **given)
    return New(layer, layer, notes=["takes the place of the activation behind it too"], act=True)


# -- what they share ---------------------------------------------------------------------------------------------------


def _over_features(old: Reading, layer: nn.Module, *notes: str, rows: bool = False) -> New:
    return New(ChannelsLast(layer) if old.first else Rows(layer) if rows else layer, layer, notes=list(notes))


def _with_statistics(old: Reading, new: New, batch: nn.Module) -> New:
    if old.mean is None or old.var is None:
        new.notes.append("batch statistics start fresh")
    else:
        new.buffers += [(batch, "running_mean", old.mean), (batch, "running_var", old.var)]
    return new


def _keep_parameters(old: Reading, new: New) -> None:
    """γ and β of the norm, as the very same parameters where they are stored alike, so that tied ones stay tied."""
    for name, symbol, value in (("weight", "γ", old.gamma), ("bias", "β", old.beta)):
        if not isinstance(getattr(new.layer, name, None), nn.Parameter) or value is None:
            continue
        if name == "weight" and old.offset:
            value = nn.Parameter(value.detach() + old.offset, requires_grad=value.requires_grad)
            new.notes.append("γ holds 1 + the old weight")
        setattr(new.layer, name, value)
        new.kept.append(symbol)


def _groups(channels: int) -> int:
    return max(g for g in range(1, min(32, channels) + 1) if channels % g == 0)


def _width(old: Reading) -> int:
    if len(old.shape) > 1:
        raise Left(f"normalizes over {len(old.shape)} axes at once")
    return old.shape[0]


def _images(old: Reading, name: str) -> int:
    if not old.first or old.rank not in (4, None) or len(old.shape) > 1:
        raise Left(f"{name} is for images with channels on axis 1")
    return old.shape[0]


def _gain(old: Reading) -> bool:
    return old.gamma is not None


def _eps(old: Reading, options: dict[str, Any]) -> dict[str, Any]:
    return {**({"eps": old.eps} if old.eps is not None else {}), **options}


_BUILDERS: dict[str, Callable[[Reading, str, dict[str, Any], bool], New]] = {
    "unified": _unified,
    "power": _power,
    "l1": _l1,
    "rms": _rms,
    "dyt": partial(_dynamic, "dyt"),
    "derf": partial(_dynamic, "derf"),
    "batch": _batch,
    "layer": _layer,
    "bcn": _bcn,
    "evo": _evo,
}
