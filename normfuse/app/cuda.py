"""PyTorch models on another device and in another dtype."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normfuse.app.sources import Source
from normfuse.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["CPU", "DTYPES", "Placement", "for_onnxruntime", "in_dtype", "on_device", "to_device"]

#: Names on the command line, and torch's.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Placement:
    """Where and how a PyTorch model runs.

    Attributes:
        device: "cpu" or "cuda".
        dtype: a key of `DTYPES`; what a model in float32 is converted to before it runs.
        graph: on a GPU, replay a CUDA graph.
    """

    device: str = "cpu"
    dtype: Any = "fp32"
    graph: bool = True


CPU = Placement()


def in_dtype(source: Source, dtype: str) -> Source:
    """The model and its floating-point inputs in `dtype`, a key of `DTYPES`; the given ones are not changed.

    Raises:
        UsageError: the model is an exported program, whose dtype is fixed.
    """
    import torch

    if dtype == "fp32":
        return source
    if isinstance(source.model, torch.export.ExportedProgram):
        raise UsageError(f"{source.name} is an exported program, whose dtype is fixed: pass --dtype fp32, or name the model itself")
    return _converted(source, getattr(torch, DTYPES[dtype]))


def for_onnxruntime(source: Source) -> tuple[Source, str]:
    """The model in a dtype for which ONNX Runtime has kernels on the CPU, and the dtype that it was converted from, or "".

    A model in bfloat16 or float64 is converted to float32, which is what a user of that runtime would do.
    """
    import torch

    if isinstance(source.model, torch.export.ExportedProgram):
        return source, ""
    found = {t.dtype for t in (*source.model.parameters(), *source.model.buffers())}
    lacking = next((d for d in (torch.bfloat16, torch.float64) if d in found), None)
    if lacking is None:
        return source, ""
    return _converted(source, torch.float32), str(lacking).removeprefix("torch.")


def _converted(source: Source, wanted: torch.dtype) -> Source:
    given: Any = source.model
    model = copy.deepcopy(given).to(wanted)
    args, kwargs = _mapped((source.args, source.kwargs), lambda t: t.to(wanted) if t.is_floating_point() else t)
    return dataclasses.replace(source, model=model, args=args, kwargs=kwargs)


def to_device(values: Any, device: str) -> Any:
    """The same values with every tensor on `device`."""
    return _mapped(values, lambda t: t.to(device))


def on_device(module: nn.Module, device: str) -> nn.Module:
    """`module` on `device`, in place. A graph names the device of the tensors that it makes, and these move along."""
    import torch

    module.to(device)
    for part in module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in part.graph.nodes:
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                part.graph.erase_node(node)
                continue
            node.args, node.kwargs = torch.utils._pytree.tree_map(
                lambda v: torch.device(device) if isinstance(v, torch.device) else v, (node.args, node.kwargs)
            )
        part.recompile()
        for name, value in list(vars(part).items()):  # constants that are neither parameters nor buffers
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to(device))
    return module


def _mapped(values: Any, function: Any) -> Any:
    import torch

    return torch.utils._pytree.tree_map(lambda v: function(v) if isinstance(v, torch.Tensor) else v, values)
