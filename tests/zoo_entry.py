"""What the zoo is made of: entries, seeds and norm statistics."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Entry", "named", "normal", "randomise_norms", "seeded"]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        build: makes the module: eval mode, always the same values.
        args, kwargs: example inputs, batch of 2 or more in front.
        traceable: False when only `torch.export` can capture it (its Python code looks at shapes or values).
    """

    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    traceable: bool = True


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every norm of `model` the look of a trained one, in place; uses the global random state.

    Running means N(0, 1), running variances U(.5, 2), gains ±U(.5, 1.5), shifts N(0, 1). A norm is a module whose class
    name contains `Norm`, whatever library it comes from (`BatchNormAct2d`, `LlamaRMSNorm`).
    """
    with torch.no_grad():
        for module in model.modules():
            if "norm" not in type(module).__name__.lower():
                continue
            for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                match name:
                    case "running_mean" | "bias" | "beta":
                        value.normal_()
                    case "running_var":
                        value.uniform_(0.5, 2)
                    case "weight" | "gamma":
                        sign = torch.randint(0, 2, value.shape).to(value.dtype) * 2 - 1
                        value.uniform_(0.5, 1.5).mul_(sign)
    return model


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`make` with a seed of its own, randomised norms and eval mode; the global random state stays as it was.

    `make` may define `finish(self)` on the module to set values after the randomisation.
    """

    @functools.wraps(make, updated=())
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(make.__name__.encode()))
            model = randomise_norms(make()).eval()
            getattr(model, "finish", lambda: None)()
            return model

    return build


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def named(*rows: tuple[Callable[[], nn.Module], tuple[Any, ...]]) -> dict[str, Entry]:
    """Entries by snake-case name of their class or function: `PreactResnet` is `preact_resnet`."""
    return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", make.__name__).lower(): Entry(seeded(make), args) for make, args in rows}
