"""Entries of a batch that the model does not take: the labels of a loader that training has used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

__all__ = ["taken"]


def taken(
    gm: fx.GraphModule, example: tuple[tuple[Any, ...], Mapping[str, Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """The arguments of a call without what the model does not take, and what was left out, in words; nothing else is changed.

    Args:
        gm: the captured model.
        example: positional and keyword inputs that it was captured with.
        args, kwargs: those of a batch: `(images, labels)`, `{"input_ids": …, "labels": …}`.
    """
    wanted, named = example
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    if args and not kwargs and wanted and not named and len(args) > len(wanted):
        first = "the first entry" if len(wanted) == 1 else f"the first {len(wanted)} entries"
        return args[: len(wanted)], {}, f"only {first} of each batch, the model takes no more"
    if kwargs and not args and named and not wanted and set(named) < set(kwargs):
        return (
            (),
            {k: kwargs[k] for k in named},
            f"{_quoted(kwargs, named)} of each batch left out, the model takes {', '.join(named)}",
        )
    if kwargs and not args and wanted and not named and len(names) == len(wanted) and set(names) <= set(kwargs):
        left = (
            f"{_quoted(kwargs, names)} of each batch left out, the model takes {', '.join(names)}"
            if len(kwargs) > len(names)
            else ""
        )
        return tuple(kwargs[n] for n in names), {}, left
    return args, dict(kwargs), ""


def _quoted(given: Mapping[str, Any], used: Any) -> str:
    return ", ".join(repr(k) for k in given if k not in used)
