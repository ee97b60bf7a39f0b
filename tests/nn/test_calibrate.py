"""calibrate: joint statistics of a whole loader, norm after norm, mixed with the old ones."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.alpha import AlphaBatchNorm
from normfuse.nn.calibrate import calibrate
from normfuse.nn.l1 import L1BatchNorm
from normfuse.nn.power import PowerNorm
from normfuse.nn.unified import UnifiedNorm

BATCHES = (5, 1, 3, 4)  # sizes


def randomized(model: nn.Module) -> Any:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and ("running" in name or tensor.dim() == 1):
            tensor.uniform_(0.5, 2)
    return model


def loader(*shape: int) -> list[Tensor]:
    return [torch.randn(n, *shape) * 3 + 1 for n in BATCHES]


def test_batch_norm_gets_the_joint_mean_and_variance_of_all_batches() -> None:
    model = randomized(nn.BatchNorm2d(3)).train()
    data = loader(3, 2, 2)
    new = calibrate(model, data)
    rows = torch.cat(data).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(new.running_mean.double(), rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new.running_var.double(), rows.var(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("source_weight", [0.0, 0.25, 1.0])
def test_mixes_with_the_old_statistics_and_leaves_the_model_alone(source_weight: float) -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 4), UnifiedNorm(4), nn.BatchNorm1d(4)))
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    data = loader(4)
    new = calibrate(model, data, source_weight=source_weight)
    q = model[0](torch.cat(data)).square().mean(0)
    torch.testing.assert_close(new[1].running_var, source_weight * before["1.running_var"] + (1 - source_weight) * q)
    torch.testing.assert_close(model.state_dict(), before)
    assert [m.training for m in new.modules()] == [m.training for m in model.modules()] == [True, True, True, False]


def test_every_norm_sees_what_those_before_it_give_with_their_new_statistics() -> None:
    """The statistics of the copy are those of its own values, in every kind of layer and whatever the batches."""
    model = randomized(
        nn.Sequential(
            *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), AlphaBatchNorm(4), nn.ReLU()),
            *(L1BatchNorm(4), nn.Flatten(2), nn.Linear(4, 6), UnifiedNorm(6), nn.Linear(6, 6), PowerNorm(6, group_num=2)),
        )
    ).double()
    data = [x.double() for x in loader(3, 2, 2)]
    new = calibrate(model, data)
    seen: dict[int, Tensor] = {}
    for i in (1, 4, 6, 9, 11):
        new[i].register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0]))
    new.eval()(torch.cat(data))
    for i in (1, 4, 6):
        torch.testing.assert_close(new[i].running_mean, seen[i].mean((0, 2, 3)))
    for i in (1, 4):
        torch.testing.assert_close(new[i].running_var, seen[i].transpose(0, 1).flatten(1).var(1))
    off = (seen[6] - new[6].running_mean.view(1, -1, 1, 1)).abs().mean((0, 2, 3))
    torch.testing.assert_close(new[6].running_scale, new[6].scale_const * off)
    torch.testing.assert_close(new[9].running_var, seen[9].square().mean((0, 1)))
    torch.testing.assert_close(new[11].running_phi.flatten(), new[11].grouped(seen[11]).square().mean((0, 1)))
    assert new[4].frozen
    assert not model[4].frozen


def test_the_result_of_alpha_folds() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), AlphaBatchNorm(4), nn.ReLU())).eval()
    data = [torch.randn(3, 3, 4, 4) for _ in range(3)]
    new = calibrate(model, data, source_weight=0.9)
    fast = normfuse.optimize(new, (data[0],))
    assert [str(n.target) for n in fast.graph.nodes if n.op == "call_function"] == ["aten.conv2d.default", "aten.relu.default"]
    torch.testing.assert_close(fast(data[0]), new(data[0]), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = UnifiedNorm(4), PowerNorm(4)

        def forward(self, x: Tensor, pad_mask: Tensor) -> Tensor:
            return self.b(self.a(x, pad_mask).transpose(0, 1), pad_mask=pad_mask)

    x, mask = torch.randn(2, 3, 4), torch.tensor([[False, True, True], [False, False, True]])
    model = randomized(Padded())
    new, longer = (calibrate(model, [{"x": x * (~mask[..., None] | (k == 0)), "pad_mask": mask}]) for k in range(2))
    torch.testing.assert_close(new.a.running_var, x[~mask].square().mean(0))
    torch.testing.assert_close(new.state_dict(), longer.state_dict())


# -- what a loader gives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda x: (x, torch.zeros(len(x))), id="tuple"),
        pytest.param(lambda x: [x], id="list"),
        pytest.param(lambda x: {"input": x}, id="dict"),
    ],
)
def test_items_are_tensors_tuples_or_dictionaries(wrap: Any) -> None:
    model, data = randomized(nn.BatchNorm1d(4)), loader(4)
    torch.testing.assert_close(calibrate(model, map(wrap, data)).state_dict(), calibrate(model, data).state_dict())


def test_forward_takes_other_items() -> None:
    model, data = randomized(nn.BatchNorm1d(4)), loader(4)
    items = [{"image": x.numpy()} for x in data]
    new = calibrate(model, items, forward=lambda m, item: m(torch.from_numpy(item["image"])))
    torch.testing.assert_close(new.state_dict(), calibrate(model, data).state_dict())


def test_a_loader_that_can_be_read_once() -> None:
    model, data = randomized(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))), loader(4)

    def once() -> Iterator[Tensor]:
        yield from data

    torch.testing.assert_close(calibrate(model, once()).state_dict(), calibrate(model, data).state_dict())


def test_a_layer_that_is_called_twice_gets_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x)

    data = loader(4)
    new = calibrate(Twice(), data)
    torch.testing.assert_close(new.norm.running_mean, torch.cat((*data, *(3 * x for x in data))).mean(0))


def test_a_layer_out_of_reach_keeps_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": randomized(nn.BatchNorm1d(4))})
    new = calibrate(model, loader(4), forward=lambda m, x: m["used"](x))
    torch.testing.assert_close(new["unused"].state_dict(), model["unused"].state_dict())
    assert "does not reach unused" in caplog.text


def test_a_layer_with_the_protocol_takes_part() -> None:
    class Peak(nn.Module):
        calibration_stages = 2

        def __init__(self) -> None:
            super().__init__()
            self.found: tuple[Any, ...] = ()

        def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
            return x

        def calibration_rows(self, found: tuple[Any, ...], x: Tensor, *, shift: float = 0.0) -> Tensor:
            return x + shift + len(found)

        def set_calibrated(self, found: tuple[Any, ...], source_weight: float) -> None:
            self.found = found

    data = loader(4)
    new = calibrate(Peak(), data, forward=lambda m, x: m(x, shift=2.0))
    first, second = new.found
    assert first.count == second.count == sum(BATCHES)
    torch.testing.assert_close(first.mean, torch.cat(data).double().mean(0) + 2)
    torch.testing.assert_close(second.mean, first.mean + 1)
    torch.testing.assert_close(first.var, torch.cat(data).double().var(0, correction=0))


def test_large_means_lose_no_digits() -> None:
    data = [x.double() * 1e-3 + 1e5 for x in loader(4)]
    new = calibrate(nn.BatchNorm1d(4).double(), data)
    torch.testing.assert_close(new.running_var, torch.cat(data).var(0), rtol=1e-8, atol=0)


# -- errors ------------------------------------------------------------------------------------------------------------


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            raise RuntimeError("three is too many")
        try:
            return self.norm(x)
        except Exception:  # must not catch what ends a forward at the norm, and give it rows again
            return self.norm(F.relu(x))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        pytest.param(nn.BatchNorm1d(4), [], "the loader gave no batch", id="empty-list"),
        pytest.param(nn.BatchNorm1d(4), iter(()), "the loader gave no batch", id="empty-iterator"),
        pytest.param(nn.BatchNorm1d(4), [torch.zeros(0, 4)], "'' got no row", id="empty-batches"),
        pytest.param(nn.LayerNorm(4), [torch.zeros(2, 4)], "no layer with running statistics", id="no-norm"),
        pytest.param(
            nn.BatchNorm1d(4, track_running_stats=False), [torch.zeros(2, 4)], "no layer with running", id="no-statistics"
        ),
        pytest.param(Picky(), [torch.zeros(n, 4) for n in (2, 5, 3)], "batch 2 failed with RuntimeError: three", id="forward"),
        pytest.param(nn.BatchNorm1d(4), torch.zeros(2, 4), "for one batch", id="tensor"),
        pytest.param(nn.BatchNorm1d(4), {"x": torch.zeros(2, 4)}, "for one batch", id="dictionary"),
        pytest.param(nn.BatchNorm1d(4), 3, "loader is int", id="no-loader"),
        pytest.param(nn.BatchNorm1d(4), ["text"], "item of the loader is str", id="item"),
        pytest.param(nn.BatchNorm1d(4), [torch.full((2, 4), torch.nan)], "not finite", id="nan"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model: nn.Module, data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(model, data)


def test_a_forward_that_reaches_no_norm_is_refused() -> None:
    with pytest.raises(UsageError, match="reaches no layer"):
        calibrate(nn.BatchNorm1d(4), loader(4), forward=lambda m, x: x)


def test_wrong_source_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="source_weight=-1"):
        calibrate(nn.BatchNorm1d(4), loader(4), source_weight=-1)


def test_a_model_that_hides_errors_is_calibrated() -> None:
    data = [torch.randn(2, 4), torch.randn(5, 4)]
    torch.testing.assert_close(calibrate(Picky(), data).norm.running_mean, torch.cat(data).mean(0))


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tty", "progress", "shown"),
    [
        pytest.param(True, None, True, id="terminal"),
        pytest.param(True, False, False, id="switched-off"),
        pytest.param(False, None, False, id="no-terminal"),
        pytest.param(False, True, False, id="no-terminal-but-asked"),
    ],
)
def test_the_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch, tty: bool, progress: bool | None, shown: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return tty

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    calibrate(nn.Sequential(nn.BatchNorm1d(4)), loader(4), progress=progress)
    assert ("calibrate" in stream.getvalue()) == shown
