"""Flags that belong together reach a command as one value."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from normfuse.cli.options import force_option, json_option, verbosity
from normfuse.cli.reports import report_option

__all__ = ["Telling", "bundled", "telling_options"]

F = TypeVar("F", bound=Callable[..., Any])


def bundled(name: str, cls: type[Any], *options: Callable[[Any], Any]) -> Callable[[F], F]:
    """The click `options`, which are called after the fields of `cls`, as one argument `name` of the command."""
    fields = [field.name for field in dataclasses.fields(cls)]

    def decorate(f: F) -> F:
        @functools.wraps(f)
        def wrapped(**given: Any) -> Any:
            value = cls(**{field: given.pop(field) for field in fields})
            return f(**{name: value}, **given)

        found: Any = wrapped
        for option in reversed(options):
            found = option(found)
        return found  # type: ignore[no-any-return]

    return decorate


@dataclass(frozen=True)
class Telling:
    """What a command says, and whether it replaces files."""

    report_path: Path | None
    force: bool
    as_json: bool
    quiet: bool


#: Of a command that writes files.
telling_options = bundled("telling", Telling, report_option, force_option, json_option, verbosity)
