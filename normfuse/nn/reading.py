"""What a module that looks like a norm computes: read from its type where that says it, else tried out on numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from normfuse.nn.layouts import Activated, ChannelsLast, Rows

__all__ = ["Reading", "hooks_of", "read"]

_EPS = ("eps", "variance_epsilon", "epsilon")
_PLAIN_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OURS = {
    "UnifiedNorm": "unified",
    "PowerNorm": "power",
    "L1LayerNorm": "l1",
    "L1BatchNorm": "l1 batch",
    "DynamicTanh": "dyt",
    "DynamicErf": "derf",
    "ScaledNorm": "scaled",
    "BatchChannelNorm": "bcn",
    "CRMSNorm": "crms",
    "AlphaBatchNorm": "alpha",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Reading:
    """A norm.

    Attributes:
        kind: "layer", "rms" or "batch", or what one of our own layers is.
        shape: the normalized shape; (C,) for a norm of channels.
        eps: ε; None where the norm takes the machine epsilon.
        gamma, beta: its parameters.
        offset: what is added to γ: 1 for norms that store γ − 1.
        first: do the features stand on axis 1?
        rank: the number of axes of its input, if the class fixes it.
        mean, var: running statistics of a batch norm.
        momentum: of a batch norm.
        tail: what a fused class does behind the norm, by name.
    """

    kind: str
    shape: tuple[int, ...]
    eps: float | None
    gamma: nn.Parameter | None = None
    beta: nn.Parameter | None = None
    offset: float = 0.0
    first: bool = False
    rank: int | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float | None = 0.1
    tail: tuple[tuple[str, nn.Module], ...] = ()


def read(module: nn.Module) -> Reading | str | None:
    """The norm that a module is; a reason if it looks like one and is none that we know; None if it is something else."""
    if isinstance(module, (ChannelsLast, Rows)):
        inner = read(module.norm)
        return replace(inner, first=isinstance(module, ChannelsLast)) if isinstance(inner, Reading) else inner
    if isinstance(module, Activated):
        inner = read(module.get_submodule("norm"))
        tail = tuple((n, m) for n, m in module.named_children() if n != "norm")
        return replace(inner, tail=tail) if isinstance(inner, Reading) else inner
    ours = _ours(module)
    if ours is not None:
        return ours
    name = type(module).__name__
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm, _BatchNorm)) and "norm" not in name.lower():
        return None
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized; remove the parametrization first"
    if any(_has_state(child) for child in module.children()):
        return None  # a container such as PreNorm(fn): the norm is one of its children
    hook = _foreign_hook(module)
    if hook is not None:
        return f"its hook {hook} works on the module itself; remove it first"
    if isinstance(module, (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm)):
        return f"{name} has no counterpart here"
    if isinstance(module, _BatchNorm):
        return _batch(module)
    if type(module) is nn.LayerNorm or type(module) is nn.RMSNorm:
        kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        return Reading(kind, tuple(module.normalized_shape), module.eps, module.weight, getattr(module, "bias", None))
    return _tried(module)


def hooks_of(module: nn.Module) -> Iterator[tuple[str, int, Any]]:
    """The hooks of a module: the dictionary, the key in it and the function."""
    for name in _HOOKS:
        for key, hook in getattr(module, name).items():
            yield name, key, hook


def _foreign_hook(module: nn.Module) -> str | None:
    """A hook object of torch.nn.utils (old weight norm and the like) writes attributes of its module before each call."""
    return next((type(h).__name__ for _, _, h in hooks_of(module) if type(h).__module__.startswith("torch.nn.utils")), None)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _ours(module: nn.Module) -> Reading | None:
    if not type(module).__module__.startswith("normfuse.nn."):
        return None
    name, m = type(module).__name__, module
    kind = "evo" if name.startswith("EvoNorm") else _OURS.get(name)
    if kind is None:
        return None
    if kind == "scaled":
        inner = read(m.norm)  # type: ignore[arg-type]
        return replace(inner, kind="scaled") if isinstance(inner, Reading) else None
    width: Any = next(v for v in (getattr(m, n, None) for n in ("normalized_shape", "num_features", "channels", "width")) if v)
    shape = width if isinstance(width, tuple) else (int(width),)
    source: Any = m.pbn if kind == "bcn" else m
    gamma, beta = getattr(source, "weight", None), getattr(source, "bias", None)
    first = kind in ("l1 batch", "bcn", "evo", "alpha") or getattr(m, "channels_last", True) is False
    rank = 4 if kind in ("bcn", "evo") or getattr(m, "channels_last", True) is False else None
    mean: Any = None
    var: Any = None
    if kind == "l1 batch":
        mean, var = source.running_mean, (source.running_scale + source.eps).square() - source.eps
    elif kind in ("bcn", "alpha"):
        mean, var = source.running_mean, source.running_var
    return Reading(
        kind, shape, getattr(m, "eps", None), gamma, beta, first=first, rank=rank, mean=mean, var=var, momentum=_momentum(m, kind)
    )


def _momentum(module: nn.Module, kind: str) -> float | None:
    """The weight of a batch; our window norms count the other way round."""
    value = getattr(module, "momentum", None) if kind in ("l1 batch", "alpha") else 0.1
    return value if isinstance(value, float) else None


# -- trying out --------------------------------------------------------------------------------------------------------


def _tail(module: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    return tuple((n, m) for n, m in module.named_children() if type(m) is not nn.Identity)


def _bare(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU with random values, without hooks and without what stands behind the norm."""
    probe = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    for name in _HOOKS:
        getattr(probe, name).clear()
    for name, _ in probe.named_children():
        setattr(probe, name, nn.Identity())
    draw = torch.Generator().manual_seed(0)
    for value in (*probe.parameters(), *probe.buffers()):
        if value.is_floating_point():
            value.data = torch.rand(value.shape, generator=draw, dtype=torch.float64) + 0.5
    return probe


