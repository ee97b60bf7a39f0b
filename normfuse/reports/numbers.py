"""Numbers of a report as they are read: errors, times, bytes, changes."""

from __future__ import annotations

import math
from collections.abc import Callable

from normfuse.reports.model import Error, PassReport

__all__ = ["change", "duration", "exactness", "magnitude", "scientific", "size"]


def magnitude(error: Error | None) -> str:
    """The relative error in two digits; a dash where nothing was measured."""
    return "-" if error is None else scientific(error.max_rel)


def exactness(p: PassReport) -> str:
    """The relative error of an identity, or the SQNR of a pass that is none on purpose: `71.3 dB`.

    That of quantization stands at the head of the report, once.
    """
    return "-" if p.quantization else magnitude(p.exact) if p.sqnr is None else f"{p.sqnr:.1f} dB"


def scientific(value: float) -> str:
    """Two digits and an exponent: `3.1e-07`; zero, infinities and NaN as words."""
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else f"{value}"


def duration(seconds: float) -> str:
    """Three digits and a unit: `9 ms`, `1.25 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Bytes in decimal units: `18.6 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def change(before: int, after: int, show: Callable[[int], str] = "{:,}".format) -> str:
    """`200 → 150 (-25.0 %)`"""
    if before == after:
        return f"{show(before)}, unchanged"
    share = f"{(after - before) / before:+.1%}".replace("%", " %") if before else "+0.0 %"
    percent = "" if share[1:] == "0.0 %" else f" ({share})"
    was, now = show(before), show(after)
    return f"{now}{percent or ', about the same'}" if was == now else f"{was} → {now}{percent}"
