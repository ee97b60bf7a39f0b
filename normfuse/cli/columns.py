"""What differs between two files or graphs, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["columns", "differences"]

_WIDTH = 80


def differences(left: Mapping[str, int], right: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Rows of the names that are counted differently, in alphabetical order; a dash for none."""
    names = sorted(n for n in {**left, **right} if left.get(n, 0) != right.get(n, 0))
    return [(n, str(left.get(n) or "-"), str(right.get(n) or "-")) for n in names]


def columns(head: tuple[str, str, str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Three columns of at most 80 letters together; what is longer is cut at its end."""
    table = [head, *rows]
    first = min(34, max(len(r[0]) for r in table))
    room = (_WIDTH - first - 4) // 2
    wide = [min(room, max(len(r[i]) for r in table)) for i in (1, 2)]

    def cut(text: str, width: int) -> str:
        return text if len(text) <= width else text[: width - 1] + "…"

    return [f"{cut(a, first):<{first}}  {cut(b, wide[0]):>{wide[0]}}  {cut(c, wide[1]):>{wide[1]}}".rstrip() for a, b, c in table]
