"""What `normfuse bench` says of one engine against others: speedups, and how close each is to the float model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normfuse.benchmark import Comparison, Verdict

__all__ = ["Against"]

_WIDE = 80


@dataclass(frozen=True)
class Against:
    """One engine measured against one or more.

    Attributes:
        comparisons: with each of them, in the order in which they were named.
        at_least: the demanded speedup; None for 1 minus the noise.
        sqnr: of the outputs of each engine in dB against the float model, by name; empty where nothing is quantized.
        how: how engines of others were made, by name.
        calibrated: what they were calibrated on; empty where none was.
        clock: how a GPU was timed, as lines; empty on the CPU.
    """

    comparisons: Sequence[Comparison]
    at_least: float | None = None
    sqnr: Mapping[str, float] = field(default_factory=dict)
    how: Mapping[str, str] = field(default_factory=dict)
    calibrated: str = ""
    clock: str = ""

    @property
    def verdict(self) -> Verdict:
        """Fails where one comparison does, else undecided where one is: the claim is that all hold."""
        found = {c.verdict(self.at_least) for c in self.comparisons}
        return next((v for v in (Verdict.FAILS, Verdict.UNDECIDED) if v in found), Verdict.HOLDS)

    @property
    def worst(self) -> Comparison:
        """The comparison that decides the verdict."""
        return next(c for c in self.comparisons if c.verdict(self.at_least) is self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: of a single comparison its own entries, of several a list of them."""
        each = [
            c.to_dict() | {
                "at_least": c.bound(self.at_least), "verdict": c.verdict(self.at_least).value,
                "why_undecided": c.why_undecided(self.at_least),
            }
            for c in self.comparisons
        ]  # fmt: skip
        told: dict[str, Any] = {"verdict": self.verdict.value}
        if self.sqnr:
            told["sqnr"] = {name: value if math.isfinite(value) else None for name, value in self.sqnr.items()}
        if self.how:
            told |= {"how": dict(self.how), "calibrated_on": self.calibrated}
        return each[0] | told if len(each) == 1 else {"schema": 1, "comparisons": each} | told

    def __str__(self) -> str:
        rows = [self._table() if len(self.comparisons) > 1 else str(self.comparisons[0])]
        rows += self._quality()
        bounds = [f"at least {c.bound(self.at_least):.3f}: {c.verdict(self.at_least).value}" for c in self.comparisons]
        if len(self.comparisons) > 1:
            bounds = [f"{line} ({c.a.name})" for line, c in zip(bounds, self.comparisons, strict=True)]
        return "\n".join((*rows, *self.clock.splitlines(), *bounds))

    def _quality(self) -> list[str]:
        rows = [""] if self.sqnr or self.how else []
        if self.sqnr:
            cells = [f"{name} {_decibels(value)}" for name, value in self.sqnr.items()]
            rows += _wrapped("SQNR against the float model, dB: " + ", ".join(cells))
        for name, how in self.how.items():
            rows += _wrapped(f"{name}: {how}")
        return rows + (_wrapped(f"calibrated on {self.calibrated}") if self.calibrated else [])

    def _table(self) -> str:
        """A row for each engine, in at most 80 columns."""
        first, b = self.comparisons[0], self.comparisons[0].b
        names = [c.a.name for c in self.comparisons]
        width = min(28, max(12, *(len(n) for n in (*names, b.name))))
        last = f"speedup of {b.name}"
        rows = [f"{'engine':<{width}} {'median ms':>10} {'SQNR dB':>8}  {last}"[:_WIDE]]
        rows += [self._row(c.a.name, c.a.median, width, f"{c.speedup}") for c in self.comparisons]
        rows.append(self._row(b.name, b.median, width, ""))
        noise = ", ".join(f"{c.noise:.1%}" for c in self.comparisons)
        rows += [
            "",
            f"95 % intervals, above 1 is faster; noise of each against itself: {noise}",
            f"{first.rounds} rounds, interleaved, {first.disturbed:.0%} of turns disturbed by others",
            f"{first.threads} thread{'s' if first.threads > 1 else ''}, {first.machine.cpu}, {first.machine.cores} cores",
        ]
        return "\n".join(row if len(row) <= _WIDE else row[: _WIDE - 1] + "…" for row in rows)

    def _row(self, name: str, median: float, width: int, speedup: str) -> str:
        label = name if len(name) <= width else name[: width - 1] + "…"
        known = name in self.sqnr and not math.isnan(self.sqnr[name])
        quality = _decibels(self.sqnr[name]) if known else ""
        return f"{label:<{width}} {median:>10.3f} {quality:>8}  {speedup}".rstrip()


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else "not comparable" if math.isnan(value) else f"{value:.1f}"


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
