"""What `optimize` returns goes through `torch.export` to ExecuTorch, and its XNNPACK kernels compute the same function."""

import warnings

import pytest
import torch
from torch import nn

import normfuse
from tests.export.models import attention, relative
from tests.zoo_entry import randomise_norms

pytest.importorskip("executorch.exir", reason="ExecuTorch is not installed")

MODELS = {
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
            nn.Linear(8 * 16, 4),
        ),
        (1, 3, 8, 8),
    ),
    "attention": (nn.Sequential(attention(), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)), (2, 5, 32)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_the_optimized_module_runs_in_executorch(name: str) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    model, size = MODELS[name]
    model = randomise_norms(model.eval())
    x = torch.randn(size)
    fast = normfuse.optimize(model, (x,))
    assert normfuse.report(fast).norms_after.get("batch_norm", 0) == 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = to_edge_transform_and_lower(torch.export.export(fast, (x,)), partitioner=[XnnpackPartitioner()]).to_executorch()
        (y,) = Runtime.get().load_program(bytes(program.buffer)).load_method("forward").execute([x])
        assert relative(y, model(x)) < 1e-5
    delegates = [d.id for plan in program.executorch_program.execution_plan for d in plan.delegates]
    assert set(delegates) == {"XnnpackBackend"}
