"""`--dynamic`: which axes of the inputs may vary, what they are called and how far they go.

batch                 an axis that inputs are known to have: batch, seq, height, width
tokens:1              axis 1 of the input tokens; it is called tokens_1
tokens:1=seq          ... called seq; axes of one name have one size
tokens:1=seq..512     ... of at most 512
tokens:1=seq:8..512   ... of 8 to 512; `seq:8..512` and `seq..512` alone limit an axis that inputs are known to have
"""

import inspect
import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Axis", "Free", "free_axes", "input_names", "parse_axes"]

KNOWN = ("batch", "seq", "height", "width")
_FORMS = "e.g. batch, seq..512, tokens:1=seq, tokens:1=seq..512 or tokens:1=seq:8..512"
_PLACE = re.compile(r"(?P<input>[A-Za-z_][\w.]*):(?P<axis>-?\d+)")
_DIGITS = 18  # of a size: more would not fit into 64 bits


@dataclass(frozen=True)
class Axis:
    """One axis that may vary, as the user wrote it.

    Attributes:
        name: in the exported file; axes of one name have one size.
        input: the input that has it; None for all inputs that are known to have an axis of this name.
        axis: its number there; negative ones count from the end.
        min, max: limits of its size, both included; None where the user states none.
        text: what the user wrote.
    """

    name: str
    input: str | None = None
    axis: int | None = None
    min: int | None = None
    max: int | None = None
    text: str = ""

    @property
    def flag(self) -> str:
        return f"--dynamic {self.text or self.name}"


def parse_axes(texts: Iterable[str]) -> tuple[Axis, ...]:
    """The axes in the values of `--dynamic`, each a list separated by commas. A range holds for every axis of its name.

    Raises:
        UsageError: a part cannot be read, a name has two ranges, or an axis has two names.
    """
    found = [_parsed(part.strip()) for text in texts for part in text.split(",") if part.strip()]
    ranges: dict[str, Axis] = {}
    names: dict[tuple[str, int], Axis] = {}
    for axis in found:
        if (axis.min, axis.max) != (None, None):
            first = ranges.setdefault(axis.name, axis)
            if (first.min, first.max) != (axis.min, axis.max):
                raise UsageError(f"--dynamic: {axis.name} has two ranges, {first.text} and {axis.text}; state one")
        if axis.input is not None and axis.axis is not None:
            first = names.setdefault((axis.input, axis.axis), axis)
            if first.name != axis.name:
                raise UsageError(f"--dynamic: {axis.input}:{axis.axis} has two names, {first.name} and {axis.name}; state one")
    return tuple(
        dict.fromkeys(replace(a, min=ranges[a.name].min, max=ranges[a.name].max) if a.name in ranges else a for a in found)
    )


def _parsed(text: str) -> Axis:
    place, equals, rest = text.partition("=")
    if not equals and _PLACE.fullmatch(text) is None:
        return _plain(text)
    found = _PLACE.fullmatch(place.strip())
    if found is None:
        raise UsageError(f"--dynamic {text}: {place!r} names no axis of an input; expected INPUT:AXIS, {_FORMS}")
    owner, axis = found["input"], int(found["axis"][:_DIGITS])
    default = re.sub(r"\W", "_", f"{owner}_{axis}")
    name, low, high = _named_range(text, rest.strip() if equals else default, default)
    return Axis(name, owner, axis, low, high, text)


def _plain(text: str) -> Axis:
    name, low, high = _named_range(text, text, "")
    if name not in KNOWN:
        raise UsageError(
            f"--dynamic {text} is not known; known: {', '.join(KNOWN)}; INPUT:AXIS={name or 'NAME'} names an axis of an input"
        )
    return Axis(name, min=low, max=high, text=text)


def _named_range(text: str, written: str, default: str) -> tuple[str, int | None, int | None]:
    """`NAME`, `NAME..MAX`, `NAME:MIN..[MAX]` or `MIN..[MAX]` as (name, smallest, largest)."""
    head, dots, tail = (part.strip() for part in written.partition(".."))
    name, colon, low = (part.strip() for part in head.rpartition(":")) if ":" in head else (head, "", "")
    if not colon and dots and (head.isdigit() or not head):
        name, low = default, head
    if (colon and not dots) or (dots and not low and not tail) or not all(n.isdecimal() or not n for n in (low, tail)):
        raise UsageError(f"--dynamic {text}: {written!r} is no name with a range, such as seq, seq..512 or seq:8..512")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"--dynamic {text}: {name!r} cannot be the name of an axis; take letters, digits and _, {_FORMS}")
    if max(len(low), len(tail)) > _DIGITS:
        raise UsageError(f"--dynamic {text}: no axis is as long as that")
    least, most = (int(n) if n else None for n in (low, tail))
    if most is not None and (least or 1) >= most:
        raise UsageError(f"--dynamic {text}: {least or 1}..{most} leaves nothing to vary; the first size must be below the second")
    return name, least, most


