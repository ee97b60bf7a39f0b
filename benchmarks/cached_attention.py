"""One new token's attention over a cache: normfuse's CachedAttention against ONNX Runtime's GroupQueryAttention, node by node.

    python -m benchmarks.cached_attention --heads 9 --kv-heads 3 --width 64

Both rotate queries and keys and write the new token into one buffer for past and present. Minima of interleaved runs, in µs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from onnx import TensorProto, helper

from normfuse import native
from normfuse.extras import need
from normfuse.telemetry import no_telemetry

__all__ = ["Sizes", "calls"]

_ROOM = 4104
_TURNS, _RUNS = 40, 5


@dataclass(frozen=True)
class Sizes:
    """Heads of queries, of keys and values, and the width of one."""

    heads: int
    kv_heads: int
    width: int


def _model(own: bool, size: Sizes) -> Any:
    cache, half = [1, size.kv_heads, _ROOM, size.width], [_ROOM, size.width // 2]
    shapes = {
        "q": [1, 1, size.heads * size.width],
        "k": [1, 1, size.kv_heads * size.width],
        "v": [1, 1, size.kv_heads * size.width],
    }
    shapes |= {"past_key": cache, "past_value": cache, "cosines": half, "sines": half}
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = {"y": shapes["q"], "present_key": cache, "present_value": cache}
    if own:
        lengths = [helper.make_tensor_value_info("mask", TensorProto.INT64, [1, "slots"])]
        names = ["q", "k", "v", "past_key", "past_value", "mask", "cosines", "sines"]
        node = helper.make_node("CachedAttention", names, list(outputs), domain="normfuse", scale=size.width**-0.5)
    else:
        lengths = [helper.make_tensor_value_info("newest", TensorProto.INT32, [1])]
        lengths += [helper.make_tensor_value_info("total", TensorProto.INT32, [])]
        names = ["q", "k", "v", "past_key", "past_value", "newest", "total", "cosines", "sines"]
        node = helper.make_node(
            "GroupQueryAttention", names, list(outputs), domain="com.microsoft",
            num_heads=size.heads, kv_num_heads=size.kv_heads, do_rotary=1,
        )  # fmt: skip
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    domains = [helper.make_opsetid(domain, version) for domain, version in (("", 20), ("com.microsoft", 1), ("normfuse", 1))]
    return helper.make_model(
        helper.make_graph([node], "attention", [*floats, *lengths], results), opset_imports=domains, ir_version=10
    )


def calls(own: bool, size: Sizes, threads: int) -> Callable[[int], Callable[[], Any]]:
    """For a number of tokens in the cache, a call that adds one."""
    no_telemetry()
    ort = need("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.register_custom_ops_library(str(native.path()))
    session = ort.InferenceSession(_model(own, size).SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding, generator = session.io_binding(), np.random.default_rng(0)
    for given in session.get_inputs():
        if given.name in ("mask", "newest", "total"):
            continue
        value = ort.OrtValue.ortvalue_from_numpy(generator.standard_normal(given.shape).astype(np.float32))
        binding.bind_ortvalue_input(given.name, value)
        if given.name.startswith("past"):
            binding.bind_ortvalue_output(given.name.replace("past", "present"), value)
    binding.bind_output("y")

    def behind(past: int) -> Callable[[], Any]:
        lengths = {"newest": np.array([past], np.int32), "total": np.array(past + 1, np.int32)}
        for name, value in ({"mask": np.ones((1, past + 1), np.int64)} if own else lengths).items():
            binding.bind_cpu_input(name, value)
        return lambda: session.run_with_iobinding(binding)

    return behind


@click.command()
@click.option("--heads", default=9, show_default=True)
@click.option("--kv-heads", default=3, show_default=True)
@click.option("--width", default=64, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(heads: int, kv_heads: int, width: int, threads: int) -> None:
    """Print the time of both for caches of several lengths."""
    size = Sizes(heads, kv_heads, width)
    each = {name: calls(own, size, threads) for name, own in (("GroupQueryAttention", False), ("CachedAttention", True))}
    for past in (128, 200, 512, 2000, 4000):
        ready = {name: behind(past) for name, behind in each.items()}
        best = dict.fromkeys(ready, float("inf"))
        for _ in range(_TURNS):
            for name, call in ready.items():
                for _ in range(_RUNS):
                    start = time.perf_counter()
                    call()
                    best[name] = min(best[name], time.perf_counter() - start)
        print(f"{past:5} tokens  " + "  ".join(f"{name} {1e6 * t:.1f} µs" for name, t in best.items()), flush=True)


if __name__ == "__main__":
    main()
