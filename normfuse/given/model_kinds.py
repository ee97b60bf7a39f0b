"""What people pass as "the model": wrappers are looked through, what has no values or no Python code is refused by its kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normfuse.errors import UsageError
from normfuse.ir.guards import Guards

__all__ = ["check_hooks", "check_kind", "unwrapped", "unwrapped_inside"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, however deep."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def unwrapped_inside(model: nn.Module) -> None:
    """Wrappers around parts of `model` go, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if _inside(child) is not None:
                setattr(parent, name, unwrapped(child))


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.module
        return inner
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else None


def check_kind(model: nn.Module) -> None:
    """Raises a UsageError that names the kind of module and what to do, if it cannot be captured whatever its inputs."""
    own = set(model.modules())
    for path, module in model.named_modules():
        where = f"{type(module).__name__} at {path}" if path else type(module).__name__
        for name, held in _reached_by_functions(module):
            if held in own and any(m.training for m in held.modules()):
                raise UsageError(
                    f"{where}: the function {name} holds a module of the model that is in training mode, and a copy of the model "
                    "calls the same one: call model.eval() first, or make the function a method"
                )
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{where} is a TorchScript module (scripted or traced) without Python code: pass the nn.Module it was made from"
            )
        if isinstance(module, fx.GraphModule):
            check_hooks(module, where)
        for name, tensor in _own_tensors(module):
            _check_tensor(tensor, name, where)
        if any(isinstance(v, torch.ScriptObject) for v in (*vars(module).values(), *_packed(module))):
            raise UsageError(
                f"{where} holds packed weights, as torch.ao's quantized layers do, which no graph can read: "
                "pass the float model, and quantize= where integers are wanted"
            )


def check_hooks(graph: fx.GraphModule, where: str) -> None:
    """Raises a UsageError if somebody has hooked a graph: torch copies and captures graphs without their hooks."""
    hooks = [*graph._forward_hooks.values(), *graph._forward_pre_hooks.values()]
    if any(not isinstance(h, Guards) and not str(getattr(h, "__module__", "")).startswith("torch.") for h in hooks):
        raise UsageError(
            f"{where} is a graph with forward hooks, which are lost when a graph is copied: remove them, or hook a module "
            "around it (torch.nn.Sequential(graph))"
        )


def _reached_by_functions(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in the closures of functions that are attributes: a copy has the same functions, and they the same modules."""
    for name, value in vars(module).items():
        found = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for f in found if not name.startswith("_") else ():
            for cell in getattr(f, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    if isinstance(cell.cell_contents, nn.Module):
                        yield name, cell.cell_contents


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((n, t) for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None)


def _packed(module: nn.Module) -> Iterator[object]:
    """torch.ao keeps them one module deeper, which `named_modules` does not name."""
    held = getattr(module, "_packed_params", None)
    if isinstance(held, nn.Module):
        yield from vars(held).values()


def _check_tensor(tensor: Tensor, name: str, where: str) -> None:
    if is_lazy(tensor):
        raise UsageError(
            f"{where} is lazy, and its {name} is not initialized yet: call the model on an input once, then optimize it"
        )
    if tensor.is_meta:
        raise UsageError(
            f"{where} has its {name} on the meta device, without values: load the weights first, "
            "e.g. model.to_empty(device='cpu') and load_state_dict"
        )
    if tensor.is_quantized:
        raise UsageError(
            f"{where} has a quantized {name} ({tensor.dtype}): pass the float model, and quantize= where integers are wanted"
        )
    if is_traceable_wrapper_subclass(tensor):
        raise UsageError(
            f"{where} has a {type(tensor).__name__} as its {name}, a tensor that only its own library can read: "
            "pass the model with plain tensors (dequantized), and quantize= where integers are wanted"
        )
