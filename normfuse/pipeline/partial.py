"""Optimize what can be captured of a model that cannot be captured whole: submodule by submodule, in a copy of the model.

The model runs on its example inputs and on variations of them (fewer images, other sizes). What every submodule is called with
is what it is captured with, and whatever varies over these calls stays free in the part. A part takes the place of its submodule
only if it agrees with it on every call that was seen; else the submodule's children are tried.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normfuse.capture.capture import arguments, cache_notes, shadow_of
from normfuse.described import first_line
from normfuse.errors import CaptureError, NormfuseError, UsageError
from normfuse.given.calls import Call, calls_of, survey
from normfuse.given.declared_inputs import declared_inputs
from normfuse.given.original import with_own_weights
from normfuse.given.sizes import probes, variations
from normfuse.pipeline.part import Called, OptimizedPart, agree, compared, difference, exported, hindrance, tensors_of
from normfuse.pipeline.parts_report import norm_of, report_of_parts, under
from normfuse.reports.model import Error, Part
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
_SHAKEN = 4  # times that the original runs with noise
_ROOM = 16  # calls of one submodule, of different sizes, that its part is compared on


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
    notes += (_CHOOSES,) if work.chooses else ()
    report = report_of_parts(copy, *work.listed(), whole, notes, perf_counter() - start)
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
            elif norm_of(child):
                self.left[child] = "a layer on its own: what surrounds it is in no submodule that can be captured"

    def _part(self, module: nn.Module, samples: list[Any], batches: list[Any] | None) -> str | None:
        """Make the part of a submodule; why there is none, if so."""
        calls = self.calls[module]
        reason = hindrance(module, calls, self.calls)
        if reason is not None:
            return reason
        signature = calls[0].signature
        free = signature.free(calls)
        example = signature.example(samples, free)
        called = Called(module, signature).eval()
        try:
            program = exported(called, example, free)
            graph = self.optimize(program, example, calibration=batches)
        except NormfuseError as e:
            return str(e)
        found = record(graph)
        assert found is not None
        if not found.report.applied:
            self.left[module] = "nothing to rewrite"
            return None
        others = [example, *samples, *probes(program, example, signature.linked(calls))]
        worst = compared(called, graph, others, found.report)
        if isinstance(worst, str):
            return worst
        self.parts[module] = _Done(OptimizedPart(self.paths[module], graph, signature), found.report, worst)
        return None

    def listed(self) -> tuple[list[Part], list[Part]]:
        """For the report: the parts that are in place, and the submodules that stay as they are."""

        def entry(module: nn.Module, report: Report | None, reason: str = "") -> Part:
            return Part(self.paths[module], type(module).__name__, report, reason)

        parts = [entry(m, under(p.report, self.paths[m])) for m, p in self.parts.items() if m not in self.undone]
        undone = "the whole model does not run with its part, or is another function"
        left = [entry(m, None, reason) for m, reason in self.left.items()]
        return parts, left + [entry(m, None, undone) for m in self.undone]

    # -- the whole model -----------------------------------------------------------------------------------------------

    def put(self, parts: Sequence[nn.Module]) -> None:
        """These parts in their places, the submodules themselves in all others."""
        for parent, name, child in self.places:
            setattr(parent, name, self.parts[child].module if child in parts else child)

    def settle(self, verify: bool) -> Error | None:
        """Put the parts in place; take back those with which the whole model does not run or is another function."""
        run = self.runs[0]
        expected = tensors_of(self.model, *run)
        self.put([])
        kept = list(self.parts)
        error = self._error(kept, run, expected)
        if error is not None and (agree(error, expected) or self._lossy() or not verify):
            return error if verify else None
        if error is not None and self._chooses(run, expected):
            self.put(kept)
            self.chooses = True
            return None
        kept = []
        for module in self.parts:  # one that breaks the model alone is found in a pass
            error = self._error([*kept, module], run, expected)
            if error is not None and agree(error, expected):
                kept.append(module)
            else:
                self.undone.append(module)
        return self._error(kept, run, expected)

    def _error(self, parts: Sequence[nn.Module], run: Any, expected: list[Tensor]) -> Error | None:
        """The error of the model with these parts; None where it does not run."""
        self.put(parts)
        try:
            return difference(expected, tensors_of(self.model, *run))
        except Exception as e:
            log.info("the model does not run with %d parts: %s", len(parts), e)
            return None

    def _lossy(self) -> bool:
        return any(p.sqnr is not None for part in self.parts.values() for p in part.report.passes)

    def _chooses(self, run: Any, expected: list[Tensor]) -> bool:
        """Do the outputs of the original move as far when its submodules round as their parts do (top-k, NMS)?"""
        self.put([])
        return any(not agree(difference(expected, self._shaken(run, seed)), expected) for seed in range(_SHAKEN))

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
            return tensors_of(self.model, *run)
