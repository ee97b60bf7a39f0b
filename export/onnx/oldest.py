"""The oldest ONNX Runtime that a finished model needs, and what its inputs are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from normfuse.export.runtimes import Release, reads
from normfuse.export.session import Input
from normfuse.extras import need

__all__ = ["needs", "signature"]


def signature(model: Any) -> tuple[Input, ...]:
    """The inputs of a finished model."""
    return tuple(
        Input(v.name, v.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d.value or "?") for d in v.shape.dims))
        for v in model.graph.inputs
    )


def needs(model: Any) -> Iterator[tuple[Release, str]]:
    """What the file needs, and the release that has it first."""
    opset = model.opset_imports[""]
    yield reads(opset, model.ir_version), f"opset {opset} in version {model.ir_version} of the format"
    for graph in (*model.graphs(), *(f.graph for f in model.functions.values())):
        for node in graph:
            if not node.domain and node.op_type in _LATER:
                yield from _kernel(node, opset)


def _kernel(node: Any, opset: int) -> Iterator[tuple[Release, str]]:
    since = need("onnx", extra="onnx").defs.get_schema(node.op_type, opset, "").since_version
    value = node.outputs[0] if node.op_type in ("ConstantOfShape", "Where") else node.inputs[0]
    dtype = None if value is None or value.dtype is None else value.dtype.name.lower()
    for version, types, release in _LATER[node.op_type]:
        # inside a function no type is known: its operations are on floats and int32
        if version == since and (types is None or (dtype is not None and dtype in types.split())):
            yield release, f"{node.op_type} of opset {version}" + ("" if types is None else f" on {dtype}")


_BYTES = "uint64 uint32 uint16 uint8 int16 int8"
_COMPARED = "uint32 int8 uint64 uint16 int16 uint8"
_NARROW = "int4 uint4"
# Kernels of the CPU provider that came later than the opset that they belong to: {op: ((version of the op, types of its first
# input, first release), ...)}. Read from the releases 1.17 to 1.32 themselves. Not here: what no release has, which is found when
# the file is run after it is written, and ops that the standard defines by others, which runtimes without a kernel compute.
_LATER: dict[str, tuple[tuple[int, str | None, Release], ...]] = {
    "Add": ((14, _BYTES, (1, 21)),),
    "ArgMax": ((13, "int64", (1, 20)),),
    "ArgMin": ((13, "int64 uint8 int8", (1, 20)),),
    "BitShift": ((11, "uint16", (1, 32)),),
    "Cast": ((21, _NARROW, (1, 23)), (23, _NARROW, (1, 23))),
    "ConstantOfShape": ((9, "bfloat16", (1, 18)),),
    "ConvInteger": ((10, "int8", (1, 24)),),
    "Cos": ((7, "double", (1, 32)), (22, "double", (1, 32))),
    "DeformConv": ((19, None, (1, 25)), (22, None, (1, 25))),
    "DepthToSpace": ((13, "uint8", (1, 21)), (13, "int8", (1, 32))),
    "DequantizeLinear": ((21, _NARROW, (1, 19)),),
    "Div": ((14, _BYTES, (1, 21)),),
    "Equal": ((13, _COMPARED, (1, 21)), (19, _COMPARED, (1, 21))),
    "Greater": ((13, _COMPARED, (1, 21)),),
    "IsInf": ((20, "float16 bfloat16", (1, 18)),),
    "IsNaN": ((20, "bfloat16", (1, 18)),),
    "Less": ((13, _COMPARED, (1, 21)),),
    "LpNormalization": ((22, None, (1, 25)),),
    "Max": ((13, "uint8 int8", (1, 24)),),
    "Min": ((13, "uint8 int8", (1, 24)),),
    "Mul": ((14, _BYTES, (1, 21)),),
    "Neg": ((13, "int16", (1, 21)),),
    "Pad": ((21, "bfloat16", (1, 32)), (23, "bfloat16", (1, 32))),
    "QLinearMatMul": ((21, None, (1, 20)),),
    "QuantizeLinear": ((23, None, (1, 24)),),
    "ReduceL1": ((13, "double", (1, 20)),),
    "ReduceL2": ((13, "double", (1, 20)),),
    "ReduceLogSum": ((13, "double", (1, 20)),),
    "ReduceMean": ((13, "int64", (1, 20)), (18, "int64", (1, 20))),
    "ReduceProd": ((13, "double", (1, 20)), (18, "double", (1, 20))),
    "SpaceToDepth": ((13, "uint8 int8", (1, 32)),),
    "SplitToSequence": ((11, None, (1, 23)),),
    "Sub": ((14, _BYTES, (1, 21)),),
    "TopK": ((11, "uint8 int8 int16", (1, 26)),),
    "Transpose": ((21, _NARROW, (1, 19)),),
    "Trilu": ((14, "bool", (1, 19)), (14, "int32", (1, 32))),
    "Where": ((16, "uint32 int8", (1, 32)),),
}
