"""Which sizes of the inputs a caller has asked to be free, from `dynamic_shapes` in any of its forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim

__all__ = ["fixed_after_all", "free_sizes", "sizes_of", "stated_minima"]


def sizes_of(value: Tensor) -> list[Any]:
    """The sizes of a captured value; a free one that the model fixed is a number like any other."""
    return [int(d) if isinstance(d, int) or d.node.expr.is_number else d for d in value.shape]


def free_sizes(dynamic_shapes: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was asked for each free size, by `x.shape[0]`: a `Dim`, `Dim.AUTO` or `Dim.DYNAMIC`.

    Args:
        dynamic_shapes: as in `torch.export.export`: by name, or in the order of `values`.
        values: example inputs by the name of the parameter.
    """
    if isinstance(dynamic_shapes, Mapping):
        pairs = [(name, values[name], asked) for name, asked in dynamic_shapes.items() if name in values]
    elif isinstance(dynamic_shapes, (tuple, list)):
        pairs = [(name, value, asked) for (name, value), asked in zip(values.items(), dynamic_shapes, strict=False)]
    else:
        pairs = []
    for name, value, asked in pairs:
        yield from _of(name, value, asked)


def _of(name: str, value: Any, asked: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        sizes = asked.items() if isinstance(asked, Mapping) else enumerate(asked) if isinstance(asked, (tuple, list)) else ()
        for d, size in sizes:
            if size is not None and not isinstance(size, int) and size != Dim.STATIC:
                yield f"{name}.shape[{d}]", size
    elif isinstance(value, Mapping) and isinstance(asked, Mapping):
        for key in asked.keys() & value.keys():
            yield from _of(f"{name}[{key!r}]", value[key], asked[key])
    elif isinstance(value, (tuple, list)) and isinstance(asked, (tuple, list)):
        for i, (v, a) in enumerate(zip(value, asked, strict=False)):
            yield from _of(f"{name}[{i}]", v, a)


def stated_minima(asked: Mapping[str, Any]) -> dict[str, int]:
    """Limits from below that the caller gave himself; torch adds ones that are not meant."""
    return {place: int(size.min) for place, size in asked.items() if isinstance(getattr(size, "min", None), int)}


def fixed_after_all(asked: Mapping[str, Any], inputs: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """A note for each size that was asked to be free and is fixed in the captured graph.

    Args:
        asked: what `free_sizes` found.
        inputs: name and captured value of each input.
    """
    sizes = {f"{name}.shape[{d}]": size for name, v in inputs if isinstance(v, Tensor) for d, size in enumerate(sizes_of(v))}
    return tuple(
        f"{place} was asked to be free, and the model fixes it to {sizes[place]}: another size is refused"
        for place in asked
        if isinstance(sizes.get(place), int)
    )
