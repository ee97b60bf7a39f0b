"""Two processes under gloo give what one process gives on the joined batch."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfuse.errors import UsageError
from normfuse.nn.alpha import AlphaBatchNorm
from normfuse.nn.calibrate import calibrate
from normfuse.nn.power import PowerNorm
from normfuse.nn.unified import UnifiedNorm

WORLD = 2
STEPS = 6
SPLIT = 3  # of 5 sequences: the ranks have unequal shares

pytestmark = pytest.mark.slow


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    norms = {
        "unified": lambda: UnifiedNorm(4, 2, 3, True),
        "power": lambda: PowerNorm(4, warmup_iters=3, group_num=2),
    }
    return nn.Sequential(nn.Linear(4, 4), norms[kind]()).double()


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, the gradient of y, and padding, all (5, 5, ...), so that either axis can be the batch."""
    g = torch.Generator().manual_seed(1)
    scales = [1.0, 1.5, 1.2, 1.1, 9.0, 1.3]
    return [
        (
            torch.randn(5, 5, 4, generator=g, dtype=torch.float64) * scales[t],
            torch.randn(5, 5, 4, generator=g, dtype=torch.float64),
            torch.rand(5, 5, generator=g) < 0.3,
        )
        for t in range(STEPS)
    ]


def train(kind: str, share: slice, masked: bool, saved: bool) -> dict[str, Any]:
    """The statistics after each step and the gradient of x on a share of the batch; sums of the losses, not means."""
    model = make(kind)
    trace = []
    for x, grad, mask in batches():
        axis = 0 if kind == "unified" else 1
        x, grad = (v[share] if axis == 0 else v[:, share] for v in (x, grad))
        x = x.clone().requires_grad_()
        pad = mask[share] if masked else None

        def run(x: Tensor, pad: Tensor | None = pad) -> Tensor:
            return model[1](model[0](x), pad)

        y = checkpoint(run, x, use_reentrant=False) if saved else run(x)
        y.backward(grad)
        trace.append({"y": y.detach(), "dx": x.grad, **{k: v.clone() for k, v in model[1].named_buffers()}})
    return {"trace": trace, "dw": model[1].weight.grad, "db": model[1].bias.grad, "inner": model[0].weight.grad}


def calibration_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), AlphaBatchNorm(4), nn.Flatten(2)),
        *(nn.Linear(4, 4), UnifiedNorm(4), nn.Linear(4, 4), PowerNorm(4)),
    ).double()
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 2)
    return model


def calibration_data() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(n, 3, 2, 2, generator=g, dtype=torch.float64) for n in (5, 1, 3, 4, 2)]


def _calibrated(rank: int) -> dict[str, Tensor]:
    """The ranks have one and four batches."""
    data = calibration_data()
    return calibrate(calibration_model(), data[:1] if rank == 0 else data[1:], source_weight=0.3).state_dict()


def _without_data(rank: int) -> dict[str, Tensor]:
    return calibrate(calibration_model(), calibration_data() if rank else [], source_weight=0.3).state_dict()


def _failing(rank: int) -> str:
    data = calibration_data()
    if rank == 1:
        data[2] = data[2][:, :2]
    with pytest.raises(UsageError) as info:
        calibrate(calibration_model(), data)
    return str(info.value)


def _idle(rank: int) -> list[Any]:
    """Rank 1 has no row, then no rank has one."""
    model = UnifiedNorm(4)
    x = torch.ones(2 * (1 - rank), 4, requires_grad=True)
    model(x).sum().backward()
    with pytest.raises(UsageError, match="no row"):
        model(x[:0])
    return [model.running_var, model.ema_gz, model.iters.item()]


def _parallel(share: slice, parallel: bool) -> dict[str, Tensor]:
    """Three steps of the optimizer on mean losses, under DistributedDataParallel or not.

    A mean over the rows of a rank has gradients twice as large as a mean over all rows, and so have the gradient statistics;
    the mean of the parameters' gradients over the ranks takes the factor out again.
    """
    model = make("unified")
    call = nn.parallel.DistributedDataParallel(model) if parallel else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, _, _ in batches()[:3]:
        optimizer.zero_grad()
        call(x[:4][share]).square().mean().backward()
        optimizer.step()
    return {k: v / 2 if parallel and "gz" in k else v for k, v in model.state_dict().items()}


TASKS = {
    f"{kind}-{'masked' if masked else 'all'}-{'recomputed' if saved else 'saved'}": (kind, masked, saved)
    for kind in ("unified", "power")
    for masked in (False, True)
    for saved in (False, True)
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=120)
    )
    share = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    results: dict[str, Any] = {name: train(kind, share, masked, saved) for name, (kind, masked, saved) in TASKS.items()}
    results |= {"calibrated": _calibrated(rank), "without": _without_data(rank), "failing": _failing(rank), "idle": _idle(rank)}
    results["parallel"] = _parallel(slice(2 * rank, 2 * rank + 2), True)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=WORLD)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", TASKS)
def test_training_is_that_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    kind, masked, _ = TASKS[name]
    joined, parts = train(kind, slice(None), masked, False), [r[name] for r in ranks]
    axis = 0 if kind == "unified" else 1
    for t, expected in enumerate(joined["trace"]):
        for key, value in expected.items():
            if key in ("y", "dx"):
                torch.testing.assert_close(torch.cat([p["trace"][t][key] for p in parts], axis), value, msg=f"{key} of step {t}")
                continue
            for part in parts:
                torch.testing.assert_close(part["trace"][t][key], value, msg=f"{key} after step {t}")
    for key in ("dw", "db", "inner"):
        torch.testing.assert_close(sum(p[key] for p in parts), joined[key])
    if kind == "unified":
        assert joined["trace"][-1]["skip_counter"].item() > 0  # the filter was at work


@pytest.mark.parametrize("task", ["calibrated", "without"])
def test_calibration_is_that_of_one_process(ranks: list[dict[str, Any]], task: str) -> None:
    expected = calibrate(calibration_model(), calibration_data(), source_weight=0.3).state_dict()
    first, second = (r[task] for r in ranks)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)


def test_a_failure_on_one_rank_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["failing"].startswith("calibrate: the forward of batch 2 failed")
    assert ranks[0]["failing"].startswith("rank 1: calibrate: the forward of batch 2 failed")


def test_a_rank_without_rows_takes_part(ranks: list[dict[str, Any]]) -> None:
    alone = UnifiedNorm(4)
    alone(torch.ones(2, 4)).sum().backward()
    for rank in ranks:
        running_var, ema_gz, iters = rank["idle"]
        assert torch.equal(running_var, alone.running_var)
        assert torch.equal(ema_gz, alone.ema_gz)
        assert iters == 1


def test_distributed_data_parallel_trains_as_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = _parallel(slice(0, 4), False)
    for rank in ranks:
        torch.testing.assert_close(rank["parallel"], expected)
