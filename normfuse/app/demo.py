"""The whole main job on two small trained models: optimize, prove, export, compare, measure."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from normfuse.errors import CheckFailed
from normfuse.extras import need
from normfuse.reports.numbers import change, magnitude

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfuse.benchmark import Comparison
    from normfuse.export import Exported
    from normfuse.reports.report import Report

__all__ = ["Outcome", "run"]

_MODELS = {
    "vit": "Pre-LN vision transformer with LayerScale",
    "cnn": "depthwise residual network, BatchNorm before and after convolutions",
}
_SHORT = {"layer_norm": "LayerNorm", "batch_norm": "BatchNorm", "rms_norm": "RMSNorm"}
_BATCH = 64  # images in the timed batch


@dataclass(frozen=True)
class Outcome:
    """What the demo found for one model.

    Attributes:
        name: `vit` or `cnn`.
        report: of `normfuse.optimize`.
        exported: of `normfuse.export.to_onnx`.
        right: of the held-out digits, how many the original, the optimized module and both ONNX files get right.
        same: how many predictions of the optimized ONNX file are those of the original module.
        of: number of held-out digits.
        difference: largest difference between the outputs of the two ONNX files, relative to the largest output.
        latency: ONNX Runtime on the optimized file against ONNX Runtime on the original's default export.
    """

    name: str
    report: "Report"
    exported: "Exported"
    right: dict[str, int]
    same: int
    of: int
    difference: float
    latency: "Comparison"

    def failures(self) -> list[str]:
        """What should not have happened; empty when all is well."""
        from normfuse.numerics.compare import EXACT_BOUND

        left = {k: n for k, n in self.report.norms_after.items() if n and k != "rms_norm"}
        exact = self.report.exact
        found = {
            f"{self.name}: norms are left: {left}": bool(left),
            f"{self.name}: the error in float64 is {magnitude(exact)}, above {EXACT_BOUND:.0e}": exact is None
            or not exact.max_rel <= EXACT_BOUND,
            f"{self.name}: {self.of - self.same} of {self.of} predictions changed": self.same != self.of,
            f"{self.name}: {len(self.report.undone)} rewrites were taken back": bool(self.report.undone),
        }
        return [text for text, failed in found.items() if failed]


def run(console: Console, *, seconds: float = 5.0) -> tuple[Outcome, ...]:
    """Run the demo and print what happens, at most 80 columns wide.

    Args:
        console: where to print.
        seconds: for measuring each of the two models, without loading and warming up.

    Raises:
        CheckFailed: a model is not what it was; everything is printed before.
        MissingExtra: the extra `onnx` is not installed.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module, extra="onnx")
    from normfuse.app.demo_models import digits

    start = perf_counter()
    images, labels = digits()
    _say(console, f"Two small models trained on scikit-learn's digits; {len(labels)} held-out images.")
    with tempfile.TemporaryDirectory(prefix="normfuse-demo-") as folder:
        outcomes = [_one(console, name, images, labels, Path(folder), seconds) for name in _MODELS]
    _say(console)
    console.print(_summary(outcomes), markup=False)
    failures = [f for o in outcomes for f in o.failures()]
    if failures:
        raise CheckFailed("; ".join(failures))
    before = sum(sum(o.report.norms_before.values()) for o in outcomes)
    after = sum(sum(o.report.norms_after.values()) for o in outcomes)
    answers = sum(o.of for o in outcomes)
    took = perf_counter() - start
    _say(console, f"demo: {before} norms -> {after} (RMSNorm), 0 of {answers} predictions changed, {took:.0f} s")
    return tuple(outcomes)


