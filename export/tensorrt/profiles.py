"""Optimization profiles: for each input whose size may vary the smallest, the usual and the largest size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normfuse.errors import UsageError

__all__ = ["InputSize", "Profile", "complete", "parse_shapes"]

_UNBOUNDED = 8  # an axis without an upper bound is built for up to this many times the example


@dataclass(frozen=True)
class Profile:
    """Sizes of one input: min <= opt <= max on every axis."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __str__(self) -> str:
        return ":".join("x".join(map(str, sizes)) for sizes in (self.min, self.opt, self.max))


@dataclass(frozen=True)
class InputSize:
    """What a file says of an input.

    Attributes:
        name: of the graph's input.
        sizes: an int where it is fixed, the name of the axis or None where it may vary.
        example: sizes of the example inputs, where there are some.
        limits: the range that the model was captured for, by name of the axis; None for no upper bound.
    """

    name: str
    sizes: tuple[int | str | None, ...]
    example: tuple[int, ...] | None = None
    limits: Mapping[str, tuple[int, int | None]] | None = None

    @property
    def fixed(self) -> bool:
        return all(isinstance(size, int) for size in self.sizes)

    def __str__(self) -> str:
        return f"{self.name} [{', '.join('?' if size is None else str(size) for size in self.sizes)}]"


def parse_shapes(stated: Sequence[str] | Mapping[str, object] | None) -> dict[str, Profile]:
    """`x=1x3x224x224:8x3x224x224:64x3x224x224`, or one shape for all three; a mapping holds the same by name.

    Raises:
        UsageError: it does not read like that.
    """
    if stated is None:
        return {}
    if isinstance(stated, str):
        stated = (stated,)
    if isinstance(stated, Mapping):
        return {name: _profile(name, value) for name, value in stated.items()}
    found: dict[str, Profile] = {}
    for text in stated:
        for part in filter(None, text.split(",")):
            name, equals, sizes = part.rpartition("=")
            if not equals or not name:
                raise UsageError(f"--shapes {part!r}: expected NAME=MIN:OPT:MAX, e.g. x=1x3x224x224:8x3x224x224:64x3x224x224")
            if name in found:
                raise UsageError(f"--shapes: input {name!r} is given twice")
            found[name] = _profile(name, sizes)
    return found


def _profile(name: str, value: object) -> Profile:
    if isinstance(value, Profile):
        return value
    parts = value.split(":") if isinstance(value, str) else value
    if isinstance(parts, (list, tuple)) and parts and all(isinstance(p, int) for p in parts):
        parts = (parts,)
    if not isinstance(parts, (list, tuple)) or len(parts) not in (1, 3):
        raise UsageError(
            f"shapes of input {name!r}: expected one shape, or smallest, usual and largest one (MIN:OPT:MAX), got {value!r}"
        )
    sizes = [_sizes(name, part) for part in parts]
    low, opt, high = sizes if len(sizes) == 3 else sizes * 3
    if not len(low) == len(opt) == len(high):
        raise UsageError(
            f"shapes of input {name!r}: {len(low)}, {len(opt)} and {len(high)} axes; expected the same number in all three"
        )
    for axis, (a, b, c) in enumerate(zip(low, opt, high, strict=True)):
        if not a <= b <= c:
            raise UsageError(f"shapes of input {name!r}, axis {axis}: expected min <= opt <= max, got {a}, {b}, {c}")
    return Profile(low, opt, high)


def _sizes(name: str, part: object) -> tuple[int, ...]:
    if isinstance(part, str):
        if not re.fullmatch(r"\d+(x\d+)*", part):
            raise UsageError(f"shapes of input {name!r}: {part!r} is no shape; expected sizes like 8x3x224x224")
        return tuple(map(int, part.split("x")))
    if isinstance(part, (list, tuple)) and all(isinstance(size, int) and size >= 0 for size in part):
        return tuple(part)
    raise UsageError(f"shapes of input {name!r}: {part!r} is no shape; expected a tuple of sizes")


def complete(inputs: Sequence[InputSize], stated: Mapping[str, Profile]) -> dict[str, Profile]:
    """A profile for every input whose size may vary: the stated one, else one made from the example and the captured range.

    The default is from the lower bound of the range (1 without one) over the example to the upper bound (8 times the example
    without one).

    Raises:
        UsageError: a name is unknown, a size does not fit the model, or nothing says how large an axis is.
    """
    known = {i.name for i in inputs}
    for name in stated:
        if name not in known:
            raise UsageError(f"--shapes: the model has no input {name!r}; its inputs are {', '.join(map(str, inputs))}")
    found = {}
    for wanted in inputs:
        profile = stated.get(wanted.name)
        if profile is not None:
            _check(wanted, profile)
        if wanted.fixed:
            continue
        found[wanted.name] = profile if profile is not None else _default(wanted)
    return found


def _check(wanted: InputSize, profile: Profile) -> None:
    if len(profile.opt) != len(wanted.sizes):
        raise UsageError(f"--shapes: {wanted} has {len(wanted.sizes)} axes, and {profile} has {len(profile.opt)}")
    for axis, size in enumerate(wanted.sizes):
        given = (profile.min[axis], profile.opt[axis], profile.max[axis])
        if isinstance(size, int):
            if set(given) != {size}:
                raise UsageError(
                    f"--shapes: axis {axis} of {wanted} is fixed at {size}, got {given[0]}:{given[1]}:{given[2]}; export with "
                    "dynamic_shapes (on the command line --dynamic) to let it vary"
                )
            continue
        low, high = (wanted.limits or {}).get(size or "", (0, None))
        if given[0] < low or (high is not None and given[2] > high):
            bound = f"{low} to {'any size' if high is None else high}"
            raise UsageError(
                f"--shapes: axis {axis} of {wanted} was captured for {bound}, got {given[0]}:{given[1]}:{given[2]}; "
                "widen dynamic_shapes or narrow the profile"
            )


def _default(wanted: InputSize) -> Profile:
    if wanted.example is None:
        raise UsageError(
            f"no sizes for input {wanted}: pass --shapes {wanted.name}=MIN:OPT:MAX, three shapes like "
            f"{'x'.join('1' if not isinstance(s, int) else str(s) for s in wanted.sizes)}"
        )
    low, high = [], []
    for size, example in zip(wanted.sizes, wanted.example, strict=True):
        if isinstance(size, int):
            low.append(size)
            high.append(size)
            continue
        least, most = (wanted.limits or {}).get(size or "", (1, None))
        low.append(min(max(1, least), example))
        high.append(max(example, _UNBOUNDED * example if most is None else most))
    return Profile(tuple(low), wanted.example, tuple(high))