def _agrees(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    # norms of language models compute in float32 whatever they are given
    return bool(torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5))


def _inputs(shape: tuple[int, ...], eps: float) -> list[Tensor]:
    """Of unit size, and of a size where ε matters."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [x + 0.5, (x + 0.5) * max(eps, 1e-12) ** 0.5]


@torch.no_grad()
def _batch(module: _BatchNorm) -> Reading | str:
    rank = next((r for kind, r in ((nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5)) if isinstance(module, kind)), None)
    c = module.num_features
    reading = Reading(
        "batch", (c,), module.eps, module.weight, module.bias, first=True, rank=rank, mean=module.running_mean,
        var=module.running_var, momentum=module.momentum, tail=_tail(module),
    )  # fmt: skip
    if type(module) in _PLAIN_BATCH:
        return reading
    try:
        probe: Any = _bare(module)
        for x in _inputs((3, c, *[2] * ((rank or 4) - 2)), 1.0):
            statistics = module.running_mean is None or module.running_var is None
            expected = F.batch_norm(x, probe.running_mean, probe.running_var, probe.weight, probe.bias, statistics, 0.0, module.eps)
            if not _agrees(probe(x), expected):
                return f"{type(module).__name__} computes something else than batch normalization"
    except Exception as e:  # any code may run here
        return f"{type(module).__name__} could not be tried out: {e}"
    return reading


@torch.no_grad()
def _tried(module: nn.Module) -> Reading | str:
    """The LayerNorm or RMSNorm, over the last axis or axis 1, with gain w or 1 + w, that gives the same numbers."""
    name = type(module).__name__
    eps = next((v for v in (getattr(module, n, None) for n in _EPS) if isinstance(v, float)), None)
    gamma, beta = (getattr(module, n, None) for n in ("weight", "bias"))
    others = [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if n not in ("weight", "bias")]
    shape = _shape(module, gamma)
    epsless = eps is None and isinstance(module, nn.RMSNorm)  # it takes the machine epsilon
    if (eps is None and not epsless) or shape is None or others:
        why = f"has {', '.join(others)}" if others else "has no ε" if eps is None else "does not tell its width"
        return f"{name} is not known: it {why}"
    try:
        probe = _bare(module)
        for first in (False, True):
            for kind in ("rms",) if epsless else ("layer", "rms"):
                for offset in (0.0, 1.0) if gamma is not None else (0.0,):
                    if (not first or len(shape) == 1) and _same(probe, kind, shape, eps, offset, first):
                        rank = 4 if first else None
                        return Reading(kind, shape, eps, gamma, beta, offset, first, rank, tail=_tail(module))
    except Exception as e:
        return f"{name} could not be tried out: {e}"
    return f"{name} computes neither LayerNorm nor RMSNorm"


def _shape(module: nn.Module, gamma: Any) -> tuple[int, ...] | None:
    if isinstance(gamma, nn.Parameter):
        return tuple(gamma.shape)
    shape = getattr(module, "normalized_shape", None)
    return tuple(shape) if isinstance(shape, (tuple, list, torch.Size)) else None


def _same(probe: Any, kind: str, shape: tuple[int, ...], eps: float | None, offset: float, first: bool) -> bool:
    gamma = getattr(probe, "weight", None)
    beta = getattr(probe, "bias", None)
    gain = None if gamma is None else gamma + offset
    for x in _inputs((2, *shape, 3, 4) if first else (2, 3, *shape), 1e-6 if eps is None else eps):
        rows = x.movedim(1, -1) if first else x
        y = F.layer_norm(rows, shape, gain, beta, eps or 0.0) if kind == "layer" else F.rms_norm(rows, shape, gain, eps)
        if kind == "rms" and beta is not None:
            y = y + beta
        try:
            found = probe(x)
        except (RuntimeError, ValueError, IndexError, AssertionError):  # it takes another layout
            return False
        if not _agrees(found, y.movedim(-1, 1) if first else y):
            return False
    return True
