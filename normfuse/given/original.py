"""The model as the user gave it, run on copies: what every result is held against."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from normfuse.described import described, dtype_name, first_line
from normfuse.errors import CaptureError, NormfuseError, UsageError
from normfuse.importers import eval_mode
from normfuse.ir.attribute_names import readable
from normfuse.numerics.modes import NARROW, Float64, Stirred, Untouched, widened

__all__ = ["Call", "Original", "Returned", "loses_cache", "run", "with_own_weights", "without_cache"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """Arguments of a call.

    Attributes:
        args: positional ones.
        kwargs: keyword ones.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def mapped(self, change: Callable[[Any], Any]) -> Call:
        """With `change` applied to every leaf."""
        args, kwargs = pytree.tree_map(change, (self.args, self.kwargs))
        return Call(args, kwargs)

    def copied(self) -> Call:
        """With tensors of its own; one that stands twice is copied once."""
        memo: dict[int, Any] = {}

        def own(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return copy.deepcopy(value)
            if id(value) not in memo:
                memo[id(value)] = value.detach().clone().requires_grad_(False)
            return memo[id(value)]

        return self.mapped(own)

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))


@dataclass(frozen=True)
class Returned:
    """What a call left behind.

    Attributes:
        outputs: the tensors of the output, in order; behind them the inputs that the call wrote to.
        structure: of the output, with what is no tensor in it.
        origins: where the memory of each output comes from: `input 0`, `weight`, `output 1` (an earlier one), or empty for its own.
    """

    outputs: list[Tensor]
    structure: str
    origins: tuple[str, ...]


def run(module: Callable[..., Any], call: Call, weights: Sequence[Tensor]) -> Returned:
    """Call a module and note what came out, where it lies and what was written."""
    with _disable_current_modes():  # looking on is no part of the run
        before = [v.clone() if isinstance(v, Tensor) else None for v in call.leaves]
    out = module(*call.args, **call.kwargs)
    leaves, spec = pytree.tree_flatten(out)
    outputs = [v for v in leaves if isinstance(v, Tensor)]
    with _disable_current_modes():
        written = [v for v, old in zip(call.leaves, before, strict=True) if old is not None and not _equal(v, old)]
    others = [v for v in leaves if not isinstance(v, Tensor)]
    return Returned([*outputs, *written], f"{spec} {[_said(v) for v in others]}", _origins(outputs, call.leaves, weights))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    same = a == b
    return bool((same | (a != a) & (b != b)).all())  # NaN where NaN was


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"  # read out of a tensor, it carries roundings
    return repr(value) if isinstance(value, (bool, int, str, type(None))) else type(value).__name__


def _origins(outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor]) -> tuple[str, ...]:
    known: dict[int, str] = {}
    for t in weights:
        known.setdefault(memory(t), "weight")
    for i, t in enumerate(inputs):
        if isinstance(t, Tensor):
            known.setdefault(memory(t), f"input {i}")
    known.pop(0, None)
    found = []
    for i, t in enumerate(outputs):
        at = memory(t)
        found.append(known.get(at, ""))
        if at:
            known.setdefault(at, f"output {i}")
    return tuple(found)


def memory(t: Tensor) -> int:
    """Where a tensor's values lie; 0 where that cannot be told."""
    try:
        return t.untyped_storage().data_ptr()
    except (AttributeError, NotImplementedError, RuntimeError):  # sparse, opaque
        return 0


