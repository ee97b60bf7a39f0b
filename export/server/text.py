"""The text format of protocol buffers, as far as a model configuration needs it.

Written by hand: a few fields of one message do not make protobuf's schema of another program a dependency. The tests parse every
file with that schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

__all__ = ["Fields", "Symbol", "message"]

_ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r"})


class Symbol(str):
    """A word that stands without quotes: a name of an enumeration."""


#: A message: values by field. A mapping is a message, a list a repeated field; the rest are numbers, words and `Symbol`s.
Fields: TypeAlias = Mapping[str, object]


def message(fields: Fields, *, indent: int = 0) -> str:
    """`fields` as text, one field a line in the order of the mapping; numbers of a repeated field stand in one line."""
    lines: list[str] = []
    margin = "  " * indent
    for name, value in fields.items():
        if isinstance(value, list) and not any(isinstance(v, Mapping) for v in value):
            lines.append(f"{margin}{name}: [{', '.join(map(_scalar, value))}]")
            continue
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, Mapping):
                lines.append(f"{margin}{name}: {_scalar(one)}")
            elif not one:
                lines.append(f"{margin}{name} {{}}")
            else:
                lines += [f"{margin}{name} {{", message(one, indent=indent + 1), f"{margin}}}"]
    return "\n".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (Symbol, int)):
        return str(value)
    return f'"{str(value).translate(_ESCAPES)}"'
