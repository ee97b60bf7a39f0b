"""Two processes see the statistics that one would see on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from normfuse.nn.batch_channel import BatchChannelNorm
from normfuse.nn.evonorm import EvoNorm

CASES = {
    "evonorm-B0": lambda: EvoNorm("B0", 4),
    "evonorm-B1": lambda: EvoNorm("B1", 4),
    "batch-channel": lambda: BatchChannelNorm(4, 2),
    "batch-channel-estimate": lambda: BatchChannelNorm(4, 2, estimate=True),
}
SPLIT = (3, 2)  # rows of the two ranks


def _step(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer.train()(x)
    y.square().sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x.grad": x.grad, **{k: v.clone() for k, v in layer.state_dict().items()}}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = torch.load(f"{folder}/x.pt")
    start = sum(SPLIT[:rank])
    found = {name: _step(make().double(), x[start : start + SPLIT[rank]]) for name, make in CASES.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[dict[str, dict[str, torch.Tensor]]]]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    x = torch.randn(sum(SPLIT), 4, 3, 3, dtype=torch.float64) * 2 + torch.arange(5.0).view(-1, 1, 1, 1)
    torch.save(x, folder / "x.pt")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2)  # type: ignore[attr-defined]
    return x, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_batch(name: str, ranks: tuple[torch.Tensor, list[dict[str, dict[str, torch.Tensor]]]]) -> None:
    x, found = ranks
    expected = _step(CASES[name]().double(), x)
    for key in ("y", "x.grad"):
        joined = torch.cat([part[name][key] for part in found])
        assert torch.allclose(joined, expected[key], rtol=1e-9, atol=1e-11), key
    for part in found:
        for key in part[name].keys() - {"y", "x.grad"}:
            assert torch.allclose(part[name][key], expected[key], rtol=1e-12), key
