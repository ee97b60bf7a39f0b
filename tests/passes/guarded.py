"""What tests of guards share: the model runs optimized without a proof, and is compared in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import normfuse
from normfuse.reports.report import Report
from tests.zoo import randomise_norms

__all__ = ["Function", "left", "unproven"]


class Function(nn.Module):
    """A function of an input and of modules that it is given by name."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def unproven(model: nn.Module, *inputs: Any, given: bool = True, **options: Any) -> tuple[Any, Report]:
    """`optimize` with `verify="off"`, which takes no mistake back; the result must be the same function all the same.

    With `given=False` it is traced without the inputs, so that no shape is known.
    """
    model = randomise_norms(model).eval().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    fast = normfuse.optimize(model, inputs if given else None, verify="off", **options)
    assert not normfuse.report(fast).undone  # not even a pass that failed
    with torch.no_grad():
        expected, found = model(*inputs), fast(*inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * max(1.0, float(a.abs().nan_to_num(0, 0, 0).max())), equal_nan=True)
    return fast, normfuse.report(fast)


def left(report: Report) -> int:
    """Norms with running statistics that stay."""
    return report.norms_after.get("batch_norm", 0)
