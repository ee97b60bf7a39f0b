"""What an importer is: the names of the official classes, what they hold, and the layer that does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "Family", "Random", "Unrecognised", "attribute", "expect", "share", "untrained"]

Random = Callable[..., Tensor]
"""A tensor of that shape, normally distributed: random(2, 5, channels)."""


class Unrecognised(Exception):
    """The module bears the name of an official class and is something else; the message completes "it …"."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One official layer.

    Attributes:
        names: names of its class.
        origin: where it comes from, for the note.
        build: the modules that may do the same in eval mode, sharing the tensors of the given one; the first that gives the
            same numbers is taken. Raises `Unrecognised`.
        calls: inputs to compare on, in each layout that the official layer takes.
        candidate: is a module with such a name meant at all? For names that others use as well.
        plain: what else the name may stand for; a module that computes just that is no official layer, and no note is made.
        warning: what the user should know of a module that was recognised, as the rest of a sentence "its …"; None for nothing.
        live: is the module to be compared in the mode that its parts are in, not in eval mode?
    """

    names: tuple[str, ...]
    origin: str
    build: Callable[[nn.Module], Sequence[nn.Module]]
    calls: Callable[[nn.Module, Random], Sequence[Call]]
    candidate: Callable[[nn.Module], bool] = lambda module: True
    plain: Callable[[nn.Module], nn.Module | None] = lambda module: None
    warning: Callable[[nn.Module], str | None] = lambda module: None
    live: Callable[[nn.Module], bool] = lambda module: False


def expect(module: nn.Module, shapes: Mapping[str, tuple[int | str, ...]], optional: Sequence[str] = ()) -> dict[str, int]:
    """The sizes of a module whose parameters and buffers are exactly those of `shapes`.

    Args:
        module: the module.
        shapes: name to shape; a letter stands for a size that is the same wherever the letter is.
        optional: names that may be missing.

    Returns:
        Letter to size.

    Raises:
        Unrecognised: a name is missing or one too many, or a shape differs.
    """
    found = {name: tuple(t.shape) for name, t in _state(module)}
    wanted = ", ".join(shapes)
    extra = [name for name in found if name not in shapes]
    missing = [name for name in shapes if name not in found and name not in optional]
    if extra:
        kind = "buffer" if extra[0] in dict(module.named_buffers()) else "parameter"
        raise Unrecognised(f"has {kind} `{extra[0]}`; expected {wanted}")
    if missing:
        raise Unrecognised(f"has no `{missing[0]}`; expected {wanted}")
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        actual = found.get(name)
        if actual is None:
            continue
        fits = len(actual) == len(shape) and all(
            size == (sizes.setdefault(s, size) if isinstance(s, str) else s) for size, s in zip(actual, shape, strict=True)
        )
        if not fits:
            raise Unrecognised(f"has `{name}` of shape {actual}; expected ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})")
    return sizes


def attribute(module: nn.Module, name: str, *kinds: type) -> Any:
    """The attribute of that name, which must be of one of the kinds.

    Raises:
        Unrecognised: it is missing or of another kind.
    """
    value = getattr(module, name, None)
    if not isinstance(value, kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise Unrecognised(f"has attribute `{name}` = {value!r}; expected {wanted}" if value is not None else f"has no `{name}`")
    return value


def share(new: nn.Module, old: nn.Module, names: Mapping[str, str] | None = None) -> nn.Module:
    """`new` with the tensors of `old` in the place of its own.

    Args:
        new: the module that is to be used; every parameter and buffer that `old` does not have is left as it is.
        old: the module whose tensors are taken.
        names: name in `old` to name in `new`, for those that differ.
    """
    for name, tensor in _state(old):
        path = (names or {}).get(name, name)
        owner, _, last = path.rpartition(".")
        try:
            target = new.get_submodule(owner)
        except AttributeError:
            continue
        for store in (target._parameters, target._buffers):
            if last in store:
                store[last] = tensor  # type: ignore[assignment]
    return new


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def untrained(statistic: Tensor, start: float) -> bool:
    """Is the statistic where the layer's constructor put it?"""
    return not statistic.is_meta and bool(torch.all(statistic == start))
