"""`Operator`: what is known of an operator of `torch.ops.normfuse`, stated once; everything else reads it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.gpu.loaded import CannotCompile
from normfuse.gpu.run import available

__all__ = ["Operator"]

_log = logging.getLogger(__name__)

# Kernels are set directly: `torch.library.custom_op` wraps each call once more, which costs as much as a small product.
_LIBRARY = torch.library.Library("normfuse", "FRAGMENT")


#: Annotations of an operator's arguments, and how a schema writes them.
TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[int]: "int[]",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
}


@dataclass(frozen=True, eq=False)
class Operator:
    """A functional operator whose results share no memory with its arguments.

    Who exports it states the standard ops that it is in a file of `normfuse.export.ops`, by its name.

    Attributes:
        definition: what it means, in plain PyTorch. Its name is the operator's, its arguments and results are the schema. It runs
            on every device without a kernel, for float64, and where kernels are not there.
        shapes: gives empty results of the right shape and dtype, with sizes that may be symbolic.
        check: asked before `shapes` and the kernels; raises `UsageError`. None: they ask for themselves.
        cpu, gpu: the kernels, or None. `NotImplemented` in place of a result: the definition computes this call.
        functions: those of native/normfuse.h that `cpu` calls, those for its parts, and those by which they are tested.
        given: a named tuple of the arguments, where they are many: `shapes`, `check` and the kernels then take this one.
        like: which argument has the dtype that is computed in.
    """

    definition: Callable[..., Any]
    shapes: Callable[..., Any]
    check: Callable[..., object] | None = None
    cpu: Callable[..., Any] | None = None
    gpu: Callable[..., Any] | None = None
    functions: tuple[native.Function, ...] = ()
    given: Callable[..., Any] | None = None
    like: int = 0

    @property
    def name(self) -> str:
        """In `torch.ops.normfuse`."""
        return str(self.definition.__name__)

    @functools.cached_property
    def schema(self) -> str:
        """As PyTorch writes it, read from the annotations of the definition.

        Not by `torch.library.infer_schema`, to which an int is one that may be symbolic: widths, kernels and strides are numbers
        when a model is captured.

        Raises:
            TypeError: an annotation is none of `TYPES`, nor a tuple of tensors behind the arrow.
        """
        hints = get_type_hints(self.definition)
        returned = hints.pop("return", None)
        results = get_args(returned) if get_origin(returned) is tuple else (returned,)
        found = {**hints, **{f"result {i}": r for i, r in enumerate(results)}}
        wrong = [f"{name}: {hint}" for name, hint in found.items() if hint not in TYPES]
        if wrong:
            known = ", ".join(map(str, TYPES))
            raise TypeError(
                f"operator {self.name}: found {', '.join(wrong)}; expected arguments of {known}, and tensors as results"
            )
        arguments = ", ".join(
            f"{TYPES[hints[p.name]]} {p.name}" + ("" if p.default is p.empty else f"={_literal(p.default)}")
            for p in inspect.signature(self.definition).parameters.values()
        )
        back = ", ".join(TYPES[r] for r in results)
        return f"{self.name}({arguments}) -> {back if len(results) == 1 else f'({back})'}"

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the arguments that are tensors, or None in place of one."""
        return tuple(a.name for a in torch._C.parse_schema(self.schema).arguments if "Tensor" in str(a.type))

    def register(self) -> None:
        """Make `torch.ops.normfuse.<name>`: its meaning, its shapes, its kernels, and a backward that says there is none."""
        for function in self.functions:
            native.declare(function)
        _LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, self.definition, "CompositeExplicitAutograd")
        if self.cpu is not None:
            _LIBRARY.impl(self.name, self.on_cpu, "CPU")
        if self.gpu is not None:
            _LIBRARY.impl(self.name, self.on_gpu, "CUDA")
        torch.library.register_fake(f"normfuse::{self.name}", self._asked(self.shapes), lib=_LIBRARY)
        torch.library.register_autograd(f"normfuse::{self.name}", _no_backward(self.name), setup_context=_remember, lib=_LIBRARY)

    @functools.cached_property
    def on_cpu(self) -> Callable[..., Any]:
        """The kernel for CPUs in front of the definition."""
        return self._before(self._asked(self.cpu or _none), lambda _: native.available())

    @functools.cached_property
    def on_gpu(self) -> Callable[..., Any]:
        """The kernel for GPUs, where Triton works, in front of the definition."""
        return self._before(self._compiled(self._asked(self.gpu or _none)), lambda x: available(x.device))

    def _before(self, kernel: Callable[..., Any], works: Callable[[Tensor], bool]) -> Callable[..., Any]:
        """Asked when the operator is called, not when it is registered: to import normfuse must not import triton."""
        definition, like = self.definition, self.like

        def run(*args: Any) -> Any:
            x = args[like]
            if x.dtype is not torch.float64 and works(x):
                found = kernel(*args)
                if found is not NotImplemented:
                    return found
            return definition(*args)

        return run

    def _asked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` behind the check, on the arguments as it wants them."""
        check, given = self.check, self.given
        if check is None:
            return function if given is None else lambda *args: function(given(*args))

        def asked(*args: Any) -> Any:
            args = args if given is None else (given(*args),)
            check(*args)
            return function(*args)

        return asked

    def _compiled(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            try:
                return kernel(*args)
            except CannotCompile as e:
                _told(self.name, str(e))
                return NotImplemented

        return compiled


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _none(*args: Any) -> Any:
    return NotImplemented


@functools.cache
def _told(name: str, why: str) -> None:
    """Once for each operator and reason."""
    _log.warning("normfuse::%s runs as PyTorch computes it: %s", name, why)


# -- no backward ---------------------------------------------------------------------------------------------------------


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.like = [(tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) and v.requires_grad else None for v in inputs]


def _no_backward(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # An operator and not an exception: torch.compile traces the backward of everything that requires a gradient, and most
        # of what it traces is never run.
        grad = next(g for g in grads if g is not None)
        return tuple(
            None if like is None else torch.ops.normfuse.no_backward(grad, like[0], name).to(dtype=like[1], device=like[2])
            for like in ctx.like
        )

    return backward


def _refuse(grad: Tensor, shape: list[int], name: str) -> Tensor:
    raise UsageError(
        f"normfuse::{name} has no backward: it is made for inference. Call the model under torch.no_grad(), or train with the "
        "layers of normfuse.nn and quantize afterwards"
    )


_LIBRARY.define("no_backward(Tensor grad, SymInt[] shape, str name) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("no_backward", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("normfuse::no_backward", lambda grad, shape, name: grad.new_empty(shape), lib=_LIBRARY)
