"""Optimize what can be captured of a model that cannot be captured whole: submodule by submodule, in a copy of the model.

The model runs on its example inputs and on variations of them (fewer images, other sizes). What every submodule is called with
is what it is captured with, and whatever varies over these calls stays free in the part. A part takes the place of its submodule
only if it agrees with it on every call that was seen; else the submodule's children are tried.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.capture.capture import arguments, cache_notes, shadow_of
from normfuse.described import first_line
from normfuse.errors import CaptureError, NormfuseError, UsageError
from normfuse.given.calls import Call, Signature, calls_of, survey
from normfuse.given.declared_inputs import declared_inputs
from normfuse.given.original import with_own_weights
from normfuse.given.sizes import probes, variations
from normfuse.numerics.compare import measure
from normfuse.pipeline.origin import origin_of
from normfuse.reports.model import Error, Part, PassReport, Site
from normfuse.reports.record import Record, record
from normfuse.reports.report import Report

__all__ = ["OptimizedPart", "whole_or_parts"]

log = logging.getLogger(__name__)

Optimize = Callable[..., fx.GraphModule]
"""`normfuse.optimize` with its options; it takes a program, its inputs and `calibration`."""

_CHOOSES = (
    "the outputs choose between candidates that are nearly equal: those of the original move as far when its submodules round "
    "otherwise; the parts were compared one by one"
)
_LONGEST = 200  # characters of a reason
_SHAKEN = 4  # times that the original runs with noise
_ROOM = 16  # calls of one submodule, of different sizes, that its part is compared on
_NORMS = {
    "BatchNorm": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm": "instance_norm",
}


class OptimizedPart(nn.Module):
    """Takes the place of a submodule: the same call, answered by its optimized graph.

    Args:
        path: of the submodule, for messages.
        graph: takes the tensors of a call, in the order of the flattened arguments.
        signature: how the submodule is called; anything but tensors must stay as it was.
    """

    def __init__(self, path: str, graph: fx.GraphModule, signature: Signature) -> None:
        super().__init__()
        self.path = path
        self.graph = graph
        self.signature = signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self.signature.tensors(args, kwargs)
        if tensors is None:
            raise UsageError(
                f"{self.path} was optimized for calls with ({self.signature}) and is called with other arguments; call the model "
                "as in example_inputs, or optimize it with an example of this call"
            )
        return self.graph(*tensors)


class _Called(nn.Module):
    """A submodule as a function of the tensors that it is called with."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.part = module
        self._signature = signature

    def forward(self, *tensors: Any) -> Any:
        args, kwargs = self._signature.call(tensors)
        return self.part(*args, **kwargs)


def whole_or_parts(
    optimize: Callable[..., fx.GraphModule],
    model: Any,
    example_inputs: Any,
    dynamic_shapes: Any,
    calibration: Any,
    options: dict[str, Any],
) -> Any:
    """The model as one graph where it can be captured; else a copy of it in eval mode whose submodules are optimized.

    Args:
        optimize: `normfuse.optimize`.
        model, example_inputs, dynamic_shapes, calibration: as it takes them. In parts every size that varies is free.
        options: its other arguments.

    Raises:
        UsageError: the model has to run and there are no example inputs.
        CaptureError: the model does not run on them.
    """
    batches = (
        list(calibration) if isinstance(calibration, Iterable) and not isinstance(calibration, Tensor | Mapping) else calibration
    )
    try:
        return optimize(model, example_inputs, dynamic_shapes=dynamic_shapes, calibration=batches, **options)
    except CaptureError as e:
        if not isinstance(model, nn.Module):
            raise
        log.info("%s is optimized by parts: %s", type(model).__name__, e)
    return _parts(model, example_inputs, functools.partial(optimize, **options), batches, verify=options.get("verify") != "off")


def _parts(model: nn.Module, example_inputs: Any, optimize: Optimize, batches: Any, *, verify: bool) -> nn.Module:
    start = perf_counter()
    args, kwargs = _inputs(model, example_inputs)
    copy, notes, caching = shadow_of(_own(model))
    notes += cache_notes(copy, caching, args, kwargs)
    runs = [(args, kwargs), *variations(args, kwargs)]
    calls, ran = survey(copy, runs)
    if 0 not in ran:
        _explain(copy, args, kwargs)
    work = _Work(copy, calls, runs, [arguments(batch) for batch in batches or ()], optimize)
    work.go()
    whole = work.settle(verify)
    report = _report(copy, work, whole, notes, perf_counter() - start)
    return Record(args, kwargs, True, None, report).attach(copy)


def _own(model: nn.Module) -> nn.Module:
    """A copy that shares nothing: it runs many times, and a model may write to its buffers; the user's stay as they are."""
    try:
        return with_own_weights(model)
    except Exception:  # what cannot be copied is refused by name
        return model


