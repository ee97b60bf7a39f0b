"""Running statistics taken again over data: `calibrate`."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfuse.errors import UsageError
from normfuse.nn._statistics import Joint
from normfuse.nn.alpha import AlphaBatchNorm
from normfuse.nn.l1 import L1BatchNorm
from normfuse.progress import progress_bar
from normfuse.ranks import everywhere

__all__ = ["Calibrated", "calibrate"]

log = logging.getLogger(__name__)

T = TypeVar("T")

Forward = Callable[[nn.Module, Any], Any]


@runtime_checkable
class Calibrated(Protocol):
    """A layer whose running statistics `calibrate` can take again."""

    @property
    def calibration_stages(self) -> int:
        """How often the data is read; more than once where a statistic needs another one first."""
        ...

    def calibration_rows(self, found: tuple[Joint, ...], *args: Any, **kwargs: Any) -> Tensor:
        """The rows (rows, C) whose joint mean and variance the stage takes.

        Args:
            found: those of the stages before.
            args, kwargs: what the forward of the layer got.
        """
        ...

    def set_calibrated(self, found: tuple[Joint, ...], source_weight: float) -> None:
        """Write source_weight · old + (1 − source_weight) · new."""
        ...


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    source_weight: float = 0.0,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """A copy of the model with running statistics = source_weight · old + (1 − source_weight) · those of the loader's data.

    The data's mean and variance are those of all rows of all batches together, whatever the sizes of the batches. The norms
    are taken in the order in which the model runs them, each on what it gets after all before it have their new statistics,
    so that the loader is read once for each norm, up to that norm. A loader that can be read only once is kept in memory.

    Layers: `BatchNorm*` and subclasses, `AlphaBatchNorm` (frozen afterwards, its own `source_weight` is not used),
    `UnifiedNorm`, `PowerNorm`, `L1BatchNorm`, and every layer with the members of `Calibrated`. A layer that the
    forward does not reach keeps its statistics. A layer that is called several times in one forward gets the statistics of
    all calls, where the later ones still see the old statistics behind the first.

    Under `torch.distributed` every rank reads its own loader, and all ranks get the statistics of all data. The loaders may
    differ in length.

    Args:
        model: is not changed; the copy keeps its training flags, and runs in evaluation mode here.
        loader: gives tensors, tuples (the first element is the input) or dictionaries (keyword inputs); tensors go to the
            device of the model.
        source_weight: from 0 (the data alone) to 1 (nothing changes).
        forward: called with (model, item) instead, for other items.
        progress: False for no bar; otherwise there is one if standard error is a terminal.

    Returns:
        The copy.

    Raises:
        UsageError: the loader is empty or a single batch, the model has no such layer or reaches none, a forward fails,
            statistics are not finite.

    Source:
        "Test-time Batch Statistics Calibration for Covariate Shift" (2021), with the mixture stored.
    """
    if not 0 <= source_weight <= 1:
        raise UsageError(f"source_weight={source_weight}: expected a number from 0 (the data alone) to 1 (nothing changes)")
    if isinstance(loader, (Tensor, Mapping)) or not isinstance(loader, Iterable):
        raise UsageError(f"loader is {type(loader).__name__}; expected an iterable of batches, for one batch [batch]")
    new = copy.deepcopy(model)
    modes = [(module, module.training) for module in new.modules()]
    new.eval()
    batches = list(loader) if isinstance(loader, Iterator) else loader
    modules = dict(new.named_modules())
    layers = {name: layer for name, module in modules.items() if (layer := _calibrated(module)) is not None}
    if not layers:
        raise UsageError(
            "calibrate: the model has no layer with running statistics; expected BatchNorm (track_running_stats=True), "
            "AlphaBatchNorm, UnifiedNorm, PowerNorm, L1BatchNorm or a layer with the members of normfuse.nn.calibrate.Calibrated"
        )
    data = _Data(new, batches, forward or _forward, {name: modules[name] for name in layers})
    with torch.no_grad():
        calls = _calls(data)
        total = len(batches) * len(calls) if isinstance(batches, Sized) else None
        with progress_bar("calibrate", total, show=progress is not False) as bar:
            for name, times in calls.items():
                bar.name(f"calibrate {name}")
                layers[name].set_calibrated(_found(data, name, layers[name], times == 1, bar.advance), source_weight)
    for module, mode in modes:
        module.training = mode
    return new


def _calls(data: _Data) -> dict[str, int]:
    """How often one forward calls each layer that it reaches, in the order of the first calls."""
    seen = [calls for calls in everywhere(data.calls) if calls is not None]
    if not seen:
        raise UsageError("calibrate: the loader gave no batch")
    calls = {name: max(c.get(name, 0) for c in seen) for c in seen for name in c}
    if not calls:
        raise UsageError("calibrate: the forward reaches no layer with running statistics; check what `forward` calls")
    if unseen := [name for name in data.modules if name not in calls]:
        log.warning("calibrate: the forward does not reach %s, which keep their statistics", ", ".join(unseen))
    return calls


def _found(data: _Data, name: str, layer: Calibrated, once: bool, advance: Callable[[], None]) -> tuple[Joint, ...]:
    """The joint mean and variance of each stage of a layer, over the data of all ranks."""
    found: tuple[Joint, ...] = ()
    for _ in range(layer.calibration_stages):
        ranks = everywhere(partial(data.rows, name, layer, found, once, advance))
        found += (reduce(Joint.merge, ranks),)
        _check(found[-1], name)
    return found


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """A batch normalization of PyTorch as `Calibrated`: μ and the unbiased variance, as `nn.BatchNorm` stores them."""

    module: _BatchNorm
    calibration_stages: int = 1

    def calibration_rows(self, found: tuple[Joint, ...], input: Tensor) -> Tensor:
        return input.transpose(0, 1).flatten(1).T

    def set_calibrated(self, found: tuple[Joint, ...], source_weight: float) -> None:
        mean, var = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert var is not None
        rows = found[-1]
        unbiased = rows.var * (rows.count / max(rows.count - 1, 1))
        mean.copy_(source_weight * mean + (1 - source_weight) * rows.mean.to(mean))
        var.copy_(source_weight * var + (1 - source_weight) * unbiased.to(var))
        if isinstance(self.module, AlphaBatchNorm):
            self.module.freeze()


@dataclass(frozen=True)
class _L1Batch:
    """An L1 batch normalization as `Calibrated`: μ first, then s = c mean|x − μ|."""

    module: L1BatchNorm
    calibration_stages: int = 2

    def calibration_rows(self, found: tuple[Joint, ...], x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(1).T
        return (rows.double() - found[0].mean.to(rows.device)).abs() if found else rows

    def set_calibrated(self, found: tuple[Joint, ...], source_weight: float) -> None:
        mean, scale = self.module.running_mean, self.module.running_scale
        mean.copy_(source_weight * mean + (1 - source_weight) * found[0].mean.to(mean))
        scale.copy_(source_weight * scale + (1 - source_weight) * self.module.scale_const * found[1].mean.to(scale))


def _calibrated(module: nn.Module) -> Calibrated | None:
    if isinstance(module, Calibrated):
        return module
    if isinstance(module, L1BatchNorm):
        return _L1Batch(module)
    return _Batch(module) if isinstance(module, _BatchNorm) and module.running_mean is not None else None


# -- data --------------------------------------------------------------------------------------------------------------


class _Reached(BaseException):
    """The norm in question has its rows. Not an `Exception`, so that no model catches it."""


@dataclass(frozen=True)
class _Data:
    """The batches of this rank, run through the model."""

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward
    modules: dict[str, nn.Module]

    def calls(self) -> dict[str, int] | None:
        """How often the first batch calls each layer, in the order of the first calls; None without a batch."""
        counts: Counter[str] = Counter()
        hooks = [m.register_forward_pre_hook(lambda *_, name=name: counts.update((name,))) for name, m in self.modules.items()]
        try:
            return dict(counts) if next(self._run(), None) is not None else None
        finally:
            for hook in hooks:
                hook.remove()

    def rows(self, name: str, layer: Calibrated, found: tuple[Joint, ...], once: bool, advance: Callable[[], None]) -> Joint:
        """Joint mean and variance of what the layer asks for, over the batches of this rank."""
        joint = Joint(0, torch.zeros(()), torch.zeros(()))

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal joint
            joint = joint.merge(_joint(layer.calibration_rows(found, *args, **kwargs)))
            if once:
                raise _Reached

        handle = self.modules[name].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for _ in self._run():
                advance()
        finally:
            handle.remove()
        return joint

    def _run(self) -> Iterator[int]:
        """Run the batches one by one; yields their numbers."""
        for number, batch in enumerate(self.batches):
            try:
                self.forward(self.model, batch)
            except _Reached:
                pass
            except Exception as e:
                raise UsageError(f"calibrate: the forward of batch {number} failed with {type(e).__name__}: {e}") from e
            yield number


def _forward(model: nn.Module, batch: Any) -> Any:
    """Call the model with a tensor, the first element of a tuple, or a dictionary of keywords."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: moved(value) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise UsageError(
            f"an item of the loader is {type(batch).__name__}; expected a tensor, a tuple or a dictionary, or give `forward`"
        )
    return model(moved(batch))


def _joint(rows: Tensor) -> Joint:
    rows = rows.detach()
    rows = rows.float() if rows.device.type == "mps" else rows.double()  # mps knows no float64
    if not len(rows):
        return Joint(0, torch.zeros(()), torch.zeros(()))
    var, mean = torch.var_mean(rows, 0, correction=0)
    return Joint(len(rows), mean.double().cpu(), var.double().cpu())


def _check(rows: Joint, name: str) -> None:
    if not rows.count:
        raise UsageError(f"calibrate: layer {name!r} got no row; every batch was empty there")
    if not bool((rows.mean + rows.var).isfinite().all()):
        raise UsageError(
            f"calibrate: layer {name!r} got values that are not finite; look for NaN or overflow in the data before it"
        )
