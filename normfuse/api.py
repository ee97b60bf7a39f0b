"""`normfuse.optimize`: capture, rewrite, prove, report."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, fx, nn

from normfuse.capture.capture import Captured, arguments, as_given, calls_of, capture, flat_inputs
from normfuse.errors import UsageError, did_you_mean
from normfuse.given.extra_entries import taken
from normfuse.given.original import Call
from normfuse.given.ranges import out_of_range
from normfuse.ir.census import census
from normfuse.ir.graph import Graph
from normfuse.ir.guards import guarded_inputs
from normfuse.ir.passes import Pass, Run, Samples
from normfuse.numerics.batches import Batches
from normfuse.passes import DEFAULT, PASSES, PassName
from normfuse.passes.affine.folding import known_values
from normfuse.passes.quantize.nothing import check_quantized
from normfuse.pipeline.blocks import blocks
from normfuse.pipeline.figures import fates, last_word, operators, paired, recognised, tensor_sizes
from normfuse.pipeline.origin import origin_of
from normfuse.pipeline.partial import whole_or_parts
from normfuse.proof.prove import Proof, run
from normfuse.proof.returned import settle
from normfuse.quant.scheme import Scheme
from normfuse.quant.words import Widths, scheme_of
from normfuse.ranks import everywhere, several_ranks
from normfuse.reports.model import Calibration, PassReport
from normfuse.reports.record import Record
from normfuse.reports.record import report as report_of
from normfuse.reports.report import Report
from normfuse.surroundings import undisturbed

__all__ = ["DEFAULT", "VERIFY", "Pass", "Verify", "optimize"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Named = PassName | Pass | Callable[[Graph], PassReport]  # what `passes=` takes

Verify = Literal["end", "each", "off"]
VERIFY: tuple[str, ...] = get_args(Verify)
"""What `verify=` may say."""
_CALIBRATION_BYTES = 1 << 31  # that batches may hold


def optimize(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    passes: Sequence[Named] | None = None,
    quantize: Scheme | Widths | None = None,
    calibration: Any = None,
    verify: Verify = "end",
    partial: bool = False,
    allow_random_calibration: bool = False,
    target: Literal["pytorch"] | None = None,
) -> fx.GraphModule:
    """A new module that computes the same function without what normalization costs at inference.

    Args:
        model: an `nn.Module`, an `fx.GraphModule` or an `ExportedProgram`; it is not changed.
        example_inputs: a tuple of positional inputs or a dictionary of keyword inputs. Without them, inputs that the model declares
            are used (timm, Hugging Face, torchvision), else the model is traced without shapes; rules that need one then refuse.
        dynamic_shapes: as in `torch.export.export`; without it all sizes are those of the example.
        passes: names of passes (`normfuse.passes.PASSES`) or pass objects; None for the default pipeline, whose passes the
            name "default" stands for, as in `["default", "compress"]`; `depth_scale` finds its place among them itself.
        quantize: a `ShiftQuant`, or its words as the command line takes them ("w4a8", "w8a8,static,groups=1"): layers become
            integer operators once all other passes have run. The report has a table of the layers, `Report.quantization`.
        calibration: batches of inputs, each as `example_inputs`, for whatever takes constants from data (`quantize`, the pass
            `l1`). They are held in memory; after 2 GiB no more are read. None lets them use `example_inputs`. Under
            `torch.distributed` every rank gives its own batches, and all ranks quantize alike.
        verify: "end" compares the final graph with the original in float64 and in the model's own dtype, and takes
            back every rewrite that is not exact; "each" does so after each pass; "off" compares nothing.
        partial: True optimizes a model that cannot be captured whole by parts: it returns a copy of the model (an `nn.Module`)
            in which submodules that can be captured are optimized and the rest stays as it is; the report has a part for each.
        allow_random_calibration: static scales of a `ShiftQuant` come from data and stay for good, so that without `calibration=`
            they are refused; True takes them from the example inputs, whatever these are.
        target: "pytorch": the module is for PyTorch on this CPU. Attention that is spelled out becomes PyTorch's operator, masks
            that hide nothing go, and operators side by side become one of our kernels: kind by kind, where the model measures
            faster with it on the example inputs; the report has the others with what was measured. Such a module has no backward
            where it has our kernels. None leaves that to whoever exports it.

    Returns:
        An `fx.GraphModule` with the call signature of the model. `normfuse.report` says what was done to it.

    Raises:
        CaptureError: the model could not be traced.
        UsageError: an argument is wrong, or `quantize` has quantized no layer at all; the message says why.
    """
    scheme = None if quantize is None else scheme_of(quantize)
    options = {
        "passes": passes,
        "quantize": scheme,
        "verify": verify,
        "allow_random_calibration": allow_random_calibration,
        "target": target,
    }
    made = (whole_or_parts if partial else _whole)(_optimize, model, example_inputs, dynamic_shapes, calibration, options)
    if quantize is not None:
        check_quantized(report_of(made))
    return made  # type: ignore[no-any-return]


def _whole(optimize: Any, model: Any, example_inputs: Any, dynamic_shapes: Any, calibration: Any, options: dict[str, Any]) -> Any:
    return optimize(model, example_inputs, dynamic_shapes=dynamic_shapes, calibration=calibration, **options)


def _optimize(
    model: Any, example_inputs: Any = None, *, dynamic_shapes: Any = None, passes: Sequence[Named] | None = None,
    quantize: Scheme | None = None, calibration: Any = None, verify: str = "end", allow_random_calibration: bool = False,
    target: str | None = None,
) -> fx.GraphModule:  # fmt: skip
    start = perf_counter()
    pipeline = [*_pipeline(passes), *_quantization(quantize), *_kernels(target)]
    if verify not in VERIFY:
        raise UsageError(f"verify={verify!r}: expected one of {', '.join(map(repr, VERIFY))}{did_you_mean(verify, VERIFY)}")
    needs = "" if quantize is None else quantize.needs_data
    if needs and calibration is None and not allow_random_calibration:
        raise UsageError(
            f"{needs} takes its scales from data, and there is none: pass calibration=[batch, ...] "
            "(calibration=[example_inputs] where those are real), or allow_random_calibration=True to try it out"
        )
    with undisturbed():
        return _optimized(model, example_inputs, dynamic_shapes, pipeline, quantize, calibration, verify, start)


def _optimized(
    model: Any,
    example_inputs: Any,
    dynamic_shapes: Any,
    pipeline: list[Pass],
    quantize: Any,
    calibration: Any,
    verify: str,
    start: float,
) -> fx.GraphModule:
    given = as_given(model, example_inputs) if verify != "off" else None
    captured = capture(model, example_inputs, dynamic_shapes)
    capture_seconds = perf_counter() - start
    graph = Graph.of(captured.gm)
    original = graph.copy()
    inputs = flat_inputs(captured.gm, captured.args, captured.kwargs or {}) if captured.has_inputs else None
    proof = Proof(original, inputs, given, calls_of(captured.gm), known_values) if verify != "off" and inputs is not None else None
    samples, told = _on_all_ranks(lambda: _samples(graph, captured, calibration, inputs), quantize is not None)
    silent = "" if proof is None else proof.nothing_compared
    began = perf_counter()
    proven = run(graph, pipeline, proof, each=verify == "each", given=Run(samples))
    graph, reports = proven.graph, proven.reports
    verify_seconds = 0.0 if proof is None else max(0.0, perf_counter() - began - sum(r.seconds for r in reports))
    gm = graph.to_module(type(model).__name__ if not isinstance(model, fx.GraphModule) else "Optimized")
    notes = (*captured.notes, *_changes(pipeline, reports), *told, *proven.notes, *([silent] if silent else []))
    if given is not None and captured.has_inputs:
        call = Call(captured.args, captured.kwargs or {})
        notes += settle(gm, call, given.first(call))
    if quantize is not None and not samples:
        notes += ("not calibrated: quantized from the weights alone; pass example inputs or calibration=",)
    if verify != "off" and inputs is None:
        notes += ("not verified: the model was traced without example inputs",)
    was, now = recognised(original), recognised(graph)
    before, after = census(was), census(now) + _spelt_out(pipeline, reports)
    report = Report(
        tuple(last_word(reports)), proven.exact, proven.drift, *paired(before, after),
        *tensor_sizes(original, graph, quantize is not None), notes, perf_counter() - start, silent, origin=origin_of(model),
        calibration=_calibrated(samples, model, calibration, example_inputs) if quantize is not None else None,
        capture_seconds=capture_seconds, verify_seconds=verify_seconds,
        operators_before=operators(original), operators_after=operators(graph),
        norms=fates(was, now), blocks=blocks(was, now),
    )  # fmt: skip
    log.info("optimize: %d applied, %d refused in %.1f s", len(report.applied), len(report.refused), report.seconds)
    return Record(captured.args, captured.kwargs or {}, captured.has_inputs, captured.dynamic_shapes, report).attach(gm)


# -- pipeline ----------------------------------------------------------------------------------------------------------


def _pipeline(passes: Sequence[Named] | None) -> list[Pass]:
    """Pass objects by name; affines that nobody realised would be no operators of PyTorch, so `realise` comes last."""
    if passes is None:
        return [PASSES[name] for name in DEFAULT]
    if isinstance(passes, str):
        raise UsageError(f"passes={passes!r}: expected a list of names, e.g. [{passes!r}]")
    found = _expanded([p if p == "default" else _named(p) if isinstance(p, str) else _of(p) for p in passes])
    last = max((i for i, p in enumerate(found) if p.name == "realise"), default=None)
    settled = last is not None and not any(p.leaves_affines for p in found[last + 1 :])
    return found if settled else [*found, PASSES["realise"]]


def _expanded(passes: Sequence[str | Pass]) -> list[Pass]:
    """With its passes in the place of "default"; a pass that `precedes` one of these stands before it."""
    if "default" not in passes:
        return [p for p in passes if not isinstance(p, str)]
    early: dict[str, list[Any]] = {}
    for p in passes:
        early.setdefault("" if isinstance(p, str) else p.precedes, []).append(p)
    found: list[Pass] = []
    for p in early.pop("", []):
        found += [q for name in DEFAULT for q in (*early.pop(name, []), PASSES[name])] if isinstance(p, str) else [p]
    return found


def _quantization(spec: Scheme | None) -> list[Pass]:
    """The pass that quantizes; it comes last, on folded norms."""
    if spec is None:
        return []
    module, name = spec.rewritten_by
    return [getattr(importlib.import_module(module), name)(spec)]


def _kernels(target: str | None) -> list[Pass]:
    """What makes one operator of several where that is faster: the last passes, since no other looks into such an operator."""
    if target is None:
        return []
    if target != "pytorch":
        raise UsageError(f"target={target!r}: expected 'pytorch' or None; files for other runtimes are written by normfuse.export")
    from normfuse.passes.attention.eager import EagerAttention
    from normfuse.passes.attention.static_masks import StaticMasks
    from normfuse.passes.fuse import FUSED
    from normfuse.passes.fuse.kernels import KERNELS
    from normfuse.passes.fuse.measured import Measured

    torch_has = [Measured(each, ours=False) for each in (StaticMasks(), EagerAttention())]
    return [*torch_has, *(Measured(each) for each in (*FUSED, *KERNELS))]


def _on_all_ranks(read: Callable[[], T], together: bool) -> T:
    """What this rank reads; where ranks calibrate together, an error of one is an error of all, so that none waits for ever."""
    if not together or not several_ranks():
        return read()
    held: list[T] = []
    everywhere(lambda: held.append(read()))
    return held[0]


def _samples(graph: Graph, captured: Captured, calibration: Any, inputs: list[Any] | None) -> tuple[Samples, tuple[str, ...]]:
    """What passes may calibrate on: the calibration batches, else the example inputs; and what the user should know of it."""
    if calibration is None:
        return ([] if inputs is None else [inputs]), ()
    if isinstance(calibration, (Tensor, Mapping)) or not isinstance(calibration, Iterable):
        raise UsageError(f"calibration: expected an iterable of batches, got {type(calibration).__name__}; pass a list or a loader")
    fit = Batches(graph, inputs)
    batches: list[list[Any]] = []
    room = _CALIBRATION_BYTES
    told: tuple[str, ...] = ()
    for i, given in enumerate(calibration):
        batch, left_out = _batch(captured, given, i)
        if left_out:
            told = (*told, f"calibration: {left_out}") if f"calibration: {left_out}" not in told else told
        room -= sum(v.numel() * v.element_size() for v in batch if isinstance(v, Tensor))
        if room < 0 and batches:
            told += (f"calibration: the first {i} batches were used, which is what {_CALIBRATION_BYTES >> 20} MiB hold",)
            break
        batches += fit.fitted(batch, i)
    if not batches:
        raise UsageError("calibration: the loader gave no batch")
    if unlike := out_of_range(guarded_inputs(captured.gm), inputs, batches):
        log.warning("calibration: %s", unlike)
        told += (f"calibration: {unlike}",)
    return batches, told


def _calibrated(samples: Samples, model: Any, calibration: Any, example_inputs: Any) -> Calibration | None:
    """What the samples are, for the report."""
    if not samples:
        return None
    if calibration is not None:
        source = "calibration="
    else:
        declared = example_inputs is None and isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule)
        source = "random data" if declared else "the example inputs"
    first = [next((v for v in batch if isinstance(v, Tensor)), None) for batch in samples]
    count = sum(int(t.shape[0]) if t is not None and t.ndim else 1 for t in first)
    return Calibration(count, len(samples), source)


def _batch(captured: Captured, given: Any, i: int) -> tuple[list[Any], str]:
    """One value for each placeholder, and what of the batch the model does not take."""
    try:
        args, kwargs, left_out = taken(captured.gm, (captured.args, captured.kwargs or {}), *arguments(given))
        batch = flat_inputs(captured.gm, args, kwargs)
    except UsageError as e:
        raise UsageError(f"calibration: batch {i}: {str(e).removeprefix('example_inputs: ')}") from e
    for v in batch:
        if isinstance(v, Tensor) and v.is_floating_point() and bool(v.isnan().any()):
            raise UsageError(f"calibration: batch {i} ({tuple(v.shape)}) holds NaN; look at how it was made")
    return batch, left_out


def _changes(pipeline: Sequence[Pass], reports: Sequence[PassReport]) -> tuple[str, ...]:
    """What the user must not overlook: passes that are no identities and did something, and what others have to tell."""

    def said(p: Pass, r: PassReport) -> str:
        measured = "not measured" if r.sqnr is None else f"SQNR of the outputs {r.sqnr:.1f} dB"
        return f"{p.name} {p.changes}; {measured}"

    changing = [(p, r) for p, r in zip(pipeline, reports, strict=True) if p.changes and r.applied]
    found = [said(p, r) for p, r in changing if not r.quantization]  # what quantization costs leads the report
    told = [f"{p.name}: {site.note}" for p, r in zip(pipeline, reports, strict=True) if p.tells for site in r.applied]
    return tuple(dict.fromkeys(found + told))


def _of(given: Any) -> Pass:
    try:
        return Pass.of(given)
    except TypeError:
        hint = f"; pass an object of it, {given.__name__}()" if isinstance(given, type) else ""
        raise UsageError(f"passes: {given!r} is neither a name nor a pass (a callable with a `name`){hint}") from None


def _named(name: str) -> Pass:
    if name in PASSES:
        return PASSES[name]
    raise UsageError(f"there is no pass {name!r}{did_you_mean(name, PASSES)} (passes: {', '.join(PASSES)})")


def _spelt_out(pipeline: Sequence[Pass], reports: Sequence[PassReport]) -> Counter[str]:
    """Norms for which PyTorch has no operator, so that passes write them as arithmetic: `Pass.writes` is their kind."""
    found: Counter[str] = Counter()
    for p, r in zip(pipeline, reports, strict=True):
        found[p.writes] += len(r.applied)
    del found[""]
    return found
