"""Check, time and write down what normfuse does on the GPU of this machine.

    python -m benchmarks.gpu [--quick] [--only checks,norms] [--seconds 0.4] [--minutes 7]
    python -m benchmarks.gpu --interpret --quick

Needs torch for CUDA and triton; timm and transformers for whole models; TensorRT for RTX is tried where it is installed. It is
written to benchmarks/results/gpu-<device>.json and .md part by part, so that nothing is lost when it is stopped. With --interpret
the kernels are checked on the CPU in Triton's interpreter, and nothing is written.

--minutes bounds the whole: what has not begun by then is left out, and the page says so. The checks always run to their end.

Exit code 0; 1 when a kernel is wrong; 2 when there is nothing to run on.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `python benchmarks/gpu/run.py` puts this folder there instead
    sys.path.insert(0, str(ROOT))

__all__ = ["PARTS", "main", "versions"]

PARTS = ("checks", "probe", "norms", "products", "models")
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    parts = tuple(asked.only.split(",")) if asked.only else PARTS
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        print(f"no part is called {unknown[0]!r}: expected {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
        return _interpreted(asked.quick)
    from normfuse.errors import UsageError
    from normfuse.gpu.device import find_gpu

    try:
        gpu = find_gpu()
        _need_triton()
    except UsageError as e:
        print(e, file=sys.stderr)
        return 2
    from benchmarks.gpu.asked import Asked
    from benchmarks.gpu.tables import slug, write

    facts: dict[str, Any] = {
        "schema": 1,
        "device": gpu.to_dict(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m benchmarks.gpu", *arguments]),
        "seconds": asked.seconds,
    }
    print(gpu)
    job = Asked(asked.quick, asked.seconds, time.monotonic() + 60 * asked.minutes)
    for name in parts:
        print(f"\n{name}", flush=True)
        facts[name] = _part(name)(job)
        facts["left_out"] = job.left_out
        print(*write(facts, asked.output, "-".join(["gpu", slug(gpu.name), *(parts if asked.only else ())])), sep="\n")
    wrong = [row for row in facts.get("checks", ()) if row["failed"]]
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, one dtype, one model")
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each comparison (default: 0.4)")
    parser.add_argument("--minutes", type=float, default=7.0, help="what is not begun by then is left out (default: 7)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the tables (default: benchmarks/results)")
    parser.add_argument("--interpret", action="store_true", help="check the kernels on the CPU in Triton's interpreter")
    return parser


def _part(name: str) -> Callable[[Any], Any]:
    """`measure(asked)` of a part; imported late, because torch and triton take seconds."""
    import importlib

    found: Callable[[Any], Any] = importlib.import_module(f"benchmarks.gpu.{name}").measure
    return found


def _interpreted(quick: bool) -> int:
    from benchmarks.gpu.checks import check
    from benchmarks.gpu.tables import checks_table

    rows = check("cpu", quick=quick)
    print(checks_table(rows))
    return 1 if any(row["failed"] for row in rows) else 0


def _need_triton() -> None:
    from normfuse.errors import UsageError
    from normfuse.gpu.run import available

    if not available():
        raise UsageError("Triton is not installed or does not work with this driver; install the one that fits torch")


def versions() -> dict[str, str]:
    """Of what is installed and matters."""
    from importlib import metadata

    found = {}
    for name in ("normfuse", "torch", "triton", "timm", "transformers", "torchao", "tensorrt_rtx", "tensorrt", "onnx"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
