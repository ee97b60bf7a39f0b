"""What the node of a plugin carries: a kernel as PTX for several architectures, and how it is launched.

    entry     CHAR   name of the function in the PTX
    ptx       CHAR   images, each ended by a zero byte
    images    INT32  five numbers an image: compute capability, 1 if it runs only there, threads, bytes of shared memory, parameters
    grid      INT32  rows of one program, programs that share rows. Where few rows have a launch of their own, four more: up to how
                     many rows, the same two numbers of it, and how many of the images are its own, the last ones
    inputs    CHAR   element types, "fp16,fp16,fp32"
    outputs   CHAR   likewise
    features  INT32  size of the last axis of each output; the other axes are those of the first input

These are attributes of the ONNX node and, from there, fields of the plugin in the plan; `native/tensorrt/` reads the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normfuse.errors import ExportError

__all__ = ["NUMBERS", "TEXTS", "TYPES", "Code", "Few", "Payload"]

#: Element types by Triton's names, and TensorRT's names of them. It keeps uint8 weights as int32: bytes travel as int8.
TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i8": "int8", "i32": "int32"}
#: Fields that are text, and those that are numbers.
TEXTS, NUMBERS = ("entry", "ptx", "inputs", "outputs"), ("images", "grid", "features")


@dataclass(frozen=True)
class Code:
    """PTX of one architecture.

    Attributes:
        capability: compute capability, 80 for sm_80.
        exact: it runs on that capability alone (sm_90a); else on newer ones too.
        threads: of one program.
        shared: bytes of shared memory.
        parameters: of the function. Triton adds pointers to scratch memory behind those that a kernel declares.
        ptx: without a zero byte at its end.
    """

    capability: int
    exact: bool
    threads: int
    shared: int
    parameters: int
    ptx: bytes


@dataclass(frozen=True)
class Few:
    """The same kernel for few rows: with blocks of another size, and the same results.

    Attributes:
        rows: up to how many it is taken.
        codes: one an architecture.
        rows_each: rows of one program.
        columns: programs that share rows.
    """

    rows: int
    codes: tuple[Code, ...]
    rows_each: int
    columns: int


@dataclass(frozen=True)
class Payload:
    """What a node carries; the fields are explained at the top of this file."""

    entry: str
    codes: tuple[Code, ...]
    rows_each: int
    columns: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    features: tuple[int, ...]
    few: Few | None = None

    def fields(self) -> dict[str, str | list[int]]:
        """Attributes of the ONNX node."""
        few = self.few
        codes = self.codes if few is None else (*self.codes, *few.codes)
        return {
            "entry": self.entry,
            "ptx": "".join(code.ptx.decode() + "\0" for code in codes),
            "images": [int(n) for c in codes for n in (c.capability, c.exact, c.threads, c.shared, c.parameters)],
            "grid": [self.rows_each, self.columns]
            + ([] if few is None else [few.rows, few.rows_each, few.columns, len(few.codes)]),
            "inputs": ",".join(self.inputs),
            "outputs": ",".join(self.outputs),
            "features": list(self.features),
        }

    @classmethod
    def read(cls, fields: Mapping[str, bytes | Sequence[int]]) -> Payload:
        """The reverse of `fields`.

        Raises:
            ExportError: a field is missing, or two do not fit.
        """
        missing = [name for name in (*TEXTS, *NUMBERS) if not len(fields.get(name, b""))]
        if missing:
            raise ExportError(f"a plugin node carries no {', '.join(missing)}; write the ONNX file with this version of normfuse")
        texts = {name: bytes(fields[name]) for name in TEXTS}
        # TensorRT ends a text with a zero byte of its own
        entry, inputs, outputs = (texts[name].rstrip(b"\0").decode() for name in ("entry", "inputs", "outputs"))
        numbers = {name: tuple(int(n) for n in fields[name]) for name in NUMBERS}
        each = [numbers["images"][i : i + 5] for i in range(0, len(numbers["images"]), 5)]
        parts = [part for part in texts["ptx"].split(b"\0") if part]
        dtypes = (*inputs.split(","), *outputs.split(","))
        grid = numbers["grid"]
        own = len(parts) - (grid[5] if len(grid) == 6 else 0)
        if len(parts) != len(each) or len(each[-1]) != 5 or len(grid) not in (2, 6) or min(grid) < 1 or own < 1:
            raise ExportError(
                f"the plugin {entry}: {len(parts)} images and {len(numbers['images'])} numbers for them; expected 5 each"
            )
        if len(numbers["features"]) != len(outputs.split(",")) or not set(dtypes) <= set(TYPES):
            raise ExportError(f"the plugin {entry}: outputs {outputs} of {numbers['features']} features, inputs {inputs}")
        codes = tuple(Code(n[0], bool(n[1]), n[2], n[3], n[4], part) for n, part in zip(each, parts, strict=True))
        few = Few(grid[2], codes[own:], grid[3], grid[4]) if len(grid) == 6 else None
        types = tuple(inputs.split(",")), tuple(outputs.split(","))
        return cls(entry, codes[:own], grid[0], grid[1], *types, numbers["features"], few)

    def code(self, capability: int, rows: int | None = None) -> Code:
        """The image for a device: that of its own architecture, else the newest one that it can run.

        Args:
            rows: for as many; None for many.

        Raises:
            ExportError: no image runs there.
        """
        codes = self._way(rows).codes
        for code in codes:
            if code.capability == capability:
                return code
        older = [c for c in codes if c.capability < capability and not c.exact]
        if not older:
            found = ", ".join(f"sm_{c.capability}{'a' if c.exact else ''}" for c in codes)
            raise ExportError(
                f"the plugin {self.entry} carries PTX for {found}; the device is sm_{capability}. "
                "Export for that capability too, or without plugins (they need 8.0 or newer)"
            )
        return max(older, key=lambda c: c.capability)

    def grid(self, rows: int) -> int:
        """Programs of one launch."""
        way = self._way(rows)
        return -(-rows // way.rows_each) * way.columns

    def _way(self, rows: int | None) -> Few | Payload:
        return self if self.few is None or rows is None or rows > self.few.rows else self.few
