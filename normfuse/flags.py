"""Calls with one flag the other way: a model may take another way through its modules then."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from normfuse.original import Call

__all__ = ["flagged"]

_MOST = 8  # flags that are tried, each with a run of the model


def flagged(model: nn.Module, call: Call) -> dict[str, Call]:
    """The call with one boolean of the forward's signature turned, by its name; as given, or as its default says.

    Args:
        model: whose signature it is; one without a signature has no flags.
        call: as it was given.
    """
    try:
        bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):
        return {}
    given = set(bound.arguments)
    bound.apply_defaults()
    names = [n for n, v in bound.arguments.items() if isinstance(v, bool)][:_MOST]
    return {f"{n}={not bound.arguments[n]}": _turned(call, list(bound.signature.parameters), n, given, bound) for n in names}


def _turned(call: Call, names: list[str], name: str, given: set[str], bound: inspect.BoundArguments) -> Call:
    value: Any = not bound.arguments[name]
    at = names.index(name)
    if name in given and name not in call.kwargs:
        return replace(call, args=(*call.args[:at], value, *call.args[at + 1 :]))
    if bound.signature.parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
        return replace(call, args=(*bound.args[:at], value))
    return replace(call, kwargs={**call.kwargs, name: value})
