"""What `normfuse bench` says of a language model that writes: its prompts and its steps against those of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normfuse.benchmark import Comparison
from normfuse.benchmark.against import Against
from normfuse.benchmark.comparison import Timing

__all__ = ["Written"]

_WIDE = 80
_NAME = 20  # columns of a name in the table; below it stands in full


@dataclass(frozen=True)
class Written:
    """One language model measured against one or more.

    Attributes:
        prompts, steps: comparisons of one prompt, and of one token behind it, with each rival, in the order of their names.
        prompt, tokens: lengths, in tokens.
        at_least: the demanded speedup of the steps; None for 1 minus the noise.
    """

    prompts: Sequence[Comparison]
    steps: Sequence[Comparison]
    prompt: int
    tokens: int
    at_least: float | None = None

    @property
    def claim(self) -> Against:
        """The claim is about the steps: they are what writing takes."""
        return Against(self.steps, self.at_least)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; rates in tokens a second."""
        decode = self.claim
        rows = [
            {
                "name": prompt.a.name, "prefill": self._prefill(prompt.a), "decode": _decode(step.a),
                "prefill_speedup": vars(prompt.speedup), "decode_speedup": vars(step.speedup),
            }
            for prompt, step in zip(self.prompts, self.steps, strict=True)
        ]  # fmt: skip
        own = {"name": self.steps[0].b.name, "prefill": self._prefill(self.prompts[0].b), "decode": _decode(self.steps[0].b)}
        return {
            "schema": 1, "prompt_tokens": self.prompt, "tokens": self.tokens, "verdict": decode.verdict.value, "measured": own,
            "against": rows, "prompts": Against(self.prompts).to_dict(), "steps": decode.to_dict(),
        }  # fmt: skip

    def __str__(self) -> str:
        """A table of at most 80 columns."""
        first, own = self.steps[0], self.steps[0].b
        width = min(_NAME, max(10, *(len(c.a.name) for c in self.steps), len(own.name)))
        rows = [f"{'tokens/s':<{width}} {'prefill':>8} {'decode':>8}  speedup in prefill, in decode"]
        for prompt, step in zip(self.prompts, self.steps, strict=True):
            speedups = f"{_short(prompt)}  {_short(step)}"
            rows.append(f"{_fit(step.a.name, width)} {self._prefill(prompt.a):>8.1f} {_decode(step.a):>8.1f}  {speedups}")
        rows.append(f"{_fit(own.name, width)} {self._prefill(self.prompts[0].b):>8.1f} {_decode(own):>8.1f}")
        rows += [
            "",
            f"prompt of {self.prompt} tokens, then {self.tokens}; medians of {first.rounds} rounds, interleaved",
            f"95 % intervals, above 1 is faster; {max(c.disturbed for c in self.steps):.0%} of turns disturbed by others",
            f"{first.threads} thread{'s' if first.threads > 1 else ''}, {first.machine.cpu}, {first.machine.cores} cores",
        ]
        for c in self.steps:
            rows.append(f"decode at least {c.bound(self.at_least):.3f}: {c.verdict(self.at_least).value} ({c.a.name})")
        return "\n".join(row if len(row) <= _WIDE else row[: _WIDE - 1] + "…" for row in rows)

    def _prefill(self, timing: Timing) -> float:
        return 1e3 * self.prompt / timing.median


def _decode(timing: Timing) -> float:
    return 1e3 / timing.median


def _short(c: Comparison) -> str:
    return f"{c.speedup.value:.2f} [{c.speedup.low:.2f}, {c.speedup.high:.2f}]"


def _fit(name: str, width: int) -> str:
    return f"{name if len(name) <= width else name[: width - 1] + '…':<{width}}"
