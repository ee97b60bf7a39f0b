"""What a GPU kernel is called with, apart from addresses and the number of rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DTYPES", "Launch", "Operand", "Result"]

#: Element types by Triton's names: torch's name and bytes of one element.
DTYPES = {
    "fp16": ("float16", 2),
    "bf16": ("bfloat16", 2),
    "fp32": ("float32", 4),
    "i8": ("int8", 1),
    "u8": ("uint8", 1),
    "i32": ("int32", 4),
}


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads.

    Attributes:
        name: of the kernel's parameter.
        dtype: a key of `DTYPES`.
    """

    name: str
    dtype: str


@dataclass(frozen=True)
class Result:
    """A tensor that a kernel writes: the leading axes of the first input, and `features` on the last one.

    Attributes:
        name: of the kernel's parameter.
        dtype: a key of `DTYPES`.
        features: size of the last axis.
    """

    name: str
    dtype: str
    features: int


@dataclass(frozen=True)
class Launch:
    """One kernel, specialized for a layer. Rows are all axes of the first input but the last.

    Every kernel has its parameters in this order: inputs, outputs, `rows` (int32), constants. An optional input that is
    missing is the constant None. PyTorch, Triton's interpreter, the ahead-of-time compiler and the TensorRT plugin all read this
    one description.

    Attributes:
        kernel: where the kernel stands in `normfuse.gpu.kernels`: "norm.normalize" is `normalize` in `norm.py`.
        inputs: those that are there, in the order of the parameters; the first one has the rows.
        outputs: in the order of the parameters.
        constants: the kernel's `tl.constexpr` parameters by name.
        rows_each: rows of one program.
        columns: programs that share the same rows, each with other features.
        warps: of 32 threads, for each program.
        stages: depth of the software pipeline.
    """

    kernel: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Result, ...]
    constants: Mapping[str, int | float | bool | str | None] = field(default_factory=dict)
    rows_each: int = 1
    columns: int = 1
    warps: int = 4
    stages: int = 2

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Asked on every call of an operator."""
        constants = tuple(sorted(self.constants.items()))
        return hash((self.kernel, self.inputs, self.outputs, constants, self.rows_each, self.columns, self.warps, self.stages))

    def programs(self, rows: int) -> int:
        """Size of the grid."""
        return -(-rows // self.rows_each) * self.columns
