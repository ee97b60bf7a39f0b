"""What compiling shows of the kernels, without a GPU: instructions, registers, spills, programs, bytes in flight, bytes of a wave.

python -m benchmarks.gpu.counts                          # the table of docs/tensorrt.md: integer products
python -m benchmarks.gpu.counts --every --capability 80  # a sample of all kernels; exit 1 for one that spills or does not compile

The sample has every kernel, element type and width for every capability that is asked for. Groups, sizes and rows go round: each of
them stands beside each width somewhere, but not everywhere.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from normfuse.errors import NormfuseError
from normfuse.gpu.compile import CAPABILITIES, Image, compiled
from normfuse.gpu.launch import Launch
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.product import plan_product
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.softmax import plan_softmax
from normfuse.gpu.tile import FLOATS, LONGEST

__all__ = ["Count", "Machine", "count", "main", "read", "wave_bytes"]

MULTIPROCESSORS = 132  # of an H100 or H200
MOST_SPILLED = 16

_SHOWN = ((8, 1, 4096), (4, 1, 4096), (4, 4, 4096), (8, 1, 1), (4, 4, 1))
_WIDTHS, _GROUPS, _ROWS, _SIZES = range(2, 9), (1, 4, 8), (1, 32, 100, 197, 4096), ((4096, 4096), (768, 1000))
_LONG = LONGEST + 3


@dataclass(frozen=True)
class Machine:
    """Attributes: machine code, where it was asked for; registers of a thread; bytes that do not fit into them."""

    code: str
    registers: int
    spilled: int


@dataclass(frozen=True)
class Count:
    """Attributes:
    loop: instructions of the innermost loop around the tensor cores; None where it is unrolled as a whole.
    per_128: of them, for 128 channels of one warp.
    registers: of a thread; `spilled`: bytes that do not fit.
    in_flight: bytes of weights that one multiprocessor waits for at the same time, with one row.
    wave: bytes of rows and weights that the programs of one wave read.
    """

    loop: int | None
    per_128: float | None
    registers: int
    spilled: int
    programs: int
    in_flight: float
    wave: int


def count(launch: Launch, capability: int, rows: int) -> Count:
    """Compile a product and read its machine code.

    Raises:
        NormfuseError: it does not compile.
        RuntimeError: the assembler that comes with Triton refuses it.
    """
    image = compiled(launch, capability)
    machine = read(image, disassembled=True)
    loop = _loop(machine.code)
    channels, stage = _of(launch, "INNER") * _of(launch, "TURNS"), _of(launch, "PIECES", "INNER", "BLOCK", "SPLIT")
    programs = launch.programs(rows)
    resident = min(programs / MULTIPROCESSORS, max(1, (227 << 10) // max(1, image.shared)))
    return Count(
        loop=len(loop) or None,
        per_128=len(loop) * 128 / channels if loop else None,
        registers=machine.registers,
        spilled=machine.spilled,
        programs=programs,
        in_flight=resident * (launch.stages - 1) * stage,
        wave=wave_bytes(launch, rows),
    )


def _of(launch: Launch, *names: str) -> int:
    found = 1
    for name in names:
        found *= int(launch.constants[name] or 0)
    return found


def wave_bytes(launch: Launch, rows: int) -> int:
    """Different bytes of rows and weights that the first wave of programs of a product reads, one program a multiprocessor.

    The order of programs is that of `normfuse.gpu.kernels.order`.
    """
    together, columns, high = _of(launch, "TOGETHER"), launch.columns, -(-rows // launch.rows_each)
    above, across = set(), set()
    for program in range(min(launch.programs(rows), MULTIPROCESSORS)):
        first, inside = program // (together * columns) * together, program % (together * columns)
        height = min(high - first, together)
        above.add(first + inside % height)
        across.add(inside // height)
    k, bits = _of(launch, "K"), _of(launch, "BITS")
    return k * (len(above) * launch.rows_each + len(across) * _of(launch, "BLOCK") * bits // 8)


def read(image: Image, *, disassembled: bool = False) -> Machine:
    """Assemble an image; to disassemble it again takes longer than that.

    Raises:
        RuntimeError: the assembler that comes with Triton refuses it.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(image.ptx, encoding="utf-8")
        newer = tools / "ptxas-blackwell"  # Triton 3.5 has one for all
        assembler = newer if image.capability >= 100 and newer.exists() else tools / "ptxas"
        done = subprocess.run([assembler, "-v", f"-arch={image.arch}", source, "-o", binary], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas refuses {image.entry} for {image.arch}: {done.stderr.strip()[:300]}")
        code = ""
        if disassembled:
            code = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    used, spilled = re.search(r"Used (\d+) registers", done.stderr), re.search(r"(\d+) bytes spill stores", done.stderr)
    return Machine(code, int(used[1]) if used else 0, int(spilled[1]) if spilled else 0)


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


def _product(k: int, n: int, dtype: str, bits: int, groups: int, rows: int) -> Launch:
    return plan_product(k, n, dtype, bits, groups, bias=False, residual=False, epilogue="none", rows_hint=rows)


def _sample(capabilities: Sequence[int]) -> Iterator[tuple[str, str, Launch, int]]:
    """Kernel, what it is for, the launch, a capability."""
    for capability in capabilities:
        turn = CAPABILITIES.index(capability)
        for i, (bits, dtype) in enumerate((b, d) for b in _WIDTHS for d in FLOATS):
            at = i + turn
            groups, rows, (k, n) = _GROUPS[at % 3], _ROWS[(at + i // 3) % 5], _SIZES[(at + bits) % 2]
            yield (
                f"product W{bits}",
                f"{dtype} {groups} groups {rows}x{k}x{n}",
                _product(k, n, dtype, bits, groups, rows),
                capability,
            )
        for i, dtype in enumerate(FLOATS):
            rows = _ROWS[(i + turn) % 5]
            for kind in ("rms", "crms"):
                launch = plan_norm_linear(kind, 768, 1000, dtype, bias=True, eps=1e-5, epilogue="gelu", rows_hint=rows)
                yield "norm + linear", f"{dtype} {kind} {rows}x768x1000", launch, capability
            for d in (768, _LONG):
                for kind in ("layer", "rms", "crms", "l1"):
                    launch = plan_norm(kind, d, dtype, gain=dtype, shift=dtype, residual=True, eps=1e-5)
                    yield f"{kind} norm", f"{dtype} {d}", launch, capability
                yield "softmax", f"{dtype} {d}", plan_softmax(d, dtype), capability
                yield "quantize rows", f"{dtype} {d}", plan_rows(d, dtype, 8 if turn % 2 else 4, static=None), capability


def _every(capabilities: Sequence[int]) -> int:
    """Compile and assemble the sample; one line a kernel. 1 for a fault, which has a line of its own."""
    found: dict[str, list[tuple[int, int]]] = {}
    faults = 0
    for kernel, what, launch, capability in _sample(capabilities):
        try:
            machine = read(compiled(launch, capability))
        except (NormfuseError, RuntimeError) as e:
            print(f"{kernel} {what} sm_{capability}: {' '.join(str(e).split())[:300]}", flush=True)
            faults += 1
            continue
        found.setdefault(kernel, []).append((machine.registers, machine.spilled))
        if machine.spilled > MOST_SPILLED:
            print(f"{kernel} {what} sm_{capability}: {machine.spilled} bytes do not fit into registers", flush=True)
            faults += 1
    print("| kernel | images | registers at most | bytes spilled at most |\n|---|---|---|---|")
    for kernel, counts in found.items():
        print(f"| {kernel} | {len(counts)} | {max(r for r, _ in counts)} | {max(s for _, s in counts)} |")
    images, spilled = sum(map(len, found.values())), max((s for c in found.values() for _, s in c), default=0)
    print(f"{images} images for sm_{', '.join(map(str, capabilities))}; {spilled} bytes spilled at most; {faults} faults")
    return 1 if faults else 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.counts", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--every", action="store_true", help="a sample of all kernels, types and widths instead of the table")
    parser.add_argument("--capability", type=int, nargs="*", default=(80, 90, 100), choices=CAPABILITIES)
    asked = parser.parse_args(arguments)
    if asked.every:
        return _every(asked.capability)
    print("| weights | rows | sm | loop | per 128 channels | registers | spilled | programs | KB in flight an SM | MB of a wave |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    worst = 0
    for bits, groups, rows in _SHOWN:
        for capability in asked.capability:
            c = count(_product(4096, 4096, "fp16", bits, groups, rows), capability, rows)
            loop, share = ("unrolled", "") if c.loop is None or c.per_128 is None else (str(c.loop), f"{c.per_128:.0f}")
            flight = f"{c.in_flight / 1024:.0f}" if rows == 1 else ""
            weights = f"W{bits}, {groups} group{'s' * (groups > 1)}"
            cells = (weights, rows, capability, loop, share, c.registers, c.spilled, c.programs, flight, f"{c.wave / 2**20:.1f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            worst = max(worst, c.spilled)
    return 1 if worst > MOST_SPILLED else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
