"""What the submodules of a model are called with while the model runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.given.sizes import Arguments, resized

__all__ = ["Call", "Signature", "calls_of", "survey"]

log = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Signature:
    """The arguments of a call, flattened: what is a tensor, and what the rest is.

    Attributes:
        spec: structure of (args, kwargs).
        leaves: dtype and sizes of a tensor, a plain value itself, the class of anything else.
    """

    spec: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls(spec, tuple(map(_leaf, leaves)))

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        return [v.sizes for v in self.leaves if isinstance(v, _Sizes)]

    @property
    def odd(self) -> str | None:
        """Class of an argument that is neither a tensor nor a plain value; None if there is none."""
        return next((v.name for v in self.leaves if isinstance(v, _Other)), None)

    def same(self, other: Signature) -> bool:
        """Do they differ in no more than the sizes of tensors?"""
        return self.spec == other.spec and all(map(_alike, self.leaves, other.leaves))

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors of another call; None if it differs in more than their sizes."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec or not all(_fits(mine, v) for mine, v in zip(self.leaves, leaves, strict=True)):
            return None
        return [v for v in leaves if isinstance(v, Tensor)]

    def call(self, tensors: Sequence[Any]) -> Arguments:
        """Arguments with these tensors."""
        feed = iter(tensors)
        leaves = [next(feed) if isinstance(v, _Sizes) else v for v in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def free(self, calls: Sequence[Call]) -> list[tuple[int, ...]]:
        """For each tensor, its dimensions that vary over the calls, or are empty in one."""
        columns = [[c.signature.sizes[i] for c in calls] for i in range(len(self.sizes))]
        return [
            tuple(d for d in range(len(seen[0])) if len({s[d] for s in seen}) > 1 or any(s[d] == 0 for s in seen))
            for seen in columns
        ]

    def example(self, samples: Sequence[tuple[Tensor, ...]], free: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        """A call to capture with: free dimensions hold two values or more, else PyTorch takes the size for a constant."""
        first = min(samples, key=lambda s: sum(t.shape[d] < 2 for t, dims in zip(s, free, strict=True) for d in dims))
        return tuple(resized(t, {d: 2 for d in dims if t.shape[d] < 2}) for t, dims in zip(first, free, strict=True))

    def linked(self, calls: Sequence[Call]) -> list[list[tuple[int, int]]]:
        """Free dimensions (tensor, dimension), those together that have the same size in every call."""
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, dims in enumerate(self.free(calls)):
            for d in dims:
                groups.setdefault(tuple(c.signature.sizes[i][d] for c in calls), []).append((i, d))
        return list(groups.values())

    def __str__(self) -> str:
        return ", ".join(str(v) for v in self.leaves)


@dataclass(frozen=True)
class _Sizes:
    dtype: torch.dtype
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.sizes)}"


@dataclass(frozen=True)
class _Other:
    name: str


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Sizes(value.dtype, tuple(value.shape))
    return value if isinstance(value, _PLAIN) else _Other(type(value).__name__)


@dataclass(frozen=True)
class Call:
    """One call of a submodule.

    Attributes:
        signature: with the sizes of this call.
        within: submodules whose calls it is part of.
        why: why nothing may stand in for the submodule in this call; None if something may.
        run: index of the first run that made it.
    """

    signature: Signature
    within: frozenset[nn.Module]
    why: str | None = None
    run: int = 0

    @property
    def key(self) -> Any:
        """Equal for calls that are alike."""
        return repr(self.signature.spec), self.signature.leaves, self.within, self.why


def survey(model: nn.Module, runs: Sequence[Arguments]) -> tuple[dict[nn.Module, list[Call]], list[int]]:
    """All calls of all submodules while the model runs, and the indices of the runs that went through."""
    calls: dict[nn.Module, dict[Any, Call]] = {}
    active: list[tuple[nn.Module, Signature, list[tuple[Tensor, int]]]] = []
    done: dict[nn.Module, list[Call]]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [(v, v._version) for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        active.append((module, Signature.of(args, kwargs), tensors))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        while active:
            who, signature, tensors = active.pop()
            if who is module:
                why = _why_not(signature, tensors)
                done.setdefault(module, []).append(Call(signature, frozenset(m for m, *_ in active), why, i))
                return

    ran: list[int] = []
    i = 0
    with _hooked(list(model.modules()), before, after):
        for i, run in enumerate(runs):
            done = {}
            active.clear()
            if _ran(model, run):
                ran.append(i)
                for module, more in done.items():
                    known = calls.setdefault(module, {})
                    for call in more:
                        known.setdefault(call.key, call)
    return {module: list(known.values()) for module, known in calls.items()}, ran


def _why_not(signature: Signature, tensors: list[tuple[Tensor, int]]) -> str | None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "it is called under autocast"
    if any(v._version != version for v, version in tensors):
        return "it writes to its inputs"
    if signature.odd is not None:
        return f"it is called with an object of type {signature.odd}"
    return None if signature.sizes else "it is called without a tensor"


def calls_of(
    model: nn.Module, runs: Sequence[Arguments], modules: Sequence[nn.Module], most: int, *, alike: bool = False
) -> dict[nn.Module, list[tuple[Tensor, ...]]]:
    """The tensors that submodules receive, copied: at most that many calls of each, of one size only one unless `alike`."""
    found: dict[nn.Module, dict[Any, tuple[Tensor, ...]]] = {m: {} for m in modules}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = found[module]
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        key = len(known) if alike else tuple(tuple(v.shape) for v in tensors)
        if len(known) < most and key not in known:
            known[key] = tuple(v.detach().clone() for v in tensors)

    with _hooked(modules, before, None):
        for run in runs:
            _ran(model, run)
    return {m: list(known.values()) for m, known in found.items()}


@contextmanager
def _hooked(modules: Sequence[nn.Module], before: Any, after: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _ran(model: nn.Module, run: Arguments) -> bool:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, run)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    except Exception as e:
        log.debug("the model does not take these inputs: %s", e)
        return False
    return True


def _alike(mine: Any, other: Any) -> bool:
    if isinstance(mine, _Sizes) or isinstance(other, _Sizes):
        return (
            isinstance(mine, _Sizes)
            and isinstance(other, _Sizes)
            and mine.dtype == other.dtype
            and len(mine.sizes) == len(other.sizes)
        )
    return type(mine) is type(other) and bool(mine == other)


def _fits(mine: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(mine, _Sizes) and mine.dtype == value.dtype and len(mine.sizes) == value.ndim
    return not isinstance(mine, _Sizes) and type(mine) is type(value) and bool(mine == value)
