"""What is left of a norm once the trained model is optimized and exported, and whether a prediction has changed."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import normfuse
from benchmarks.training.conversion import compressed
from benchmarks.training.data import Images, Text
from benchmarks.training.tasks import Task
from benchmarks.training.train import held_out
from normfuse.export import Exported, to_onnx
from normfuse.export.onnx.runtime import run, session

__all__ = ["prove"]

CHUNK = 250


def prove(task: Task, norm: str, model: nn.Module, data: Images | Text) -> dict[str, Any]:
    """Optimize and export `model`, run both on all held-out data and compare, prediction by prediction.

    Returns:
        norm_ops: normalizations in the file, by type.
        reductions: means and sums in it that the model without norms does not have: norms that are spelt out.
        norm_ops_left: both together; 0 for a static norm.
        nodes: nodes of the file.
        nodes_plain: nodes of the model with the norm that `Variant.plain` names, where it names one; they must agree.
        exact: largest error of `optimize` in float64, relative to the largest output.
        drift: largest error of the file in ONNX Runtime against the trained model in torch, likewise.
        predictions, different: how many, and how many of them the file changes.
        compressed: of LayerNorm: see `benchmarks.training.conversion`.
    """
    x, _ = held_out(data, task.recipe)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in x.split(CHUNK)]).flatten(0, -2)
    with tempfile.TemporaryDirectory(prefix="normfuse-training-") as folder:
        path = Path(folder) / "model.onnx"
        exported, exact = _exported(model, x[:4], path)
        engine = session(path, threads=1)
        name = exported.inputs[0]
        got = torch.cat([next(iter(run(engine, {name: part}).values())) for part in x.split(CHUNK)]).flatten(0, -2)
    plain = task.variant(norm).plain
    reductions = _reductions(exported.ops) - _reductions(_ops(task, "none", data))
    different = int((got.argmax(1) != expected.argmax(1)).sum())
    return {
        "norm_ops": exported.norms,
        "reductions": reductions,
        "norm_ops_left": sum(exported.norms.values()) + reductions,
        "nodes": sum(exported.ops.values()),
        "nodes_plain": None if plain is None else sum(_ops(task, plain, data).values()),
        "exact": exact,
        "drift": ((got - expected).abs().max() / expected.abs().max()).item(),
        "predictions": len(expected),
        "different": different,
        "same_predictions": different == 0,
        "compressed": compressed(task, model, data) if norm == "ln" and task.kind != "cnn" else None,
    }


def _exported(model: nn.Module, example: Tensor, path: Path) -> tuple[Exported, float | None]:
    """`model` optimized and written to `path`, and its error in float64; the number of images or texts may vary."""
    fast = normfuse.optimize(model, (example,), dynamic_shapes=({0: Dim("batch")},))
    error = normfuse.report(fast).exact
    # one form of attention for all, so that nodes can be compared
    return to_onnx(fast, path, attention="decomposed", threads=1, progress=False), None if error is None else error.max_rel


_untrained: dict[tuple[Task, str], dict[str, int]] = {}


def _ops(task: Task, norm: str, data: Images | Text) -> dict[str, int]:
    """Nodes by type in the file of an untrained model: they do not depend on the weights."""
    if (task, norm) not in _untrained:
        x, _ = held_out(data, task.recipe)
        with tempfile.TemporaryDirectory(prefix="normfuse-training-") as folder:
            exported, _ = _exported(task.build(task.variant(norm), data).eval(), x[:4], Path(folder) / "untrained.onnx")
        _untrained[task, norm] = exported.ops
    return _untrained[task, norm]


def _reductions(ops: Mapping[str, int]) -> int:
    return sum(count for op, count in ops.items() if op.startswith("Reduce"))
