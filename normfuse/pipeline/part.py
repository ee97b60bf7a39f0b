"""A submodule and its optimized part: the same call, made from the calls that were seen, and held against the submodule on them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from normfuse.described import first_line
from normfuse.errors import CaptureError, UsageError
from normfuse.given.calls import Call, Signature
from normfuse.numerics.compare import measure
from normfuse.reports.model import Error
from normfuse.reports.report import Report

__all__ = ["Called", "OptimizedPart", "agree", "compared", "difference", "exported", "hindrance", "tensors_of"]

log = logging.getLogger(__name__)

_LONGEST = 200  # characters of a reason


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


class Called(nn.Module):
    """A submodule as a function of the tensors that it is called with."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.part = module
        self._signature = signature

    def forward(self, *tensors: Any) -> Any:
        args, kwargs = self._signature.call(tensors)
        return self.part(*args, **kwargs)


def hindrance(module: nn.Module, calls: list[Call], of: dict[nn.Module, list[Call]]) -> str | None:
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


def exported(called: nn.Module, example: tuple[Tensor, ...], free: Sequence[tuple[int, ...]]) -> ExportedProgram:
    """The submodule as a program in which sizes that vary over its calls are free, unless it fixes them itself."""
    shapes = (tuple(dict.fromkeys(dims, Dim.AUTO) or None for dims in free),) if any(free) else None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return torch.export.export(called, example, dynamic_shapes=shapes, strict=False)
    except Exception as e:  # a submodule may hold anything, and its children come next
        raise CaptureError(f"it cannot be captured: {type(e).__name__}: {first_line(e)}"[:_LONGEST]) from e


def compared(called: nn.Module, graph: nn.Module, inputs: Sequence[Any], report: Report) -> float | str:
    """The largest relative deviation of the part from the submodule, or where it is another function.

    Sizes that the submodule itself does not take are passed over.
    """
    lossy = any(p.sqnr is not None for p in report.passes)
    worst = 0.0
    for tensors in inputs:
        try:
            expected = tensors_of(called, tensors, {})
        except Exception as e:
            log.debug("the submodule itself does not take these sizes: %s", e)
            continue
        sizes = ", ".join(str(list(t.shape)) for t in tensors)
        try:
            found = tensors_of(graph, tensors, {})
        except Exception as e:
            return f"its part would not take inputs of sizes {sizes}: {type(e).__name__}: {first_line(e)}"[:_LONGEST]
        error = difference(expected, found)
        if not (agree(error, expected) or (lossy and math.isfinite(error.max_abs))):
            return f"its part is another function at sizes {sizes} (relative error {error.max_rel:.1e})"
        worst = max(worst, error.max_rel)
    return worst


def tensors_of(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call returns; it gets copies, and the random state stays."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = module(*args, **kwargs)
    return [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]


def difference(expected: list[Tensor], found: list[Tensor]) -> Error:
    """The deviation of `found`; infinite where shapes or dtypes differ."""
    dtype = next((str(t.dtype).removeprefix("torch.") for t in expected if t.is_floating_point()), "float32")
    same = [(a.shape, a.dtype) for a in expected] == [(b.shape, b.dtype) for b in found]
    return measure(expected, found, dtype) if same else Error(float("inf"), float("inf"), dtype)


def agree(error: Error, expected: list[Tensor]) -> bool:
    """Rounding in the dtype of the outputs, and depth: half of the digits must agree."""
    eps = max((torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0.0)
    return bool(error.max_rel <= eps**0.5)