def _inputs(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given is not None:
        return arguments(given)
    declared = declared_inputs(model)
    if declared is None:
        raise UsageError(
            f"{type(model).__name__} declares no inputs, and partial=True has to run it: pass example_inputs, e.g. a batch that it "
            "is called with in use"
        )
    declared[1].pop("use_cache", None)
    return declared


def _explain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what the model raises on its example inputs, in one sentence."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as e:
        raise CaptureError(f"{type(model).__name__} does not run on example_inputs: {type(e).__name__}: {first_line(e)}") from e


@dataclass(frozen=True)
class _Done:
    """A part, its report, and its largest relative deviation from the submodule in the model's own dtype."""

    module: OptimizedPart
    report: Report
    drift: float


class _Work:
    """The search for parts.

    Attributes:
        parts: what was made of a module of the copy.
        left: path and reason of submodules that stay as they are.
        undone: parts that were taken back because the whole model did not run with them or was another function.
        chooses: the outputs of the original move far when its submodules round otherwise, so that they cannot be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: dict[nn.Module, list[Call]],
        runs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        optimize: Optimize,
    ) -> None:
        self.model, self.calls, self.runs, self.batches, self.optimize = model, calls, runs, batches, optimize
        self.paths = {m: path for path, m in reversed(list(model.named_modules()))}
        self.parts: dict[nn.Module, _Done] = {}
        self.left: dict[nn.Module, str] = {}
        self.undone: list[nn.Module] = []
        self.chooses = False
        self.places = [
            (parent, name, child) for parent in model.modules() for name, child in parent._modules.items() if child is not None
        ]
        self._seen: set[nn.Module] = {model}

    def go(self) -> None:
        """From the children of the model down, a wave at a time: what cannot be captured hands over to its children."""
        wave = list(self._below(self.model))
        while wave:
            needed = sorted({c.run for m in wave for c in self.calls[m]})
            samples = calls_of(self.model, [self.runs[i] for i in needed], wave, _ROOM)
            batches = calls_of(self.model, self.batches, wave, _ROOM * len(self.batches), alike=True)
            following: list[nn.Module] = []
            for module in wave:
                reason = self._part(module, samples[module], batches[module] or None)
                if reason is None:
                    continue
                below = list(self._below(module))
                following += below
                if not below:
                    self.left[module] = reason
                log.info("%s is no part: %s", self.paths[module], reason)
            wave = following

    def _below(self, module: nn.Module) -> Iterator[nn.Module]:
        """The nearest submodules that are called and worth a try, each once."""
        for child in module.children():
            if child in self._seen:
                continue
            self._seen.add(child)
            if not self.calls.get(child):
                yield from self._below(child)
            elif any(True for _ in child.children()) or not type(child).__module__.startswith("torch.nn."):
                yield child
            elif _norm(child):
                self.left[child] = "a layer on its own: what surrounds it is in no submodule that can be captured"

    def _part(self, module: nn.Module, samples: list[Any], batches: list[Any] | None) -> str | None:
        """Make the part of a submodule; why there is none, if so."""
        calls = self.calls[module]
        reason = _hindrance(module, calls, self.calls)
        if reason is not None:
            return reason
        signature = calls[0].signature
        free = signature.free(calls)
        example = signature.example(samples, free)
        called = _Called(module, signature).eval()
        try:
            program = _exported(called, example, free)
            graph = self.optimize(program, example, calibration=batches)
        except NormfuseError as e:
            return str(e)
        found = record(graph)
        assert found is not None
        if not found.report.applied:
            self.left[module] = "nothing to rewrite"
            return None
        others = [example, *samples, *probes(program, example, signature.linked(calls))]
        worst = _compared(called, graph, others, found.report)
        if isinstance(worst, str):
            return worst
        self.parts[module] = _Done(OptimizedPart(self.paths[module], graph, signature), found.report, worst)
        return None

    # -- the whole model -----------------------------------------------------------------------------------------------

    def put(self, parts: Sequence[nn.Module]) -> None:
        """These parts in their places, the submodules themselves in all others."""
        for parent, name, child in self.places:
            setattr(parent, name, self.parts[child].module if child in parts else child)

    def settle(self, verify: bool) -> Error | None:
        """Put the parts in place; take back those with which the whole model does not run or is another function."""
        run = self.runs[0]
        expected = _tensors(self.model, *run)
        self.put([])
        kept = list(self.parts)
        error = self._error(kept, run, expected)
        if error is not None and (_agree(error, expected) or self._lossy() or not verify):
            return error if verify else None
        if error is not None and self._chooses(run, expected):
            self.put(kept)
            self.chooses = True
            return None
        kept = []
        for module in self.parts:  # one that breaks the model alone is found in a pass
            error = self._error([*kept, module], run, expected)
            if error is not None and _agree(error, expected):
                kept.append(module)
            else:
                self.undone.append(module)
        return self._error(kept, run, expected)

    def _error(self, parts: Sequence[nn.Module], run: Any, expected: list[Tensor]) -> Error | None:
        """The error of the model with these parts; None where it does not run."""
        self.put(parts)
        try:
            return _difference(expected, _tensors(self.model, *run))
        except Exception as e:
            log.info("the model does not run with %d parts: %s", len(parts), e)
            return None

    def _lossy(self) -> bool:
        return any(p.sqnr is not None for part in self.parts.values() for p in part.report.passes)

    def _chooses(self, run: Any, expected: list[Tensor]) -> bool:
        """Do the outputs of the original move as far when its submodules round as their parts do (top-k, NMS)?"""
        self.put([])
        return any(not _agree(_difference(expected, self._shaken(run, seed)), expected) for seed in range(_SHAKEN))

    def _shaken(self, run: Any, seed: int) -> list[Tensor]:
        """Outputs of the original with noise on what the submodules return that have parts, as large as the part's deviation."""
        generator = torch.Generator().manual_seed(seed)

        def moved(x: Tensor, by: float) -> Tensor:
            if not x.is_floating_point() or not x.numel():
                return x
            return x + by * float(x.abs().max()) * torch.randn(x.shape, generator=generator).to(x)

        with ExitStack() as stack:
            for module, part in self.parts.items():
                by = max(part.drift, torch.finfo(torch.float32).eps)
                hook = functools.partial(lambda by, *call: pytree.tree_map_only(Tensor, lambda x: moved(x, by), call[-1]), by)
                stack.callback(module.register_forward_hook(hook).remove)
            return _tensors(self.model, *run)


def _hindrance(module: nn.Module, calls: list[Call], of: dict[nn.Module, list[Call]]) -> str | None:
    """Why a submodule cannot be replaced, as its calls tell."""
    if (why := next((c.why for c in calls if c.why), None)) is not None:
        return why
    inner = [m for m in module.modules() if m is not module]
    if any(_own_hooks(m) for m in (module, *inner)):
        return "it has hooks, which a part would not call"
    if any(module not in c.within for m in inner for c in of.get(m, ())):
        return "the model calls what is inside of it without calling it"
    if any(not c.signature.same(calls[0].signature) for c in calls[1:]):
        return "its calls differ in more than the sizes of tensors"
    return None


def _own_hooks(module: nn.Module) -> bool:
    """Hooks that may do anything; those of torch.nn.utils compute a weight, which capture sees."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not type(h).__module__.startswith("torch.nn.utils") for h in hooks)


def _exported(called: nn.Module, example: tuple[Tensor, ...], free: Sequence[tuple[int, ...]]) -> ExportedProgram:
    """The submodule as a program in which sizes that vary over its calls are free, unless it fixes them itself."""
    shapes = (tuple(dict.fromkeys(dims, Dim.AUTO) or None for dims in free),) if any(free) else None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return torch.export.export(called, example, dynamic_shapes=shapes, strict=False)
    except Exception as e:  # a submodule may hold anything, and its children come next
        raise CaptureError(f"it cannot be captured: {type(e).__name__}: {first_line(e)}"[:_LONGEST]) from e


def _compared(called: nn.Module, graph: nn.Module, inputs: Sequence[Any], report: Report) -> float | str:
    """The largest relative deviation of the part from the submodule, or where it is another function.

    Sizes that the submodule itself does not take are passed over.
    """
    lossy = any(p.sqnr is not None for p in report.passes)
    worst = 0.0
    for tensors in inputs:
        try:
            expected = _tensors(called, tensors, {})
        except Exception as e:
            log.debug("the submodule itself does not take these sizes: %s", e)
            continue
        sizes = ", ".join(str(list(t.shape)) for t in tensors)
        try:
            found = _tensors(graph, tensors, {})
        except Exception as e:
            return f"its part would not take inputs of sizes {sizes}: {type(e).__name__}: {first_line(e)}"[:_LONGEST]
        error = _difference(expected, found)
        if not (_agree(error, expected) or (lossy and math.isfinite(error.max_abs))):
            return f"its part is another function at sizes {sizes} (relative error {error.max_rel:.1e})"
        worst = max(worst, error.max_rel)
    return worst


def _tensors(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call returns; it gets copies, and the random state stays."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = module(*args, **kwargs)
    return [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]


def _difference(expected: list[Tensor], found: list[Tensor]) -> Error:
    dtype = next((str(t.dtype).removeprefix("torch.") for t in expected if t.is_floating_point()), "float32")
    same = [(a.shape, a.dtype) for a in expected] == [(b.shape, b.dtype) for b in found]
    return measure(expected, found, dtype) if same else Error(float("inf"), float("inf"), dtype)


def _agree(error: Error, expected: list[Tensor]) -> bool:
    """Rounding in the dtype of the outputs, and depth: half of the digits must agree."""
    eps = max((torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0.0)
    return bool(error.max_rel <= eps**0.5)


# -- report ------------------------------------------------------------------------------------------------------------


def _report(model: nn.Module, work: _Work, whole: Error | None, notes: tuple[str, ...], seconds: float) -> Report:
    """Totals over the parts, their sites under the paths of the whole model, and what stays as it is."""
    kept = {m: found for m, found in work.parts.items() if m not in work.undone}
    parts = [Part(work.paths[m], type(m).__name__, _under(part.report, work.paths[m])) for m, part in kept.items()]
    undone = "the whole model does not run with its part, or is another function"
    left = [Part(work.paths[m], type(m).__name__, None, reason) for m, reason in work.left.items()]
    left += [Part(work.paths[m], type(m).__name__, None, undone) for m in work.undone]
    reports = [p.report for p in parts if p.report is not None]
    staying = _norm_modules(model)
    said = dict.fromkeys(note for r in reports for note in r.notes)
    if work.chooses:
        said[_CHOOSES] = None
    return Report(
        passes=_summed([r.passes for r in reports]),
        exact=_worst([r.exact for r in reports]),
        drift=whole,
        norms_before=dict(sum((Counter(r.norms_before) for r in reports), Counter(staying))),
        norms_after=_with_zeros(sum((Counter(r.norms_after) for r in reports), Counter(staying)), [r.norms_after for r in reports]),
        parameters_before=sum(r.parameters_before for r in reports),
        parameters_after=sum(r.parameters_after for r in reports),
        bytes_before=sum(r.bytes_before for r in reports),
        bytes_after=sum(r.bytes_after for r in reports),
        notes=(f"captured by parts: {len(parts)} were optimized, {len(left)} submodules stay as they are", *notes, *said),
        seconds=seconds,
        nothing_compared=next((r.nothing_compared for r in reports), "") if all(r.nothing_compared for r in reports) else "",
        parts=(*parts, *sorted(left, key=lambda p: p.path)),
        origin=origin_of(model),
        calibration=next((r.calibration for r in reports if r.calibration is not None), None),
        capture_seconds=sum(r.capture_seconds for r in reports),
        verify_seconds=sum(r.verify_seconds for r in reports),
    )


def _with_zeros(counts: Counter[str], of: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: counts[kind] for kind in sorted({*counts, *(k for norms in of for k in norms)})}


def _under(report: Report, path: str) -> Report:
    """The report of a part with the paths of the whole model."""

    def moved(text: str) -> str:
        return path + text.removeprefix("part") if text == "part" or text.startswith("part.") else text

    def at(sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(
            replace(s, path=moved(s.path), blocker=moved(s.blocker), note=s.note.replace("part.", f"{path}.")) for s in sites
        )

    def layers(p: PassReport) -> Any:
        return tuple(replace(layer, path=moved(layer.path)) for layer in p.quantization)

    passes = tuple(
        replace(p, applied=at(p.applied), refused=at(p.refused), undone=at(p.undone), quantization=layers(p)) for p in report.passes
    )
    return replace(report, passes=passes)


def _summed(pipelines: Sequence[tuple[PassReport, ...]]) -> tuple[PassReport, ...]:
    """Pass by pass over all parts: the same pipeline ran on each."""
    return tuple(
        PassReport(
            rows[0].name,
            tuple(s for p in rows for s in p.applied),
            tuple(s for p in rows for s in p.refused),
            tuple(s for p in rows for s in p.undone),
            seconds=sum(p.seconds for p in rows),
            sqnr=min((p.sqnr for p in rows if p.sqnr is not None), default=None),
            quantization=tuple(layer for p in rows for layer in p.quantization),
        )
        for rows in zip(*pipelines, strict=True)
    )


def _worst(errors: Sequence[Error | None]) -> Error | None:
    worst: Error | None = None
    for error in errors:
        worst = error if worst is None else worst | error
    return worst


def _norm_modules(model: nn.Module) -> Counter[str]:
    """Norms of PyTorch's own classes that stay, outside of parts."""
    found: Counter[str] = Counter()
    inside = {m for part in model.modules() if isinstance(part, OptimizedPart) for m in part.modules()}
    for module in model.modules():
        if module not in inside and (kind := _norm(module)):
            found[kind] += 1
    return found


def _norm(module: nn.Module) -> str | None:
    """The kind of norm that a layer of PyTorch is; None if it is none."""
    return _NORMS.get(type(module).__name__.rstrip("123d"))
