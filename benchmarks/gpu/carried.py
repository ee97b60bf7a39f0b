"""Kernels as engines carry them, on a GPU: PTX loaded by the plugins' own loader, inside a CUDA graph, against the same launches
compiled on the spot. No engine is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.asked import Asked
from benchmarks.gpu.clock import DEVICE, said
from normfuse.benchmark.device import as_graph
from normfuse.export.tensorrt.plugins.kernel import Kernel
from normfuse.export.tensorrt.plugins.placing import payload_of
from normfuse.extras import need
from normfuse.gpu.compile import CAPABILITIES
from normfuse.gpu.launch import DTYPES, Launch
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.planes import planes
from normfuse.gpu.product import plan_product
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import run
from normfuse.gpu.softmax import plan_softmax

__all__ = ["capabilities", "launches", "measure"]

_ROWS = 37  # no multiple of any block
_BOUND = 2.0**-7  # of the largest value: two compilers may round the last bit of bfloat16 differently


def measure(asked: Asked) -> list[dict[str, Any]]:
    """One row a launch and image: the milliseconds that it took to load, the largest difference, and why it failed."""
    rows = []
    for name, launch in launches(few=asked.quick):
        if asked.late(name):
            continue
        for row in _rows(name, launch):
            rows.append(row)
            asked.keep(row)
            print(f"{row['name']} {row['image']}: {row['failed'] or row['difference']}", flush=True)
    return rows


def launches(*, few: bool) -> Iterator[tuple[str, Launch]]:
    """Names and launches: sizes that are no multiples of blocks. Few: what reads memory in different ways."""
    for dtype in ("fp16",) if few else ("fp16", "bf16", "fp32"):
        yield f"rms 768 {dtype}", plan_norm("rms", 768, dtype, gain=dtype, shift=None, residual=True, eps=1e-5)
        yield f"layer 100 {dtype}", plan_norm("layer", 100, dtype, gain=dtype, shift=dtype, residual=False, eps=1e-5)
        yield f"rows 768 {dtype}", plan_rows(768, dtype, 8, static=None)
        yield f"softmax 197 {dtype}", plan_softmax(197, dtype)
        yield (
            f"norm + linear {dtype}",
            plan_norm_linear("rms", 768, 1000, dtype, bias=True, eps=1e-5, epilogue="gelu", rows_hint=200),
        )
    every = ((8, 1, 1), (4, 4, 1), (4, 4, 200), (8, 1, 200), (8, 8, 200), (6, 3, 40), (3, 1, 200), (2, 8, 200))
    for bits, groups, rows in every[:4] if few else every:
        for k in (100, 768) if few else (768,):
            launch = plan_product(k, 1000, "fp16", bits, groups, bias=True, residual=True, epilogue="none", rows_hint=rows)
            yield f"product {k}, w{bits}, {groups} groups, for {rows} rows", launch


def capabilities(capability: int) -> tuple[int, ...]:
    """The images for a device: its own, and the oldest one, which the driver compiles again."""
    return tuple(c for c in CAPABILITIES if c in (min(CAPABILITIES), capability))


def _rows(name: str, launch: Launch) -> Iterator[dict[str, Any]]:
    major, minor = torch.cuda.get_device_capability()
    empty = {"name": name, "image": "", "load_ms": 0.0, "difference": 0.0, "failed": ""}
    try:
        inputs = _inputs(launch)
        wanted = run(launch, inputs)
        payload = payload_of(launch, capabilities(10 * major + minor))
    except Exception as e:  # one that does not compile is not the end
        yield {**empty, "failed": said(e)}
        return
    for code in payload.codes:
        row = {**empty, "image": f"sm_{code.capability}{'a' if code.exact else ''}"}
        try:
            row |= _one(replace(payload, codes=(code,)), inputs, wanted)
        except Exception as e:
            row["failed"] = said(e)
        yield row


def _one(payload: Any, inputs: dict[str, Tensor], wanted: tuple[Tensor, ...]) -> dict[str, Any]:
    import time

    start = time.perf_counter()
    kernel = Kernel(payload, need("cuda.bindings.driver", extra="tensorrt"))
    load = time.perf_counter() - start
    found = [torch.full_like(w, 7) for w in wanted]
    addresses = [t.data_ptr() for t in (*inputs.values(), *found)]
    as_graph(payload.entry, lambda: kernel.launch(addresses, _ROWS, torch.cuda.current_stream().cuda_stream))()
    torch.cuda.synchronize()
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, wanted, strict=True))
    size = max(float(w.double().abs().max()) for w in wanted)
    same = all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    failed = "" if same or difference <= _BOUND * max(1.0, size) else f"differs by {difference:.1e} of {size:.1e}"
    return {"load_ms": 1e3 * load, "difference": difference, "failed": failed}


def _inputs(launch: Launch) -> dict[str, Tensor]:
    facts = launch.constants
    d = int(facts.get("D") or facts["K"])  # type: ignore[arg-type]
    n = int(facts.get("N", d))  # type: ignore[arg-type]
    shapes = {
        "x": (_ROWS, d), "residual": (_ROWS, n), "q": (_ROWS, d), "row_scale": (_ROWS, 1), "weight": (n, d), "gain": (d,),
        "shift": (d,), "bias": (n,), "scale": (n,),
    }  # fmt: skip
    torch.manual_seed(0)
    found = {}
    for operand in launch.inputs:
        if operand.name == "planes":
            bits = int(facts["BITS"])  # type: ignore[arg-type]
            top = 2 ** (bits - 1) - 1
            value = planes(torch.randint(-top, top + 1, (n, d), dtype=torch.int8, device=DEVICE), bits)
        elif operand.name == "shifts":
            value = torch.randint(0, int(facts["GROUPS"]), (d,), dtype=torch.uint8, device=DEVICE)  # type: ignore[arg-type]
        elif operand.name == "q":
            value = torch.randint(-127, 128, shapes["q"], dtype=torch.int8, device=DEVICE)
        else:
            value = torch.rand(shapes[operand.name], device=DEVICE) - (0.0 if "scale" in operand.name else 0.5)
            value = (value / (100 * d if operand.name == "scale" else 1)).to(getattr(torch, DTYPES[operand.dtype][0]))
        found[operand.name] = value.contiguous()
    return found
