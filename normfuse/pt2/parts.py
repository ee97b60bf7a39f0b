"""Small checks of JSON values, and how they combine. Each rebuilds what it accepts: what is not named does not pass."""

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

from normfuse.pt2.problems import Broken, Unsafe

__all__ = [
    "Check", "Maybe", "boolean", "each", "identifier", "integer", "integer_in", "mapping", "matching", "number", "one_of", "path",
    "plain", "printed", "record", "word",
]  # fmt: skip

Check = Callable[[Any, str], Any]  # value and where it stands -> the value, rebuilt


class Maybe:
    """A field that may be missing or null."""

    def __init__(self, check: Check) -> None:
        self.check = check


def record(**fields: Check | Maybe) -> Check:
    """An object with these fields and no others."""

    def check(value: Any, where: str) -> dict[str, Any]:
        found = _kind(value, dict, where)
        for name in found:
            if name not in fields:
                raise Unsafe(f"{where} has a field {_shown(name)} that is not known")
        made = {}
        for name, field in fields.items():
            if isinstance(field, Maybe):
                if found.get(name) is not None:
                    made[name] = field.check(found[name], f"{where}.{name}")
                elif name in found:
                    made[name] = None
            elif name not in found:
                raise Broken(f"{where} has no {name}")
            else:
                made[name] = field(found[name], f"{where}.{name}")
        return made

    return check


def one_of(**cases: Check) -> Check:
    """An object with one key, which says what the value is."""

    def check(value: Any, where: str) -> dict[str, Any]:
        found = _kind(value, dict, where)
        if len(found) != 1:
            raise Broken(f"{where} must be one of {', '.join(cases)}")
        ((name, inner),) = found.items()
        if name not in cases:
            raise Unsafe(f"{where} is {_shown(name)}, which is not among what may stand there")
        return {name: cases[name](inner, f"{where}.{name}")}

    return check


def each(check: Check) -> Check:
    """A list."""
    return lambda value, where: [check(v, f"{where}[{i}]") for i, v in enumerate(_kind(value, list, where))]


def mapping(key: Check, check: Check) -> Check:
    """An object with any keys that pass."""

    def run(value: Any, where: str) -> dict[str, Any]:
        found: Mapping[str, Any] = _kind(value, dict, where)
        return {key(k, where): check(v, f"{where}.{k}") for k, v in found.items()}

    return run


def matching(pattern: str, what: str) -> Check:
    """Text of which all matches."""
    expression = re.compile(pattern)

    def check(value: Any, where: str) -> str:
        text: str = _kind(value, str, where)
        if not expression.fullmatch(text):
            raise Unsafe(f"{where} is {_shown(text)}: expected {what}")
        return text

    return check


def boolean(value: Any, where: str) -> bool:
    """Check for true or false."""
    return bool(_kind(value, bool, where))


def integer(value: Any, where: str) -> int:
    """Check for an integer of 64 bits."""
    return integer_in(-(2**63), 2**63 - 1)(value, where)  # type: ignore[no-any-return]


def integer_in(low: int, high: int) -> Check:
    """Check for an integer from `low` to `high`."""

    def check(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Broken(f"{where} is {_shown(value)}: expected an integer from {low} to {high}")
        return value

    return check


def number(value: Any, where: str) -> float | str:
    """A float; those without digits are written as words."""
    if value in ("Infinity", "-Infinity", "NaN"):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Broken(f"{where} is {_shown(value)}: expected a number")
    return float(value)


_word = matching(r"\w{1,400}", "a word")
_path = matching(r"[\w\-+/: ]{1,400}(\.[\w\-+/: ]{1,400})*|", "names with dots between them")

#: Text that may be written between quotes into generated code.
plain = matching(r"[\w !#$%&()*+,\-./:;<=>?@\[\]^`{|}~]{0,1000}", "text without quotes, backslashes and control characters")
#: Text that PyTorch prints as a literal.
printed = matching(r"[\w !\"#$%&'()*+,\-./:;<=>?@\[\]^`{|}~]{0,10000}", "text without backslashes and control characters")


def word(value: Any, where: str) -> str:
    """Letters, digits and underscores; nothing of Python's own."""
    text: str = _word(value, where)
    if text.startswith("__"):
        raise Unsafe(f"{where} is {_shown(text)}: names of Python's own are not allowed")
    return text


def identifier(value: Any, where: str) -> str:
    """A name of a variable: PyTorch writes it into the Python code of the graph."""
    text = word(value, where)
    if not text.isidentifier() or keyword.iskeyword(text):
        raise Unsafe(f"{where} is {_shown(text)}: expected the name of a variable")
    return text


def path(value: Any, where: str) -> str:
    """The name of a parameter or a module: `layers.0.weight`."""
    text: str = _path(value, where)
    if any(part.startswith("__") for part in text.split(".")):
        raise Unsafe(f"{where} is {_shown(text)}: names of Python's own are not allowed")
    return text


def _kind(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise Broken(f"{where} is {_shown(value)}: expected {_KINDS[kind]}")
    return value


_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
