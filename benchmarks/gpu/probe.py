"""Does TensorRT for RTX take this GPU? A small engine is built, loaded and run, in a process of its own, because it may die.

python -m benchmarks.gpu.probe        what the process prints: one line of JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.asked import Asked
from normfuse.errors import NormfuseError

__all__ = ["measure"]

_PATIENCE = 120  # seconds


def measure(asked: Asked) -> dict[str, Any]:
    """`works`, and what was seen: versions, times, or the error."""
    command = [sys.executable, "-m", "benchmarks.gpu.probe"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, cwd=Path(__file__).parents[2]
        )
    except subprocess.TimeoutExpired:
        return _told({"works": False, "error": f"no answer in {_PATIENCE} s"})
    lines = done.stdout.strip().splitlines()
    try:
        return _told(json.loads(lines[-1]))
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()
        return _told({"works": False, "error": f"the process ended with {done.returncode}: {said[-1] if said else 'no message'}"})


def _told(found: dict[str, Any]) -> dict[str, Any]:
    print("works" if found["works"] else found["error"])
    return found


def _probe() -> dict[str, Any]:
    try:
        import tensorrt_rtx as trt
    except Exception as e:  # not installed, or a library that it needs is not there
        return {"works": False, "error": f"tensorrt_rtx: {e}"}
    import torch

    from normfuse.export.tensorrt.runtime import open_engine

    found: dict[str, Any] = {"works": False, "version": trt.__version__}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.engine")
            start = time.perf_counter()
            path.write_bytes(_plan(trt))
            found["build_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            session = open_engine(path, trt)
            found["open_seconds"] = time.perf_counter() - start
            x = torch.randn(4, 64, device="cuda", dtype=torch.float16)
            (y,) = session.run([x]).values()
            found["error_of_result"] = float((y - (x @ x.T).relu()).abs().max())
            found["works"] = found["error_of_result"] < 0.1
            if not found["works"]:
                found["error"] = f"the result is wrong by {found['error_of_result']}"
    except (NormfuseError, RuntimeError, TypeError) as e:
        found["error"] = " ".join(str(e).split())
    return found


def _plan(trt: Any) -> bytes:
    """An engine of relu(x xᵀ) in fp16."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (4, 64))
    product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, x, trt.MatrixOperation.TRANSPOSE).get_output(0)
    network.mark_output(network.add_activation(product, trt.ActivationType.RELU).get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    return bytes(plan)


if __name__ == "__main__":
    print(json.dumps(_probe()))
