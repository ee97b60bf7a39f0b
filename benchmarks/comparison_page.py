"""docs/comparison.md, from what `benchmarks.comparison` measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Row", "page"]

_TOOLS = """\
| tool | what it is for | beside normfuse |
|---|---|---|
| onnxslim, onnxsim | fold constants and drop nodes of an ONNX file | run them on our file if you like; they look at no weights |
| ONNX Runtime's optimizer | fuses when a session opens; always on | normfuse writes what it fuses well, and no more |
| torch.compile | generates kernels in PyTorch | takes what `fold` and `optimize` return |
| ONNX Runtime's quantizers | int8, dynamic and static | the better choice for convolutional nets |
| OpenVINO, NNCF | a runtime and its int8 | the better choice for convolutional nets on Intel's and AMD's CPUs |
| torchao | quantized layers in PyTorch | after `fold` |
| optimum, Olive, ModelOpt | recipes around exporters and quantizers | were not run here |
"""


@dataclass
class Row:
    """One way on one model.

    Attributes:
        title, command: what it is, and what anybody runs.
        exact: it is meant to be the same function.
        nodes, norms, megabytes: of its file; None for what runs in PyTorch.
        error: root mean square of the difference over that of the outputs.
        milliseconds: median of a call.
        speedup, low, high: against the original, with the 95 % interval.
        why_not: why it was not measured.
    """

    title: str
    command: str
    exact: bool
    nodes: int | None = None
    norms: int | None = None
    megabytes: float | None = None
    error: float | None = None
    milliseconds: float | None = None
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    why_not: str = ""

    def timed(self, milliseconds: float, speedup: float, low: float, high: float) -> None:
        """Set the measured time."""
        self.milliseconds, self.speedup, self.low, self.high = milliseconds, speedup, low, high


def page(data: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join(_lines(data)) + "\n"


def _lines(data: dict[str, Any]) -> Iterator[str]:
    machine, tools = data["machine"], data["tools"]
    yield "# How it compares"
    yield ""
    yield "<!-- written by python -m benchmarks.comparison; do not edit by hand -->"
    yield ""
    yield f"Measured on {data['date']}, with {data['threads']} threads of {machine['cpu']}, Python {machine['python']}: "
    yield ", ".join(f"{name} {version}" for name, version in tools.items()) + "."
    yield ""
    yield "Every row is the same model with the same inputs, in a process of its own, interleaved with the others. The speedup is"
    yield "over the original's default export in a default session of ONNX Runtime, with its 95 % interval. *Difference* is how far"
    yield "the outputs are from the original's, as a share of them (rms). Weights are random: time and size are real, and accuracy"
    yield "is not to be read from it. So normfuse rounds to the nearest here, and searches nothing."
    yield ""
    yield "To get the tables for your machine:"
    yield ""
    yield "<!-- not run: it measures for five minutes -->"
    yield "```sh"
    yield "pip install onnxslim onnxsim openvino nncf torchao   # what is missing is named in its row"
    yield "python -m benchmarks.comparison"
    yield "```"
    yield ""
    yield _TOOLS
    for model in data["models"]:
        yield from _model(model)


def _model(model: dict[str, Any]) -> Iterator[str]:
    rows = [Row(**row) for row in model["rows"]]
    yield f"## {model['title']}"
    yield ""
    yield f"The original against itself differs by {model['noise']:.1%}; differences below that are none."
    yield ""
    for title, exact in (("The same function", True), ("In integers", False)):
        yield f"**{title}**"
        yield ""
        yield "| | times as fast | ms | norms | nodes | MB | difference |"
        yield "|---|---|---|---|---|---|---|"
        yield from (_row(row) for row in rows if row.exact is exact)
        yield ""
    yield from _verdict(rows)
    yield "What was run:"
    yield ""
    yield from (f"* {row.title.replace('*', '')}: `{row.command}`" for row in rows)
    yield ""


def _row(row: Row) -> str:
    if row.why_not:
        return f"| {row.title} | not run: {row.why_not.replace('|', '/')} | | | | | |"
    speed = "" if row.speedup is None else f"{row.speedup:.3f} [{row.low:.3f}, {row.high:.3f}]"
    cells = (
        speed,
        _figure(row.milliseconds, ".2f"),
        _figure(row.norms, "d"),
        _figure(row.nodes, "d"),
        _figure(row.megabytes, ".1f"),
        "0" if not row.error else f"{row.error:.1e}" if row.error < 1e-3 else f"{100 * row.error:.2g} %",
    )
    return f"| {row.title} | " + " | ".join(cells) + " |"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _verdict(rows: list[Row]) -> Iterator[str]:
    """Who was fastest, said plainly, and whether it was one of ours."""
    for name, exact in (("Of the same function", True), ("In integers", False)):
        ran = [row for row in rows if row.exact is exact and row.speedup is not None and row.title != "the original"]
        if not ran:
            continue
        best = max(ran, key=lambda row: row.speedup or 0.0)
        ours = max((row for row in ran if "normfuse" in row.title), key=lambda row: row.speedup or 0.0, default=None)
        told = f"{name} the fastest was {best.title} ({best.speedup:.2f} times)"
        if ours is None or ours is best:
            yield told + "."
        else:
            overlap = (ours.high or 0.0) >= (best.low or 0.0)
            words = "which cannot be told from it" if overlap else "which is slower"
            yield f"{told}; ours was {ours.title} ({ours.speedup:.2f}), {words}."
    yield ""
