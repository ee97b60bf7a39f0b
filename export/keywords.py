"""Public functions take the fields of an options class as keywords; everything below them takes the value."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from normfuse.errors import did_you_mean

__all__ = ["given", "keywords_of"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def given(cls: type[T], options: T | None, keywords: Mapping[str, Any], *, called: str) -> T:
    """`options` with `keywords` in the place of its fields; by default of those of `cls`.

    Raises:
        TypeError: `called` has no such keyword argument.
        UsageError: a value is wrong.
    """
    known = [field.name for field in dataclasses.fields(cast(Any, cls))]
    for name in keywords:
        if name not in known:
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}{did_you_mean(name, known)}")
    made = cls(**keywords) if options is None else dataclasses.replace(cast(Any, options), **keywords)
    return cast(T, made)


def keywords_of(cls: type[Any], only: Sequence[str] | None = None) -> Callable[[F], F]:
    """The decorated function takes the fields of `cls`, or `only` some, as keywords: `help` and editors show them by name."""

    def decorate(f: F) -> F:
        own = inspect.signature(f)
        fields = [field for field in dataclasses.fields(cls) if only is None or field.name in only]
        more = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields
        ]
        stay = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        f.__signature__ = own.replace(parameters=[*stay, *more])  # type: ignore[attr-defined]
        return f

    return decorate
