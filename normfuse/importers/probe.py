"""Do two modules compute the same function? They are run in float64 on the same random inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.described import first_line
from normfuse.importers.family import Call, Random, Unrecognised

__all__ = ["Probe", "random_on"]

SAME = 1e-9
"""Relative difference in float64 below which two modules are one function; another ε shows at 1e-5."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Probe:
    """The answers of a module to some calls, to compare others with.

    Not the module itself is run but a copy with every tensor in float64, in eval mode unless `live`.

    Raises:
        Unrecognised: the module fails on one of the calls.
    """

    def __init__(self, module: nn.Module, calls: Sequence[Call], *, live: bool = False) -> None:
        try:
            copied = _exact(module)
        except Exception as e:  # whatever the module's own __deepcopy__ raises
            raise Unrecognised(f"cannot be copied ({first_line(e)})") from e
        if not live:
            copied.train(False)  # not eval(), which some classes override: as a child of a model it is not called
        self._calls = calls
        self._answers: list[list[Tensor]] = []
        for call in calls:
            try:
                self._answers.append(_run(copied, call))
            except Exception as e:  # code of the user's
                raise Unrecognised(f"fails on {_shapes(call)}: {type(e).__name__}: {first_line(e)}") from e

    def difference(self, replacement: nn.Module) -> str | None:
        """Why the replacement is not the same function of these inputs, as the rest of a sentence "it …"; None if it is."""
        ours = _exact(replacement).train(False)
        for call, expected in zip(self._calls, self._answers, strict=True):
            try:
                found = _run(ours, call)
            except Exception as e:  # an input that our layer refuses and theirs does not
                return f"takes {_shapes(call)}, which {type(replacement).__name__} does not: {first_line(e)}"
            reason = _deviation(expected, found)
            if reason is not None:
                return reason
        return None


def random_on(module: nn.Module) -> Random:
    """Random tensors in float64 where the module lives; the same ones for the same shapes."""
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    return random


class _Wide(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    """Where the code asks for float32, it gets float64: many official layers cast their input on the way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(
            lambda v: torch.float64 if isinstance(v, torch.dtype) and v in _FLOATS else v, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _exact(module: nn.Module) -> nn.Module:
    """A copy in float64, tensors that are plain attributes included."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        own = [t for t in vars(m).values() if isinstance(t, Tensor)]
        for t in (*m.parameters(recurse=False), *m.buffers(recurse=False), *own):
            exact = t.detach().to(torch.float64, copy=True) if t.is_floating_point() else t.detach().clone()
            memo[id(t)] = nn.Parameter(exact, requires_grad=False) if isinstance(t, nn.Parameter) else exact
    return copy.deepcopy(module, memo)


def _run(module: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"), _Wide():  # type: ignore[no-untyped-call]
        args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (call.args, call.kwargs))
        return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]


def _deviation(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    if [t.shape for t in expected] != [t.shape for t in found]:
        return f"gives {[tuple(t.shape) for t in expected]}; expected {[tuple(t.shape) for t in found]}"
    if not all(bool(t.isfinite().all()) for t in (*expected, *found)):
        return "gives values that are not finite"
    worst = max((_relative(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    return None if worst <= SAME else f"computes something else: its output differs by {worst:.1e} of its size"


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value in the same slice along any axis: a small channel counts, too."""
    if a.numel() == 0:
        return 0.0
    error, size = (a - b).abs(), a.abs()
    if float(error.max()) == 0.0:
        return 0.0
    worst = 0.0
    for axis in range(max(a.ndim, 1)):
        others = [i for i in range(a.ndim) if i != axis]
        e, s = (t.amax(others) if others else t for t in (error, size))
        worst = max(worst, float((e / s).nan_to_num(0.0, posinf=torch.inf).max()))
    return worst


def _shapes(call: Call) -> str:
    tensors = [v for v in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(v, Tensor)]
    return " and ".join(str(tuple(t.shape)) for t in tensors)
