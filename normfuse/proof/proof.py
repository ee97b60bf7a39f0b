"""Is a rewritten graph the model? Compared with the module that the user gave, in its own dtypes and in float64.

Two bounds, each for its question. In float64 a rewrite is an identity or it is none. In the model's own dtypes it may move
values by roundings, as many as the depth of the model explains, and may neither overflow nor change a dtype. Both are relative
to the largest value of an output, or, where that is more, to how far the model itself moves when each of its operators rounds
another way: no comparison can tell more than that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from normfuse.described import dtype_name, first_line
from normfuse.errors import CaptureError, RewriteError, UsageError
from normfuse.given.original import Call, Original, Returned
from normfuse.ir.graph import Graph
from normfuse.numerics.compare import EXACT_BOUND, decibels, distance, is_float, like, magnitude, measure, nothing_in
from normfuse.numerics.evaluate import evaluate, shorten
from normfuse.numerics.modes import Stirred, widened
from normfuse.proof.overflow import in_range
from normfuse.reports.model import Error

__all__ = ["Proof", "Verdict", "moves"]

log = logging.getLogger(__name__)

_STIRS = 3  # runs with other roundings: the largest move of a few is what one comparison is held to
_MARGIN = 64.0  # moves: sums round inside of an operator too, where they are not stirred
_ROUNDINGS = {torch.float64: 32.0, torch.float32: 32.0, torch.float16: 4.0, torch.bfloat16: 4.0}
"""Roundings of an operator's result, as its own error. Half formats are summed in float32 and rounded once."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        exact: error in float64; None where the model has no float64 form.
        drift: error in the model's own dtypes; None where the comparison ended before.
        fault: why the graph is not the model, as the rest of a sentence about the rewrite; empty when it is.
    """

    exact: Error | None
    drift: Error | None
    fault: str = ""


class Proof:
    """Outputs of the model on the example inputs and on random ones, to compare rewritten graphs with.

    Args:
        original: the graph as captured.
        inputs: one example value for each placeholder.
        model: the module as it was given; None holds results against the graph alone.
        as_call: the call of the module for a list of values.
        known: what a graph computes from constants alone, by node; float64 runs take it, because roundings may decide there.
    """

    def __init__(
        self,
        original: Graph,
        inputs: Sequence[Any],
        model: Original | None = None,
        as_call: Callable[[Sequence[Any]], Call] | None = None,
        known: Callable[[Graph], Mapping[fx.Node, Any]] | None = None,
    ) -> None:
        self.inputs = inputs
        self._graph = original
        self._model = model if as_call is not None else None
        self._as_call = as_call
        self.known = known
        few = shorten(lambda values: self._runs(values), inputs)
        self._samples = [few, like(few, seed=0)]
        self._models: dict[bool, Original | None] = {True: self._model, False: self._model}  # by `exact`: who is the reference
        self._expected: dict[bool, list[list[Tensor]]] = {}
        self._floors: dict[bool, list[list[float]]] = {}
        self._without_float64 = ""
        self._vouched: dict[bool, bool] = {}  # by `exact`: does the captured graph equal the module?
        self._told: dict[str, None] = {}

    # -- what was found ------------------------------------------------------------------------------------------------

    def judge(self, graph: Graph) -> Verdict:
        """Is the graph the model?

        Raises:
            UsageError: the model does not give the same outputs twice.
            CaptureError: it is the captured graph that is another function.
        """
        exact: Error | None = None
        if self.has_float64:
            exact, fault = self._compared(graph, exact=True)
            if fault:
                return Verdict(exact, None, fault)
        drift, fault = self._compared(graph, exact=False)
        return Verdict(exact, drift, fault)

    def exact(self, graph: Graph) -> Error | None:
        """The error in float64: rounding only, if the graph is an identity of the original; infinite if it does not run."""
        return self._compared(graph, exact=True)[0] if self.has_float64 else None

    def drift(self, graph: Graph) -> Error:
        """The error in the model's own dtype."""
        return self._compared(graph, exact=False)[0]

    def holds(self, graph: Graph) -> bool:
        """Is the graph the same function, up to rounding?"""
        return not self.judge(graph).fault

    def differs(self, model: Original, call: Call, expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
        """Why these are no outputs of the model for that call, which may be of any size; empty when they are.

        In the model's own dtypes, within its bound, or else within what the model itself moves at that call.

        Args:
            model: as it was given.
            call: what it was called with.
            expected: its outputs.
            found: outputs of what is held against it.
        """
        bound = self._bound(expected)
        try:
            error = measure(expected, found, "")
            if error.max_rel > bound:
                floors = [m / bound for m in moves(expected, lambda seed: model.stirred(call, seed, exact=False).outputs)]
                error = measure(expected, found, "", floors)
        except RewriteError as e:
            return str(e)
        return "" if error.max_rel <= bound else _reason(replace(error, dtype=_native(expected)), bound, exact=False)

    def sqnr(self, graph: Graph) -> float:
        """Signal to quantization noise ratio of the outputs in dB: 10 log₁₀ (Σ y² / Σ (y − ŷ)²), in float64 where there is one."""
        exact = self.has_float64
        expected = self._outputs(exact)
        try:
            found = [self._evaluated(graph, values, exact) for values in self._inputs(exact)]
        except Exception as e:
            raise RewriteError(f"the rewritten graph does not run: {e}") from e
        return decibels(zip(expected, found, strict=False))

    @property
    def has_float64(self) -> bool:
        """Does the model run in float64, as it was given or as it was captured?"""
        while not self._without_float64 and True not in self._expected:
            try:
                self._outputs(exact=True)
            except Exception as e:
                log.info("no run in float64: %s", e)
                if self._models[True] is None:
                    self._without_float64 = first_line(e)
                self._models[True] = None
        return not self._without_float64

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the comparison."""
        found = [*self._told]
        if self._without_float64:
            dtype = _native(self._outputs(exact=False)[0])
            found.append(
                f"not proven in float64, compared in {dtype} only: the model has no float64 form ({self._without_float64})"
            )
        return tuple(found)

    @property
    def nothing_compared(self) -> str:
        """Why the comparison tells nothing; empty when it does."""
        return nothing_in(self._outputs(self.has_float64))

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _compared(self, graph: Graph, *, exact: bool) -> tuple[Error, str]:
        """The error, and why it is none that roundings make; empty when it is one."""
        expected = self._outputs(exact)
        dtype = "float64" if exact else _native(expected[0])
        try:
            found = [self._evaluated(graph, values, exact) for values in self._inputs(exact)]
            expected = expected if exact else self._in_range(expected, found)
            error = self._error(expected, found, dtype, None)
            fault = "" if exact else _other_dtypes(expected[0], found[0])
        except Exception as e:  # a wrong rewrite may fail in any operator
            log.debug("the rewritten graph does not run: %s", e)
            error, fault = Error(math.inf, math.inf, dtype), f"it does not run: {first_line(e)}"
            found = []
        bound = EXACT_BOUND if exact else self._bound(expected[0])
        if error.max_rel <= bound and not fault:
            return error, ""
        if self._models[exact] is not None and not self._captured(bound, exact=exact):
            return self._compared(graph, exact=exact)
        if found and not fault:
            floors = self._moves(bound, exact=exact)
            floored = self._error(expected, found, dtype, floors)
            if floored.max_rel <= bound:
                if not exact and self._chooses(expected, floors, bound):
                    self._told["the outputs choose between candidates: roundings of the model itself change which"] = None
                return floored, ""
            error = floored
        return error, fault or _reason(error, bound, exact=exact)

    def _error(
        self, expected: Sequence[list[Tensor]], found: Sequence[list[Tensor]], dtype: str, floors: Sequence[list[float]] | None
    ) -> Error:
        worst = Error(0.0, 0.0, dtype)
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            worst = worst | measure(a, b, dtype, None if floors is None else floors[i])
        return worst

    def _in_range(self, expected: Sequence[list[Tensor]], found: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """See `normfuse.proof.overflow`; where there is no float64, the outputs as they are."""
        finite = all(bool(t.isfinite().all()) for outputs in expected for t in outputs if is_float(t))
        if finite or not self.has_float64:
            return list(expected)
        truth = self._outputs(exact=True)[: len(expected)]
        changed = [in_range(a, b, e) for a, b, e in zip(expected, found, truth, strict=True)]
        if any(x is not y for a, b in zip(expected, changed, strict=True) for x, y in zip(a, b, strict=True)):
            told = (
                "in its own dtype the model as it was given gives NaN or Inf; where the result does not, float64 says what is right"
            )
            self._told[told] = None
        return changed

    @staticmethod
    def _chooses(expected: Sequence[list[Tensor]], floors: Sequence[list[float]], bound: float) -> bool:
        """Does the model move by more than a hundredth of its values when it rounds another way?"""
        return any(
            f * bound > _MARGIN * magnitude(t) / 100
            for a, b in zip(expected, floors, strict=True)
            for t, f in zip(a, b, strict=True)
        )

    def _bound(self, outputs: Sequence[Tensor]) -> float:
        """Roundings that add up at random over the depth of the model, in the coarsest dtype of its values."""
        dtypes = {v.dtype for n in self._graph.fx.nodes if isinstance(v := n.meta.get("val"), Tensor)} | {t.dtype for t in outputs}
        depth = sum(n.op == "call_function" for n in self._graph.fx.nodes)
        units = [torch.finfo(d).eps * roundings for d, roundings in _ROUNDINGS.items() if d in dtypes]
        return max(units, default=torch.finfo(torch.float32).eps) * math.sqrt(max(depth, 1))

    def _captured(self, bound: float, *, exact: bool) -> bool:
        """Does the module itself, captured and not rewritten, equal what was given? Else who is to blame is settled here."""
        if self._vouched.get(exact):
            return True
        self._repeats()
        expected = self._outputs(exact)
        try:
            found = [self._evaluated(self._graph, values, exact) for values in self._inputs(exact)]
            fault = "" if exact else _other_dtypes(expected[0], found[0])
            error = self._error(expected, found, "", self._moves(bound, exact=exact))
        except Exception as e:
            fault, error = f"it does not run: {first_line(e)}", Error(math.inf, math.inf, "")
        if error.max_rel <= bound and not fault:
            self._vouched[exact] = True
            return True
        if exact:  # what the model asks of a dtype it asks of float64 too: another function
            self._told[
                "in float64 the model as it was given is another function than in its own dtypes; there the proof starts at the "
                "captured graph"
            ] = None
            self._models[True] = None
            self._expected.pop(True, None)
            self._floors.pop(True, None)
            return False
        raise CaptureError(
            f"the captured graph is not the model: {fault or f'it is {error.max_rel:.1e} away on the example inputs'}; "
            "please report it, and pass an ExportedProgram (torch.export.export(model, args)) meanwhile"
        )

    def _repeats(self) -> None:
        """Does the model, called again, give what it gave? Else every comparison with it means nothing."""
        model = self._models[False]
        if model is None:
            return
        first, again = self._outputs(False)[0], self._called(partial(model.native, again=True), self._samples[0])
        if len(first) != len(again) or any(a.shape != b.shape for a, b in zip(first, again, strict=True)):
            far = math.inf
        else:
            far = measure(first, again, "").max_rel
        if far > self._bound(first):
            raise UsageError(
                "the model gives other outputs when it is called again with the same inputs, so that nothing can be proven; "
                'it may keep a state or draw random numbers of its own: make it a function of its inputs, or pass verify="off"'
            )

    # -- running -------------------------------------------------------------------------------------------------------

    def _outputs(self, exact: bool) -> list[list[Tensor]]:
        """Of the reference, one list a sample."""
        if exact not in self._expected:
            samples = self._inputs(exact)
            outputs = [self._reference(samples[0], exact)]
            if len(samples) > 1:
                try:
                    outputs.append(self._reference(samples[1], exact))
                except Exception as e:  # the model may object to inputs that are not its own
                    log.info("the original does not take random inputs (%s); verified on the example only", e)
                    del self._samples[1:]
            self._expected[exact] = outputs
        return self._expected[exact][: len(self._samples)]

    def _inputs(self, exact: bool) -> list[list[Any]]:
        """What is run: random inputs ask whether a rewrite is an identity, which float64 answers better where there is one."""
        return self._samples if exact or not self.has_float64 else self._samples[:1]

    def _reference(self, values: Sequence[Any], exact: bool) -> list[Tensor]:
        model = self._models[exact]
        if model is None:
            return self._evaluated(self._graph, values, exact)
        return self._called(model.exact if exact else model.native, values)

    def _called(self, method: Callable[[Call], Returned], values: Sequence[Any]) -> list[Tensor]:
        assert self._as_call is not None
        return method(self._as_call(values)).outputs

    def _moves(self, bound: float, *, exact: bool) -> list[list[float]]:
        """For each sample and output, the scale at which the model's own moves keep the bound; see `moves`."""
        if exact not in self._floors:
            self._floors[exact] = [
                moves(outputs, partial(self._stirred, values, exact=exact))
                for values, outputs in zip(self._inputs(exact), self._outputs(exact), strict=True)
            ]
        return [[m / bound for m in sample] for sample in self._floors[exact]]

    def _stirred(self, values: Sequence[Any], seed: int, *, exact: bool) -> list[Tensor]:
        model = self._models[exact]
        if model is not None:
            return self._called(partial(model.stirred, seed=seed, exact=exact), values)
        with Stirred(seed):
            return self._evaluated(self._graph, values, exact)

    def _evaluated(self, graph: Graph, values: Sequence[Any], exact: bool) -> list[Tensor]:
        """The tensors of the output, and behind them the inputs that the graph writes to."""
        with _disable_current_modes():  # looking on is no part of the run
            before = [widened(v) if exact else v for v in values]
            own = [v.clone() if isinstance(v, Tensor) else v for v in before]
            known = self.known(graph) if exact and self.known is not None else None
        outputs = evaluate(graph, own, exact=exact, known=known)
        with _disable_current_modes():
            written = [v for v, old in zip(own, before, strict=True) if isinstance(v, Tensor) and distance(old, v) > 0]
        return [*outputs, *written]

    def _runs(self, values: Sequence[Any]) -> None:
        self._evaluated(self._graph, values, False)
        if self._model is not None:
            self._called(self._model.native, values)


def moves(outputs: Sequence[Tensor], stirred: Callable[[int], Sequence[Tensor]]) -> list[float]:
    """For each output, how far it may be found: a margin times the most that it moves when the model rounds another way.

    Args:
        outputs: of the model.
        stirred: the same outputs with other roundings, by seed (`normfuse.numerics.modes.Stirred`).

    Returns:
        Absolute differences; infinite for integers and booleans that change, for positions of NaN that do, and for sizes.
    """
    worst = [0.0] * len(outputs)
    for seed in range(_STIRS):
        try:
            found = stirred(seed)
        except Exception as e:
            log.debug("the model does not run with other roundings: %s", e)
            break
        for i, (a, b) in enumerate(zip(outputs, found, strict=True)):
            far = distance(a, b) if a.shape == b.shape else math.inf
            worst[i] = max(worst[i], far if is_float(a) or far == 0 else math.inf)
    return [_MARGIN * w for w in worst]


def _native(outputs: Sequence[Tensor]) -> str:
    dtype = next((t.dtype for t in outputs if is_float(t)), torch.get_default_dtype())
    return dtype_name(dtype)


def _other_dtypes(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.dtype != b.dtype:
            return f"output {i} became {dtype_name(b.dtype)}, it was {dtype_name(a.dtype)}"
    return ""


def _reason(error: Error, bound: float, *, exact: bool) -> str:
    if exact:
        return "not an identity in float64"
    if math.isinf(error.max_rel):
        return f"the values do not fit into {error.dtype}: some are no longer finite, or no longer NaN"
    return f"it moves the outputs by {error.max_rel:.1e} in {error.dtype}, more than the roundings of such a model ({bound:.1e})"
