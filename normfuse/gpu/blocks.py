"""How large a part of a product one program computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["FEW_ROWS", "TENSOR_MEMORY_FROM", "Block", "block_for", "rounded_hint", "together"]


@dataclass(frozen=True)
class Block:
    """Attributes: rows and outputs of one program, warps, and depth of the pipeline."""

    rows: int
    outputs: int
    warps: int
    stages: int = 2


# Shared memory of one program on the smallest of the devices (8.6, 8.9, 12.0: 99 KiB), and room for what the epilogue needs.
_SHARED = 96 << 10
# Stages: enough loads on their way to hide the latency of memory, few enough to compile in seconds where a turn has many.
_MOST_STAGES, _FEWEST_STAGES, _DOTS = 6, 3, 16
# On 10.0, Triton keeps an accumulator in tensor memory for each product of a turn of the loop, a column for each row. There are 512
# columns, which also hold operands, and a kernel that needs more is compiled to a trap. Smaller blocks do not use them.
_COLUMNS = 256
#: Outputs of one program from which on its sums are in tensor memory there.
TENSOR_MEMORY_FROM = 64
# Of an H100 or H200: with fewer programs than these, some of them idle.
_MULTIPROCESSORS = 132
_MOST_ROWS = 4096  # from there on every block has programs enough
# Outputs up to which one program for 32 of them would leave multiprocessors without work.
_FEW_OUTPUTS = 4096

# Blocks of rows whose programs follow each other: about as many as a wave of programs has blocks of outputs, so that a wave reads
# the least of both.
_TOGETHER = 8

# A few rows wait for the weights alone: narrow blocks, so that every multiprocessor has some, and a deep pipeline. With many rows
# each weight is used again and again, and the tensor cores want large blocks.
_FEW, _NARROW = Block(16, 32, 2), Block(16, 16, 1)
#: Rows up to which weights are all that is waited for.
FEW_ROWS = 16
_BY_ROWS = ((FEW_ROWS, _FEW), (32, Block(32, 64, 4)), (128, Block(64, 64, 4)))
_SMALL = Block(32, 32, 2)
_MANY = (Block(128, 128, 8), Block(64, 128, 8), Block(32, 128, 4))
_WITHOUT_TENSOR_MEMORY = Block(64, 32, 4)
_TWO_SUMS = _MANY[1:]  # two accumulators of the largest block do not fit in registers


def rounded_hint(rows: int) -> int:
    """A number of rows that stands for `rows`: launches differ only where it does."""
    return next((limit for limit, _ in _BY_ROWS if rows <= limit), min(1 << (rows - 1).bit_length(), _MOST_ROWS))


def block_for(n: int, rows: int, stage_bytes: Callable[[Block], int], *, dots: int = 1, sums: int = 1) -> Block:
    """The block for n outputs and about `rows` rows.

    Args:
        n: outputs.
        rows: about as many as `rounded_hint` gives. Of blocks that fit, the largest one that gives every multiprocessor a program,
            else the one with the most programs.
        stage_bytes: shared memory of one stage.
        dots: products in one turn of the loop.
        sums: accumulators of each output.
    """
    few = _NARROW if n <= _FEW_OUTPUTS else _FEW
    named = next((block for limit, block in _BY_ROWS if rows <= limit), None)
    wanted = (named,) if named else _MANY if sums == 1 else _TWO_SUMS
    candidates = () if named is _FEW else (*wanted, _BY_ROWS[1][1], _WITHOUT_TENSOR_MEMORY, _SMALL)
    fitting: list[Block] = [
        b for b in candidates if b.rows < 2 * rows and _columns(b) * dots <= _COLUMNS and 2 * stage_bytes(b) <= _SHARED
    ] or [few]
    programs = [-(-rows // b.rows) * -(-n // b.outputs) for b in fitting]
    enough = next((i for i, p in enumerate(programs) if p >= _MULTIPROCESSORS), programs.index(max(programs)))
    block = fitting[enough]
    wanted_stages = min(_MOST_STAGES, max(_FEWEST_STAGES, _DOTS // dots))
    return replace(block, stages=min(wanted_stages, _SHARED // stage_bytes(block)))


def together(rows: int, block: Block) -> int:
    """Blocks of rows that take the same weights one after the other (`normfuse.gpu.kernels.order`); 1 where there are few rows."""
    return min(_TOGETHER, -(-rows // block.rows))


def _columns(block: Block) -> int:
    return block.rows if block.outputs >= TENSOR_MEMORY_FROM else 0
