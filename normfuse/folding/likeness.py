"""Is a folded copy the model? In float64 as a graph, as a call where it was captured, at other sizes, with its flags turned."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normfuse.capture.capture import capture
from normfuse.described import dtype_name, first_line
from normfuse.folding.written_back import WrittenBack
from normfuse.given.flags import flagged
from normfuse.given.original import Call, Original, Returned
from normfuse.given.sizes import variations
from normfuse.ir.graph import Graph, identity_of
from normfuse.ir.wording import operator_name
from normfuse.numerics.evaluate import distance
from normfuse.passes import PASSES
from normfuse.proof.proof import Proof
from normfuse.reports.model import Error

__all__ = ["Likeness", "Verdict"]

log = logging.getLogger(__name__)

_SUMS = ("add", "sub", "mul", "div", "truediv", "pow")


@dataclass(frozen=True)
class Verdict:
    """Is the copy the model? `graph`: captured from it, with exact values; `fault`: why it is not; empty when it is."""

    fault: str = ""
    exact: Error | None = None
    drift: Error | None = None
    graph: Graph | None = None


@dataclass(frozen=True)
class Likeness:
    """What a copy is held against.

    Attributes:
        model: the model.
        given: the model as it is called; None where it cannot be.
        original: its graph.
        call: of the example inputs.
        asked: example inputs and dynamic shapes, as the user gave them.
        proof: of the graph; None where there are no inputs.
        proven: is the copy to be proven, or only called once?
    """

    model: nn.Module
    given: Original | None
    original: Graph
    call: Call
    asked: tuple[Any, Any]
    proof: Proof | None
    proven: bool

    def judge(self, back: WrittenBack, written: Graph) -> Verdict:
        """Of a copy, and of the graph that was written into it."""
        if self.proof is None:
            return Verdict(self._unlike_as_traced(back, written))
        if not self.proven:
            return Verdict(self._once(back.model))
        if not (back.values or back.became):
            same = self.proof.judge(self.original)
            return Verdict("", same.exact, same.drift, self.original)
        try:
            captured = capture(back.model, *self.asked)
            graph = back.exact(Graph.of(captured.gm))
        except Exception as e:  # code of the model, its `train` among it, which reads what is gone
            return Verdict(f"the folded model cannot be captured: {first_line(e)}")
        found = self.proof.judge(graph)
        fault = found.fault or self._other_calls(back.model)
        return Verdict(fault, found.exact, found.drift, graph)

    def _other_calls(self, model: nn.Module) -> str:
        """Why calls of the copy are not those of the model: their structure, their memory, and other sizes that the model takes."""
        if self.given is None or self.proof is None:
            return ""
        folded = Original(model)
        calls = [self.call, *(Call(*other) for other in variations(self.call.args, self.call.kwargs))]
        fault = next((fault for call in calls if (fault := self._unlike_at(folded, call))), "")
        if fault:
            return fault
        usual = self.given.native(self.call)
        for flag, call in flagged(self.model, self.call).items():
            fault = self._unlike_at(folded, call, usual)
            if fault:
                return f"with {flag} {fault}"
        return ""

    def _unlike_as_traced(self, back: WrittenBack, written: Graph) -> str:
        """Why the copy, traced without shapes, cannot be what was written; that it is the model cannot be seen there."""
        if not (back.values or back.became):
            return ""
        try:
            graph = Graph.of(capture(back.model, *self.asked).gm)
        except Exception as e:  # as in `judge`
            return f"the folded model cannot be captured: {first_line(e)}"
        PASSES["cleanup"](graph)
        if _said(graph) != _said(written):
            return "the code of the model computes something else where its modules are others"
        names = {identity_of(t): n for n, t in (*back.model.named_parameters(), *back.model.named_buffers())}
        read = {names.get(identity_of(c.tensor)) for c in graph.constants.values() if c.tensor is not None}
        unread = next((name for name in back.values if name not in read), "")
        return f"the code of the model does not read {unread}, which was to change" if unread else ""

    def _once(self, model: nn.Module) -> str:
        """Why the copy is not the model where it was captured. A model that gives other outputs each time is not asked."""
        if self.given is None:
            return ""
        runs = [self.given.native(self.call, again=again).outputs for again in (False, True)]
        if len(runs[0]) != len(runs[1]) or any(a.shape != b.shape or distance(a, b) for a, b in zip(*runs, strict=True)):
            return ""
        try:
            copied = Original(model)
        except Exception as e:
            return f"the folded model cannot be copied: {first_line(e)}"
        return self._unlike_at(copied, self.call)

    def _unlike_at(self, folded: Original, call: Call, usual: Returned | None = None) -> str:
        """Why a call of the copy is not that of the model; `usual`: only if the model returns what looks like this."""
        assert self.given is not None
        assert self.proof is not None
        try:
            expected = self.given.native(call)
        except Exception as e:  # a model need not take every size
            log.debug("the model does not take %s: %s", [_shape(v) for v in call.leaves], e)
            return ""
        if usual is not None and _unlike(usual, expected):  # values that flow between modules, say
            return ""
        sizes = ", ".join(_shape(v) for v in call.leaves if isinstance(v, Tensor))
        try:
            found = folded.native(call)
        except Exception as e:
            return f"it does not run at {sizes}: {first_line(e)}"
        why = self.proof.differs(self.given, call, expected.outputs, found.outputs)
        return f"at {sizes} {why}" if why else _unlike(expected, found)


def _said(graph: Graph) -> Counter[str]:
    """The operators, with the numbers that the code of a model adds and multiplies by."""
    return Counter(
        f"{operator_name(n)} {[a for a in n.args if isinstance(a, (int, float))] if operator_name(n) in _SUMS else ''}"
        for n in graph
        if n.op == "call_function"
    )


def _unlike(model: Returned, copy: Returned) -> str:
    if model.structure != copy.structure:
        return f"it returns {copy.structure}, the model {model.structure}"
    kinds = [[f"{dtype_name(t.dtype)}{list(t.shape)}" for t in r.outputs] for r in (model, copy)]
    if kinds[0] != kinds[1]:
        return f"it returns {kinds[1]}, the model {kinds[0]}"
    shared = [b for a, b in zip(model.origins, copy.origins, strict=True) if b and a != b]
    return f"an output would be the memory of {shared[0]}" if shared else ""


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
