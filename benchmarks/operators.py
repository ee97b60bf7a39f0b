"""What one normalization costs in ONNX Runtime: the figures behind the decisions of the pass `mean_free`.

    python -m benchmarks.operators

Microseconds a node on one thread: half the difference between chains of 40 and of 20 nodes, so that what a run costs by
itself cancels; the median of interleaved rounds. Written to benchmarks/results/operators.md.
"""

import random
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from normfuse.benchmark.machine import Machine
from normfuse.export.onnx.runtime import session
from normfuse.files import atomic

RESULTS = Path(__file__).parent / "results" / "operators.md"
ROUNDS = 25
FEATURES = 768
ROWS = (128, 1576)


def norm(kind: str, x: str, i: int) -> list[onnx.NodeProto]:
    """The nodes of one step of a chain, from `x` to `y{i}`."""
    y = f"y{i}"
    match kind:
        case "LayerNormalization":
            return [helper.make_node(kind, [x, "s", "t"], [y], epsilon=1e-5)]
        case "RMSNormalization":
            return [helper.make_node(kind, [x, "s"], [y], epsilon=1e-5)]
        case "Add":
            return [helper.make_node(kind, [x, "t"], [y])]
        case "ReduceMean and Sub":
            return [helper.make_node("ReduceMean", [x, "last"], [f"m{i}"], keepdims=1), helper.make_node("Sub", [x, f"m{i}"], [y])]
    raise AssertionError(kind)


def chain(kind: str, length: int, rows: int) -> onnx.ModelProto:
    nodes = [node for i in range(length) for node in norm(kind, f"y{i - 1}" if i else "x", i)]
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.uniform(0.9, 1.1, FEATURES).astype(np.float32), "s"),
        numpy_helper.from_array(rng.normal(size=FEATURES).astype(np.float32), "t"),
        numpy_helper.from_array(np.array([-1], np.int64), "last"),
    ]
    shape = [1, rows, FEATURES]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", f"y{length - 1}")]
    graph = helper.make_graph(nodes, kind, values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def main() -> int:
    kinds = ("LayerNormalization", "RMSNormalization", "Add", "ReduceMean and Sub")
    figures: dict[tuple[str, int], float] = {}
    for rows in ROWS:
        feed = {"x": np.random.default_rng(1).normal(size=(1, rows, FEATURES)).astype(np.float32)}
        sessions = {(k, n): session(chain(k, n, rows).SerializeToString(), threads=1) for k in kinds for n in (20, 40)}
        times: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
        order = list(sessions)
        for _ in range(ROUNDS):
            random.Random(len(times[order[0]])).shuffle(order)
            for key in order:
                start = perf_counter()
                sessions[key].run(None, feed)
                times[key].append(perf_counter() - start)
        for k in kinds:
            figures[k, rows] = (median(times[k, 40]) - median(times[k, 20])) / 20 * 1e6
    lines = ["# One node in ONNX Runtime", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines += ["| node on (1, M, 768) | " + " | ".join(f"M = {r}, µs" for r in ROWS) + " | against LayerNormalization |"]
    lines += ["|---|" + "---|" * (len(ROWS) + 1)]
    for k in kinds:
        ratio = figures[k, ROWS[-1]] / figures["LayerNormalization", ROWS[-1]]
        lines.append(f"| {k} | " + " | ".join(f"{figures[k, r]:.0f}" for r in ROWS) + f" | {ratio:.2f} |")
    machine = Machine.here()
    lines += ["", f"Measured on: {machine.cpu}, {machine.cores} cores, 1 thread used."]
    text = "\n".join(lines) + "\n"
    RESULTS.parent.mkdir(exist_ok=True)
    with atomic(RESULTS, force=True) as path:
        path.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
