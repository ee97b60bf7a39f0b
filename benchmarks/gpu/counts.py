"""What compiling shows of the product kernels, without a GPU: instructions, registers, spills, programs, bytes in flight.

python -m benchmarks.gpu.counts                        # the table of docs/tensorrt.md
python -m benchmarks.gpu.counts --every --capability 80  # every width, number of groups and size of block; exit 1 for a spill
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from normfuse.gpu.compile import CAPABILITIES, Image, compiled
from normfuse.gpu.launch import Launch
from normfuse.gpu.product import plan_product

__all__ = ["Count", "count", "main"]

MULTIPROCESSORS = 132  # of an H100 or H200
MOST_SPILLED = 16

_SHOWN = ((8, 1, 4096), (4, 1, 4096), (4, 4, 4096), (8, 1, 1), (4, 4, 1))
_EVERY = tuple(itertools.product(range(2, 9), (1, 4, 8), (1, 32, 100, 197, 4096)))


@dataclass(frozen=True)
class Count:
    """Attributes:
    loop: instructions of the innermost loop around the tensor cores; None where it is unrolled as a whole.
    per_128: of them, for 128 channels of one warp.
    registers: of a thread; `spilled`: bytes that do not fit.
    in_flight: bytes of weights that one multiprocessor waits for at the same time, with one row.
    """

    loop: int | None
    per_128: float | None
    registers: int
    spilled: int
    programs: int
    in_flight: float


def count(launch: Launch, capability: int, rows: int) -> Count:
    """Compile a launch and read its machine code.

    Raises:
        NormfuseError: it does not compile.
        RuntimeError: the assembler that comes with Triton refuses it.
    """
    text, registers, spilled = _assembled(compiled(launch, capability))
    loop = _loop(text)
    constants = launch.constants
    channels = int(constants["INNER"]) * int(constants["TURNS"])  # type: ignore[arg-type]
    stage = int(constants["PIECES"]) * int(constants["INNER"]) * int(constants["BLOCK"]) * int(constants["SPLIT"])  # type: ignore[arg-type]
    programs = launch.programs(rows)
    resident = min(programs / MULTIPROCESSORS, max(1, (227 << 10) // max(1, compiled(launch, capability).shared)))
    return Count(
        loop=len(loop) or None,
        per_128=len(loop) * 128 / channels if loop else None,
        registers=registers,
        spilled=spilled,
        programs=programs,
        in_flight=resident * (launch.stages - 1) * stage,
    )


def _assembled(image: Image) -> tuple[str, int, int]:
    """Machine code, registers of a thread, and bytes that are spilled."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(image.ptx, encoding="utf-8")
        assembler = tools / ("ptxas-blackwell" if image.capability >= 100 else "ptxas")
        done = subprocess.run([assembler, "-v", f"-arch={image.arch}", source, "-o", binary], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas refuses {image.entry} for {image.arch}: {done.stderr.strip()[:300]}")
        code = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    used, spilled = re.search(r"Used (\d+) registers", done.stderr), re.search(r"(\d+) bytes spill stores", done.stderr)
    return code, int(used[1]) if used else 0, int(spilled[1]) if spilled else 0


def _loop(code: str) -> list[str]:
    """The instructions between a label and the branch back to it, of the longest such stretch with products and no larger loop."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found: list[str] = []
    for line in map(str.strip, code.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"\bBRA\b.*(\.L_x_\d+)", instruction[1])
            if back and back[1] in labels and not found:
                body = instructions[labels[back[1]] :]
                found = body if any("MMA" in i for i in body) else []
    return found


def _cases(every: bool, capabilities: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    for bits, groups, rows in _EVERY if every else _SHOWN:
        for capability in capabilities:
            yield bits, groups, rows, capability


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.counts", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--every", action="store_true", help="every width, number of groups and size of block")
    parser.add_argument("--capability", type=int, nargs="*", default=(80, 90, 100), choices=CAPABILITIES)
    asked = parser.parse_args(arguments)
    print("| weights | rows | sm | loop | per 128 channels | registers | spilled | programs | KB in flight an SM |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0
    for bits, groups, rows, capability in _cases(asked.every, asked.capability):
        launch = plan_product(4096, 4096, "fp16", bits, groups, bias=False, residual=False, epilogue="none", rows_hint=rows)
        c = count(launch, capability, rows)
        loop, share = ("unrolled", "") if c.loop is None or c.per_128 is None else (str(c.loop), f"{c.per_128:.0f}")
        flight = f"{c.in_flight / 1024:.0f}" if rows == 1 else ""
        weights = f"W{bits}, {groups} group{'s' * (groups > 1)}"
        cells = (weights, rows, capability, loop, share, c.registers, c.spilled, c.programs, flight)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        worst = max(worst, c.spilled)
    return 1 if worst > MOST_SPILLED else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