# -- inputs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Free:
    """Axes of a call's inputs that may vary.

    Attributes:
        inputs: what the parameters of the model are bound to.
        axes: by the name of an input (`x`, `images.1` inside of a list), by number.
    """

    inputs: Mapping[str, Any]
    axes: Mapping[str, Mapping[int, Axis]]

    def shapes(self, dim: Callable[[str, int, Axis], Any]) -> dict[str, Any]:
        """`dynamic_shapes` of `torch.export`, with `dim(input, number, axis)` for each axis that may vary."""

        def of(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                below: Any = {k: of(f"{name}.{k}", v) for k, v in value.items()}
                return below if any(v is not None for v in below.values()) else None
            if isinstance(value, (list, tuple)):
                below = [of(f"{name}.{i}", v) for i, v in enumerate(value)]
                return type(value)(below) if any(v is not None for v in below) else None
            return {number: dim(name, number, axis) for number, axis in self.axes.get(name, {}).items()} or None

        return {name: of(name, value) for name, value in self.inputs.items()}

    def stated(self) -> dict[str, Any]:
        """`shapes` in which every axis is a `Dim` with the limits that the user states."""
        import torch

        dims: dict[str, Any] = {}

        def dim(_input: str, _number: int, axis: Axis) -> Any:
            return dims.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.min, max=axis.max))

        return self.shapes(dim)


def free_axes(
    axes: Sequence[Axis],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    remedy: Callable[[Axis, int], str] = lambda _axis, _number: "give an example that is larger there",
) -> Free:
    """Find `axes` in the inputs of a call. An axis that is named by input and number keeps that name whatever else it is.

    `batch` is the first axis of every input, `seq` the second of integer inputs (B, T) and of features (B, T, C),
    `height` and `width` the last two of images (B, C, H, W).

    Args:
        axes: what `parse_axes` has read.
        forward: what is called.
        args, kwargs: the example inputs of the call.
        remedy: what to do about an example of size 1 there.

    Raises:
        UsageError: there is no such input or axis, its example has a size of 1 or outside of its range, or the examples of one
            name differ in size.
    """
    bound = dict(inspect.signature(forward).bind(*args, **kwargs).arguments)
    tensors = dict(_tensors(bound))
    places: dict[str, dict[int, Axis]] = {}
    for axis in (a for a in axes if a.input is not None):
        number = _number(axis, tensors, bound)
        places.setdefault(str(axis.input), {})[number] = axis
    for axis in (a for a in axes if a.input is None):
        here = [(name, number) for name, x in tensors.items() for number, known in _axes(x).items() if known == axis.name]
        if not here:
            raise UsageError(
                f"{axis.flag}: no input has such an axis; INPUT:AXIS={axis.name} names one (inputs: {_listed(tensors)})"
            )
        for name, number in here:
            places.setdefault(name, {}).setdefault(number, axis)
    _check_sizes(places, tensors, remedy)
    return Free(bound, {name: dict(sorted(found.items())) for name, found in places.items()})


def input_names(inputs: Mapping[str, Any]) -> dict[int, str]:
    """Names of all tensors in bound `inputs`, by the identity of the tensor."""
    return {id(value): name for name, value in _tensors(inputs)}


def _tensors(inputs: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, "Tensor"]]:
    import torch

    for key, value in inputs.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(dict(enumerate(value)), f"{name}.")
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{name}.")


def _number(axis: Axis, tensors: Mapping[str, "Tensor"], bound: Mapping[str, Any]) -> int:
    x = tensors.get(str(axis.input))
    if x is None:
        kind = f"is a {type(bound[str(axis.input)]).__name__} and no tensor" if axis.input in bound else "is no input"
        raise UsageError(f"{axis.flag}: {axis.input} {kind}; the inputs are {_listed(tensors)}")
    number = axis.axis or 0
    if not -x.ndim <= number < x.ndim:
        raise UsageError(f"{axis.flag}: {axis.input} has {x.ndim} axes, {_sizes(x)}, and none with number {number}")
    return number % x.ndim


def _check_sizes(
    places: Mapping[str, Mapping[int, Axis]], tensors: Mapping[str, "Tensor"], remedy: Callable[[Axis, int], str]
) -> None:
    first: dict[str, tuple[str, int]] = {}
    for name, found in places.items():
        for number, axis in found.items():
            size, place = tensors[name].shape[number], f"axis {number} of the example {name}"
            if size < 2:
                raise UsageError(f"{axis.flag}: {place} has size {size}, which would be taken for fixed; {remedy(axis, number)}")
            if not (axis.min or 0) <= size <= (size if axis.max is None else axis.max):
                raise UsageError(
                    f"{axis.flag}: axis {number} of the example {name} has size {size}, which is outside of that range"
                )
            other, same = first.setdefault(axis.name, (f"axis {number} of {name}", size))
            if same != size:
                raise UsageError(
                    f"--dynamic: {axis.name} is {other} with size {same} and axis {number} of {name} with size {size}; axes of "
                    "one name have one size"
                )


def _axes(x: "Tensor") -> dict[int, str]:
    axes = {0: "batch"} if x.ndim else {}
    if x.ndim == 3 or (x.ndim == 2 and not x.is_floating_point()):
        axes[1] = "seq"
    if x.ndim == 4:
        axes |= {2: "height", 3: "width"}
    return axes


def _listed(tensors: Mapping[str, "Tensor"]) -> str:
    return ", ".join(f"{name} ({_sizes(x)})" for name, x in tensors.items()) or "none"


def _sizes(x: "Tensor") -> str:
    return "x".join(map(str, x.shape)) or "a scalar"
