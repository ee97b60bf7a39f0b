"""A quantization in words, `w4a8,static,groups=1`: what `quantize=` and `--quantize` take beside a `ShiftQuant`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from normfuse.errors import UsageError, did_you_mean
from normfuse.quant.scheme import Scheme
from normfuse.quant.spec import ShiftQuant, choices

__all__ = ["Widths", "parse_quantize", "scheme_of"]

#: The words that need no more: a type checker then finds what is misspelt. Any other text is read by `parse_quantize`.
Widths = Literal[
    "w2a8", "w3a8", "w4a8", "w5a8", "w6a8", "w7a8", "w8a8",
    "w2a8,static", "w3a8,static", "w4a8,static", "w5a8,static", "w6a8,static", "w7a8,static", "w8a8,static",
]  # fmt: skip

_WIDTHS = re.compile(r"w(\d+)(?:a(\d+))?")
_EXAMPLE = "e.g. w4a8 or w4a8,static,groups=1"
_ELSEWHERE = {
    "keep": "keep= of normfuse.ShiftQuant", "overrides": "overrides= of normfuse.ShiftQuant", "weight_bits": "w4a8",
    "activation_bits": "w4a8",
}  # fmt: skip
_NUMBERS = ("percentile", "size_budget", "sqnr_budget")
_MAY_BE_NONE = ("embedding_bits", "size_budget", "sqnr_budget")


def scheme_of(given: Any) -> Scheme:
    """What `quantize=` was given, as a scheme.

    Raises:
        UsageError: it is neither a scheme nor words that are understood.
    """
    if isinstance(given, str):
        return parse_quantize(given)
    if isinstance(given, Scheme):
        return given
    said = "ShiftQuant without ()" if given is ShiftQuant else repr(given)
    raise UsageError(
        f"quantize={said}: expected a normfuse.ShiftQuant, e.g. ShiftQuant(weight_bits=4, activation_bits=8), or its words 'w4a8'"
    )


def parse_quantize(text: str, keep: tuple[str, ...] = ()) -> ShiftQuant:
    """`w4a8[,WORD][,NAME=VALUE]…` as a specification.

    A word is a value that only one field of `ShiftQuant` takes: `static`, `gptq`, `size`. Names and values are those of
    `ShiftQuant`.

    Args:
        text: the words.
        keep: patterns of module paths that stay in float.

    Raises:
        UsageError: a word, a name or a value is not known.
    """
    values: dict[str, Any] = {"keep": keep}
    for part in (p.strip() for p in text.split(",")):
        widths = _WIDTHS.fullmatch(part)
        name, equals, value = (p.strip() for p in part.partition("="))
        if widths is not None:
            values["weight_bits"] = int(widths[1])
            values |= {"activation_bits": int(widths[2])} if widths[2] else {}
        elif equals:
            values[name] = _value(text, name, value)
        elif part in _words():
            values[_words()[part]] = part
        else:
            raise UsageError(f"quantize={text!r}: {part!r} is not understood{_meant(part)}; {_EXAMPLE}")
    try:
        return ShiftQuant(**values)
    except UsageError as e:
        raise UsageError(f"quantize={text!r}: {e}") from e


def _fields() -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(ShiftQuant) if f.name not in _ELSEWHERE}


def _words() -> dict[str, str]:
    """Values that stand for themselves, with the field that takes them; `auto` and such, which two fields take, need a name."""
    found: dict[str, list[str]] = {}
    for name, values in choices().items():
        for value in values:
            found.setdefault(value, []).append(name)
    return {value: names[0] for value, names in found.items() if len(names) == 1 and value not in ("auto", "percentile")}


def _value(text: str, name: str, value: str) -> Any:
    fields = _fields()
    if name not in fields:
        where = f"; set it with {_ELSEWHERE[name]}" if name in _ELSEWHERE else did_you_mean(name, list(fields))
        raise UsageError(f"quantize={text!r}: ShiftQuant has no {name!r} to set here{where}")
    if value.lower() in ("none", "off") and name in _MAY_BE_NONE:
        return None
    if isinstance(fields[name], bool):
        if value.lower() not in ("true", "false", "on", "off", "1", "0"):
            raise UsageError(f"quantize={text!r}: {name}={value}: expected true or false")
        return value.lower() in ("true", "on", "1")
    if isinstance(fields[name], str):
        return value
    try:
        return float(value) if name in _NUMBERS else int(value)
    except ValueError as e:
        raise UsageError(f"quantize={text!r}: {name}={value}: expected a number") from e


def _meant(part: str) -> str:
    """int8 and its like are what others call it; the rest is misspelt."""
    bits = re.fullmatch(r"u?int(\d)|(?:q|i)(\d)", part.lower())
    if bits is not None:
        return f"; did you mean w{bits[1] or bits[2]}a8 (weights of {bits[1] or bits[2]} bits, activations of 8)?"
    widths = re.search(r"\d+", part) and re.match(r"[wa]", part.lower()) and re.findall(r"\d+", part)
    if widths and all(2 <= int(n) <= 8 for n in widths[:2]):
        weights, activations = (*widths, "8")[:2]
        return f"; did you mean 'w{weights}a{activations}'?"
    return did_you_mean(part, [*_words(), *_fields()])
