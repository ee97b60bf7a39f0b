"""Calls with one flag the other way: a model may take another way through its modules then."""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import nn

from normfuse.given.original import Call

__all__ = ["flagged", "not_given"]

_MOST = 8  # flags that are tried, each with a run of the model


def flagged(model: nn.Module, call: Call) -> dict[str, Call]:
    """The call with one boolean of the forward's signature turned, by its name; as given, or as its default says.

    Args:
        model: whose signature it is; one without a signature has no flags.
        call: as it was given.
    """
    bound = _bound(model, call)
    if bound is None:
        return {}
    given = set(bound.arguments)
    bound.apply_defaults()
    return {f"{n}={not bound.arguments[n]}": _turned(call, n, given, bound) for n in _flags(bound)[:_MOST]}


def not_given(model: nn.Module, call: Call) -> list[str]:
    """Names of the arguments that the call leaves to their defaults, flags left out."""
    bound = _bound(model, call)
    if bound is None:
        return []
    given = set(bound.arguments)
    bound.apply_defaults()
    flags = _flags(bound)[:_MOST]
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [n for n, p in bound.signature.parameters.items() if p.kind not in kinds and n not in given and n not in flags]


def _bound(model: nn.Module, call: Call) -> inspect.BoundArguments | None:
    try:
        return inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):
        return None


def _flags(bound: inspect.BoundArguments) -> list[str]:
    """Booleans, and None where the signature says that it may be one."""
    said = {n: str(p.annotation) for n, p in bound.signature.parameters.items()}
    return [n for n, v in bound.arguments.items() if isinstance(v, bool) or (v is None and "bool" in said[n])]


def _turned(call: Call, name: str, given: set[str], bound: inspect.BoundArguments) -> Call:
    value = not bound.arguments[name]
    at = list(bound.signature.parameters).index(name)
    if name in given and name not in call.kwargs:
        return replace(call, args=(*call.args[:at], value, *call.args[at + 1 :]))
    if bound.signature.parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
        return replace(call, args=(*bound.args[:at], value))
    return replace(call, kwargs={**call.kwargs, name: value})
