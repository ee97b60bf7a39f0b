"""How an operator gets into `torch.ops.normfuse`: its meaning, its shapes, a kernel, and a backward that says there is none."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.gpu.loaded import CannotCompile
from normfuse.gpu.run import available

__all__ = ["define"]

_log = logging.getLogger(__name__)

# Kernels are set directly: `torch.library.custom_op` wraps each call once more, which costs as much as a small product.
_LIBRARY = torch.library.Library("normfuse", "FRAGMENT")


def define(
    schema: str,
    meaning: Callable[..., Any],
    shapes: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    *,
    gpu: Callable[..., Any] | None = None,
) -> None:
    """Register `torch.ops.normfuse.<name>`.

    Args:
        schema: "name(Tensor x, ...) -> Tensor"; a functional operator whose results share no memory with its arguments.
        meaning: the definition in plain PyTorch; it runs on every device that has no kernel.
        shapes: gives empty results of the right shape and dtype, with sizes that may be symbolic.
        kernel: for the CPU, or None.
        gpu: for CUDA, or None. It is called where Triton works and the first argument, a tensor, is not float64; else `meaning` is,
            as it is where a kernel cannot be compiled.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    if kernel is not None:
        _LIBRARY.impl(name, kernel, "CPU")
    if gpu is not None:
        _LIBRARY.impl(name, _where_triton_works(name, gpu, meaning), "CUDA")
    torch.library.register_fake(f"normfuse::{name}", shapes, lib=_LIBRARY)
    torch.library.register_autograd(f"normfuse::{name}", _no_backward(name), setup_context=_remember, lib=_LIBRARY)


def _where_triton_works(name: str, gpu: Callable[..., Any], meaning: Callable[..., Any]) -> Callable[..., Any]:
    """Asked when the operator is called, not when it is registered: to import normfuse must not import triton."""

    def kernel(x: Tensor, *args: Any) -> Any:
        if x.dtype is torch.float64 or not available(x.device):
            return meaning(x, *args)
        try:
            return gpu(x, *args)
        except CannotCompile as e:
            _told(name, str(e))
            return meaning(x, *args)

    return kernel


@functools.cache
def _told(name: str, why: str) -> None:
    """Once for each operator and reason."""
    _log.warning("normfuse::%s runs as PyTorch computes it: %s", name, why)


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