def _one(console: Console, name: str, images: "Tensor", labels: "Tensor", folder: Path, seconds: float) -> Outcome:
    import torch

    from normfuse.api import optimize
    from normfuse.app.demo_models import load
    from normfuse.app.engines import bench, export_original
    from normfuse.app.sources import Source
    from normfuse.export import to_onnx
    from normfuse.reports.record import report

    model = load(name)
    batch = (images[:_BATCH],)
    any_batch = ({0: torch.export.Dim("batch")},)
    _say(console, f"\n{name}: {_MODELS[name]}")
    fast = optimize(model, batch, dynamic_shapes=any_batch)
    found = report(fast)
    for line in _facts(found):
        _say(console, f"  {line}")

    before, after = folder / f"{name}.original.onnx", folder / f"{name}.onnx"
    export_original(Source(name, model, batch), before, dynamic_shapes=any_batch)
    progress = console.is_terminal and not console.quiet
    exported = to_onnx(fast, after, progress=progress)
    answers = _answers({"original": model, "optimized": fast}, {"original onnx": before, "optimized onnx": after}, images)
    predictions = {k: v.argmax(1) for k, v in answers.items()}
    expected = answers["original onnx"]
    outcome = Outcome(
        name=name,
        report=found,
        exported=exported,
        right={k: int((p == labels).sum()) for k, p in predictions.items()},
        same=int((predictions["optimized onnx"] == predictions["original"]).sum()),
        of=len(labels),
        difference=float((answers["optimized onnx"] - expected).abs().max() / expected.abs().max()),
        latency=bench(str(before), str(after), batch, names=("original", "optimized"), seconds=seconds, progress=progress),
    )
    for line in _measured(outcome, before):
        _say(console, f"  {line}")
    return outcome


def _answers(modules: "dict[str, nn.Module]", files: dict[str, Path], images: "Tensor") -> "dict[str, Tensor]":
    return {k: _torch(m, images) for k, m in modules.items()} | {k: _onnx(file, images) for k, file in files.items()}


def _facts(found: "Report") -> Iterable[str]:
    from normfuse.numerics.compare import EXACT_BOUND

    kinds = sorted({*found.norms_before, *found.norms_after})
    yield "norms       " + ", ".join(f"{k} {found.norms_before.get(k, 0)} → {found.norms_after.get(k, 0)}" for k in kinds)
    yield f"parameters  {change(found.parameters_before, found.parameters_after)}"
    yield f"exact       {magnitude(found.exact)} relative in float64; the bound of an identity is {EXACT_BOUND:.0e}"
    yield f"drift       {magnitude(found.drift)} relative in {found.drift.dtype if found.drift else 'its own dtype'}"


def _measured(o: Outcome, original: Path) -> Iterable[str]:
    import onnx

    def kinds(ops: Iterable[str]) -> str:
        norms = [op.rpartition(".")[2] for op in ops if op.rpartition(".")[2].endswith("Normalization")]
        return ", ".join(f"{norms.count(n)} {n}" for n in dict.fromkeys(norms)) or "no normalization"

    before = [n.op_type for n in onnx.load(original, load_external_data=False).graph.node]
    after = [op for op, count in o.exported.ops.items() for _ in range(count)]
    yield f"onnx nodes  {len(before)} ({kinds(before)})"
    yield f"         → {len(after)} ({kinds(after)})"
    yield f"onnx error  {o.difference:.1e} relative, optimized file against original file"
    right = f"{o.right['original']} of {o.of} right before, {o.right['optimized onnx']} after"
    yield f"digits      {right}; {o.same} of {o.of} answers the same"
    a, b, ratio, noise = o.latency.a, o.latency.b, o.latency.speedup, o.latency.noise
    yield f"latency     {a.median:.3f} ms → {b.median:.3f} ms for {_BATCH} images, {o.latency.threads} threads"
    yield f"speedup     {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] at 95 %; noise {noise:.1%}: {_words(o.latency)}"


def _words(latency: "Comparison") -> str:
    if latency.speedup.low > 1 + latency.noise:
        return "faster"
    return "slower" if latency.speedup.high < 1 - latency.noise else "within the noise"


def _summary(outcomes: Iterable[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("model", "removed", "right before", "after", "exact", "drift", "speedup in ORT"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for o in outcomes:
        removed = {k: n - o.report.norms_after.get(k, 0) for k, n in o.report.norms_before.items()}
        table.add_row(
            o.name,
            ", ".join(f"{n} {_SHORT.get(k, k)}" for k, n in removed.items() if n > 0),
            f"{o.right['original'] / o.of:.1%}",
            f"{o.right['optimized onnx'] / o.of:.1%}",
            magnitude(o.report.exact),
            magnitude(o.report.drift),
            f"{o.latency.speedup.value:.2f} [{o.latency.speedup.low:.2f}, {o.latency.speedup.high:.2f}]",
        )
    return table


def _torch(module: "nn.Module", images: "Tensor") -> "Tensor":
    import torch

    with torch.inference_mode():
        return module(images)  # type: ignore[no-any-return]


def _onnx(path: Path, images: "Tensor") -> "Tensor":
    import torch

    from normfuse.export.onnx.runtime import session

    opened: Any = session(path)
    (logits,) = opened.run(None, {opened.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


def _say(console: Console, text: str = "") -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
