"""Calibration under `torch.distributed`: every rank has its own batches, and all ranks get the integers of all data."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import normfuse
from normfuse.errors import UsageError

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not there")

WORLD = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic": {"weight_bits": 4},
    "static": {"weight_bits": 8, "activations": "static", "observer": "mse"},
    "gptq": {"weight_bits": 3, "rounding": "gptq"},
    "budget": {"sqnr_budget": 20.0},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 12, generator=generator) * scale for scale in (0.5, 1.0, 4.0)]


def quantized(options: dict[str, Any], data: list[Tensor]) -> tuple[dict[str, Tensor], list[Any]]:
    spec = normfuse.ShiftQuant(prefer="size", **options)
    fast = normfuse.optimize(model(), (batches()[0],), quantize=spec, calibration=data)
    told = [(e.path, e.weight_bits, e.groups, e.sqnr) for e in normfuse.report(fast).quantization]
    return dict(fast.state_dict()), told


def failing(rank: int) -> str:
    data = batches()
    if rank == 1:
        data[1] = torch.full_like(data[1], torch.nan)
    with pytest.raises(UsageError) as info:
        quantized({}, data)
    return str(info.value)


def tuned(rank: int) -> str:
    with pytest.raises(UsageError) as info:
        quantized({"finetune_steps": 2}, batches())
    return str(info.value)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=120)
    )
    share = batches()[:1] if rank == 0 else batches()[1:]
    results: dict[str, Any] = {name: quantized(options, share) for name, options in OPTIONS.items()}
    results |= {"failing": failing(rank), "tuned": tuned(rank)}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=WORLD)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_integers_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    expected, told = quantized(OPTIONS[name], batches())
    for rank in ranks:
        state, heard = rank[name]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected[key], msg=key)
            else:
                assert torch.equal(value, expected[key]), key
        assert [entry[:3] for entry in heard] == [entry[:3] for entry in told]
        assert [entry[3] for entry in heard] == pytest.approx([entry[3] for entry in told], abs=1e-3)
    assert all(torch.equal(a, ranks[1][name][0][k]) for k, a in ranks[0][name][0].items())


def test_a_failure_on_one_rank_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    assert "holds NaN" in ranks[1]["failing"]
    assert ranks[0]["failing"].startswith("rank 1: calibration: batch 1")


def test_fine_tuning_is_for_one_process(ranks: list[dict[str, Any]]) -> None:
    assert all("one process" in rank["tuned"] for rank in ranks)