class Original:
    """A copy of the model, in eval mode, that shares its weights and never writes to them.

    Args:
        model: a module, a GraphModule or an ExportedProgram; it is not changed.
    """

    def __init__(self, model: Any) -> None:
        self._still = _copied(model)  # never run: models keep tables that they have computed, in the dtype of that run
        self._module = _copied(self._still)
        self._wide: nn.Module | None = None
        self._insists = False  # does it compare the dtype of its weights with that of its input?
        self._last: tuple[list[Any], Returned] | None = None  # of `native`: the example inputs are asked for more than once

    def native(self, call: Call, *, again: bool = False) -> Returned:
        """The model in its own dtypes.

        Args:
            call: arguments; they are not written to.
            again: run it also where it ran on this very call before.

        Raises:
            Exception: whatever the model raises.
        """
        leaves = call.leaves
        if again or self._last is None or not _same(self._last[0], leaves):
            self._last = leaves, self._native(call)
        return self._last[1]

    def _native(self, call: Call) -> Returned:
        try:
            with Untouched([*self._module.parameters(), *_attributes(self._module)]):
                return self._run(self._module, call.copied())
        except Exception as e:
            # embeddings with max_norm renormalize their table as they read it; older releases cannot run torch.cond under a mode
            log.debug("on weights of its own: %s", e)
            self._module = with_own_weights(self._still)
            return self._run(self._module, call.copied())

    def stirred(self, call: Call, seed: int, *, exact: bool) -> Returned:
        """With every result of arithmetic moved by up to one rounding."""
        if exact:
            return self._exact(call, Stirred(seed))
        with Stirred(seed):
            return self._run(with_own_weights(self._still), call.copied())

    def exact(self, call: Call) -> Returned:
        """The model in float64.

        Raises:
            Exception: an operator of the model has no float64 form.
        """
        return self._exact(call)

    def _exact(self, call: Call, *around: Any) -> Returned:
        if self._wide is None or around:
            self._wide = _copied(self._still)
            if self._insists:
                self._wide = with_own_weights(self._wide).double()
        try:
            return self._in_float64(self._wide, call.copied().mapped(widened), around)
        except Exception as e:
            if self._insists:
                raise
            log.debug("float64 with the weights as they are: %s", e)
        self._insists, self._wide = True, None
        return self._exact(call, *around)

    def _in_float64(self, module: nn.Module, call: Call, around: Sequence[Any]) -> Returned:
        with ExitStack() as stack:
            for mode in (*around, Float64(), _Epsilon(self._module)):
                stack.enter_context(mode)
            return self._run(module, call)

    def _run(self, module: nn.Module, call: Call) -> Returned:
        weights = [*module.parameters(), *module.buffers()]
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(module, call, weights)

    def first(self, call: Call) -> Returned:
        """The model's outputs on the example inputs.

        Raises:
            UsageError: an input has another dtype than the model computes in.
            CaptureError: the model does not run on these inputs.
        """
        try:
            return self.native(call)
        except NormfuseError:  # one of ours, called with inputs that it refuses
            raise
        except Exception as e:
            what = f"{type(e).__name__}: {first_line(e)}"
            self._check_dtypes(call, what)
            shapes = ", ".join(described(v) for v in call.leaves)
            raise CaptureError(f"{type(self._module).__name__} does not run on the example inputs ({shapes}): {what}") from e

    def _check_dtypes(self, call: Call, what: str) -> None:
        """Is it the dtype of an input? Only where the model runs once that one is another."""
        own = next((p.dtype for p in self._module.parameters() if p.is_floating_point()), torch.get_default_dtype())
        for name, value in _named(self._module, call):
            if isinstance(value, Tensor) and value.dtype != own and self._runs(call, value, own):
                dtype = dtype_name(own)
                raise UsageError(
                    f"input {name} is {dtype_name(value.dtype)}, the model computes in {dtype} ({what}); "
                    f"pass {name}.to(torch.{dtype})"
                )

    def _runs(self, call: Call, value: Tensor, dtype: torch.dtype) -> bool:
        try:
            self.native(call.mapped(lambda v: v.to(dtype) if v is value else v))
        except Exception:
            return False
        return True


class _Epsilon(TorchFunctionMode):
    """rms_norm without an ε takes that of the dtype it computes in; in a float64 run it keeps the one it has in the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        narrow = any(p.dtype in NARROW for p in module.parameters())
        self._eps = torch.finfo(torch.float32 if narrow else torch.float64).eps

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.rms_norm, nn.functional.rms_norm) and (len(args) < 4 or args[3] is None) and kwargs.get("eps") is None:
            args, kwargs = args[:3], kwargs | {"eps": self._eps}
        return func(*args, **kwargs)


def _copied(model: Any) -> nn.Module:
    if isinstance(model, ExportedProgram):
        model = readable(model).module()
    copied: nn.Module = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *_attributes(model))})
    if not isinstance(copied, fx.GraphModule):
        eval_mode(copied)
    without_cache(copied)
    return copied


def with_own_weights(model: nn.Module) -> nn.Module:
    """A copy that shares nothing; attributes that are computed from parameters, which cannot be copied otherwise, are cloned."""
    copied: nn.Module = copy.deepcopy(model, {id(t): t.detach().clone() for t in _attributes(model)})
    return copied


def _attributes(model: nn.Module) -> list[Tensor]:
    """Tensors that are plain attributes of modules, as those of old weight norm."""
    return [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]


def without_cache(model: nn.Module) -> list[Any]:
    """Switch off the caches of Hugging Face models, in place: a cache object is no output of a graph. The settings that changed."""
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    caching = [c for c in configs if getattr(c, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    return caching


def loses_cache(model: nn.Module, caching: Sequence[Any], call: Call) -> bool:
    """Does a call of the model return more where its caches are on? Encoders have the setting too, and nothing to keep.

    Args:
        model: with its caches off.
        caching: what `without_cache` changed.
        call: the example inputs.
    """
    if not caching:
        return False

    def structure() -> pytree.TreeSpec:
        own = call.copied()
        return pytree.tree_structure(model(*own.args, **own.kwargs))

    held = [*model.parameters(), *model.buffers(), *_attributes(model)]  # the user's own
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(), Untouched(held):
        warnings.simplefilter("ignore")
        try:
            without = structure()
            for config in caching:
                config.use_cache = True
            return structure() != without
        except Exception as e:  # capture tells why it does not run
            log.debug("the model does not run: %s", e)
            return False
        finally:
            for config in caching:
                config.use_cache = False


def _named(module: nn.Module, call: Call) -> list[tuple[str, Any]]:
    try:
        names = [*inspect.signature(module.forward).parameters]
    except (TypeError, ValueError):
        names = []
    names += [str(i) for i in range(len(names), len(call.args))]
    return [*zip(names, call.args, strict=False), *call.kwargs.items()]
