"""What was done to a model, what was refused and why, and how exact the result is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Block",
    "Calibration",
    "Error",
    "Form",
    "Latency",
    "LayerQuantization",
    "NormFate",
    "Origin",
    "Part",
    "PassReport",
    "ReportData",
    "Site",
]


@dataclass(frozen=True)
class Site:
    """One place in the model where a rule was applied or refused.

    Attributes:
        rule: name of the rule, e.g. `affine_into_producer`.
        path: module path of the place, e.g. `layer3.0.bn2`.
        note: for a refusal, the reason; for a rewrite, where it went.
        blocker: module path of the node that blocks a refused rewrite; empty when there is none.
        remedy: the cheapest change that would unblock a refused rewrite; empty when none is known.
    """

    rule: str
    path: str
    note: str = ""
    blocker: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Form:
    """What one attention, norm or quantized layer is in a file that was exported.

    Attributes:
        kind: `attention`, `norm` or `quantized`.
        path: module path of the site.
        form: what it is there: a form of attention, or the operator that stands for it.
        why: why it is not the form that was wanted for it; empty where it is.
        remedy: the cheapest change that would give it that form; empty when none is known.
    """

    kind: str
    path: str
    form: str
    why: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Error:
    """Largest deviation from the original model.

    Attributes:
        max_abs: largest absolute difference over all outputs.
        max_rel: largest over the outputs of (max |difference| / max |original|).
        dtype: dtype both models ran in, e.g. `float64`.
    """

    max_abs: float
    max_rel: float
    dtype: str

    def __or__(self, other: Error | None) -> Error:
        """The worse of both."""
        if other is None:
            return self
        return Error(max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel), self.dtype)


@dataclass(frozen=True)
class LayerQuantization:
    """What became of one layer that could be quantized.

    Attributes:
        path: module path of the layer.
        kind: `linear`, `conv2d`, `embedding` or `attention`; the last entry, of kind `model`, is that of the whole model.
        shape: of its weight: (out, in), (out, in / groups, height, width) or (rows, features).
        weight_bits: None for a layer that stays in float.
        activation_bits: of what it reads; None for weights only.
        activations: `dynamic`, `static`, or empty for weights only.
        groups: number of input channels with exponent 0, 1, 2, …
        sqnr: of the layer's output on the calibration data, with its own error alone, in dB (of the model's outputs, with
            that of all layers); None when there was no data.
        clipped: share of the values that it reads that lie outside of the integers' range; None when there was no data.
        bytes_before, bytes_after: of weights, scales, exponents and bias; a shared tensor counts at each of its readers, and
            once in the entry of the model.
        speedup: time in float over time in integers; None when it is not known.
        measured: was `speedup` measured on this machine? Else it is predicted.
        kept: why the layer stays in float; empty for a quantized one.
        sensitivity: (bits, SQNR of the model's outputs in dB with this layer alone quantized), where widths were searched.
    """

    path: str
    kind: str
    shape: tuple[int, ...] = ()
    weight_bits: int | None = None
    activation_bits: int | None = None
    activations: str = ""
    groups: tuple[int, ...] = ()
    sqnr: float | None = None
    clipped: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    speedup: float | None = None
    measured: bool = False
    kept: str = ""
    sensitivity: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: name of the pass.
        applied: rewrites that stand.
        refused: rewrites that were recognised and not allowed.
        undone: rewrites that were applied, failed verification and were taken back.
        exact: error of the graph after this pass in float64 (only with `verify="each"`).
        drift: error in the model's own dtype (only with `verify="each"`).
        seconds: wall time of the pass without verification.
        sqnr: of a pass that is no identity on purpose, the SQNR of the outputs after it against those before, in dB.
        quantization: one entry a layer that the pass quantized or kept in float.
    """

    name: str
    applied: tuple[Site, ...] = ()
    refused: tuple[Site, ...] = ()
    undone: tuple[Site, ...] = ()
    exact: Error | None = None
    drift: Error | None = None
    seconds: float = 0.0
    sqnr: float | None = None
    quantization: tuple[LayerQuantization, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """The data that quantized layers took their ranges from, and that their SQNR was measured on.

    Attributes:
        samples: number of samples, over all batches (size of the first axis of the first input).
        batches: number of batches.
        source: where they are from: `calibration=`, `the example inputs`, the name of a file, `random data`.
    """

    samples: int
    batches: int
    source: str

    def __str__(self) -> str:
        """`128 samples of images.npz`"""
        count = f"{self.samples:,} sample{'' if self.samples == 1 else 's'}"
        return f"{self.source} ({count})" if self.source.startswith(("random", "the example")) else f"{count} of {self.source}"


@dataclass(frozen=True)
class Origin:
    """Where a report comes from.

    Attributes:
        model: as the command line names it, else the class of the model.
        weights: what is known of them: `random (seed 0)`, `pretrained`, the name of a file; empty for a model of the user's.
        command: the command line; empty for a call from Python.
        date: of the run, UTC, e.g. `2026-11-30 01:40`.
        versions: of the libraries that take part, by name.
        machine: processor and number of cores that the process may use.
    """

    model: str
    weights: str = ""
    command: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""


@dataclass(frozen=True)
class NormFate:
    """What became of one normalization; the sites at its path say by which rule, or why not.

    Attributes:
        path: module path of the norm.
        kind: what it was, e.g. `layer_norm`.
        now: what stands in its place, e.g. `rms_norm`; empty where nothing is left of it.
    """

    path: str
    kind: str
    now: str = ""


@dataclass(frozen=True)
class Block:
    """Blocks of the model that are alike, as the operators that they compute, in order; what only moves data is left out.

    Attributes:
        paths: module paths of the blocks; an empty path is what stands in the model itself.
        before: names of operators in the model as it was.
        after: names of operators in the result.
    """

    paths: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Latency:
    """One measured comparison: how fast the result is against something else.

    Attributes:
        engine: what was measured, e.g. `onnxruntime-optimized`.
        against: what it was measured against.
        milliseconds, against_milliseconds: median time of a call of either.
        speedup: time of `against` over time of `engine`, compared inside of rounds; above 1 the result is faster.
        low, high: ends of the interval that holds the speedup with 95 % confidence.
        threads: of each engine.
        verdict: `faster`, `slower`, or `undecided` where the machine was too busy or the interval holds 1 (`Comparison.verdict`).
    """

    engine: str
    against: str
    milliseconds: float
    against_milliseconds: float
    speedup: float
    low: float
    high: float
    threads: int = 1
    verdict: Literal["faster", "slower", "undecided"] = "undecided"


@dataclass(frozen=True)
class Part:
    """A submodule of a model that was optimized by parts.

    Attributes:
        path: module path of the submodule.
        kind: name of its class.
        report: what was done to it, with the paths of the whole model; None if it stays as it is.
        left: why it stays as it is; empty for an optimized one.
    """

    path: str
    kind: str
    report: ReportData | None = None
    left: str = ""


@dataclass(frozen=True)
class ReportData:
    """What `optimize` did; `str(report)` is a table of at most 80 columns.

    With `partial=True`, where the model could not be captured whole, it sums over the parts: `exact` is the worst of theirs,
    `drift` that of the whole model, and norms of PyTorch's classes that stay outside of parts count among the norms.

    Attributes:
        passes: one entry a pass, in order.
        exact: error of the final graph in float64: is it an identity? None when it was not verified. Of a pipeline with
            passes that change the function on purpose (`PassReport.sqnr`), the largest error of the stretches between them.
        drift: error of the final graph in the model's own dtype. None when it was not verified.
        norms_before, norms_after: number of normalizations by kind, e.g. `{"batch_norm": 49}`.
        parameters_before, parameters_after: number of values in parameters and buffers that the graph reads.
        bytes_before, bytes_after: their size.
        notes: what else the user should know (training mode, dropped outputs, not verified and why).
        seconds: wall time of `optimize`, verification included.
        nothing_compared: why the comparison with the original tells nothing (all outputs are zero, say); empty when it does.
        parts: submodules that were optimized on their own and those that stay as they are; empty where the model is one graph.
        origin: model, command, date, versions, machine; None in a report that was made by hand.
        calibration: what quantized layers were calibrated on; None without `quantize=`, or where there was no data.
        capture_seconds: wall time of turning the model into a graph.
        operators_before, operators_after: number of operators in the graph by name; empty where the model was optimized by parts.
        files: what was exported from the result, a few lines of text for each file.
        norms: what became of each norm; empty where the model was optimized by parts.
        blocks: the model's blocks before and after; likewise.
        latencies: what was measured of the result; empty where nothing was.
        verify_seconds: wall time of comparing with the original; what is left of `seconds` went into the passes and the new module.
    """

    passes: tuple[PassReport, ...] = ()
    exact: Error | None = None
    drift: Error | None = None
    norms_before: dict[str, int] = field(default_factory=dict)
    norms_after: dict[str, int] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    nothing_compared: str = ""
    parts: tuple[Part, ...] = ()
    origin: Origin | None = None
    calibration: Calibration | None = None
    capture_seconds: float = 0.0
    verify_seconds: float = 0.0
    operators_before: dict[str, int] = field(default_factory=dict)
    operators_after: dict[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    norms: tuple[NormFate, ...] = ()
    blocks: tuple[Block, ...] = ()
    latencies: tuple[Latency, ...] = ()

    @property
    def applied(self) -> tuple[Site, ...]:
        return tuple(site for p in self.passes for site in p.applied)

    @property
    def refused(self) -> tuple[Site, ...]:
        return tuple(site for p in self.passes for site in p.refused)

    @property
    def undone(self) -> tuple[Site, ...]:
        return tuple(site for p in self.passes for site in p.undone)

    @property
    def quantization(self) -> tuple[LayerQuantization, ...]:
        """What became of each layer that could be quantized; empty without `quantize=`."""
        return tuple(layer for p in self.passes for layer in p.quantization)

    @property
    def sqnr(self) -> float | None:
        """SQNR of the outputs of a quantized model in dB, on the data of `calibration`; None if it was not measured."""
        whole = next((layer.sqnr for layer in self.quantization if layer.kind == "model"), None)
        return whole if whole is not None else next((p.sqnr for p in self.passes if p.quantization), None)

    def __bool__(self) -> bool:
        """Did anything change?"""
        return bool(self.applied)
