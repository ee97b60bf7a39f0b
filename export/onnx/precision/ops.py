"""What is known of ops: which of their floats may be half, and what half does to their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normfuse.export.ops import DOMAIN, OPS
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "CHEAP",
    "COMMON_DOMAINS",
    "ISLANDS",
    "MOVES",
    "PRODUCTS",
    "REDUCTIONS",
    "ROOTS",
    "SELECTS",
    "TRIGONOMETRIC",
    "WIDENING",
    "carries_activations",
    "flexible",
    "infer_dtypes",
]

COMMON_DOMAINS = ("", "ai.onnx")

#: Sums of products: runtimes accumulate them in float32 whatever their operands are.
PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "DeformConv", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})
#: Results are statistics: sums that overflow in half, and too few numbers to cost anything.
REDUCTIONS = frozenset(
    {"GlobalAveragePool", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"}
    | {"ReduceSumSquare"}
)
#: Results may leave the range of half although the operands do not. The square Mul(x, x) is another.
WIDENING = frozenset({"CumSum", "Exp", "Pow", "Reciprocal"})
#: Read numbers of any size, give ordinary ones.
ROOTS = frozenset({"Acosh", "Asinh", "Cosh", "Log", "Mish", "Sinh", "Softplus", "Sqrt"})
#: Lose everything where the argument is rounded.
TRIGONOMETRIC = frozenset({"Acos", "Asin", "Atan", "Cos", "Range", "Sin", "Tan"})
#: Whole operations that stay in float32, mostly for the statistics inside. LayerNormalization, RMSNormalization and Softmax are
#: not among them: their standard (`stash_type`) and the runtimes compute the inside of a half one in float32.
ISLANDS = frozenset(
    {"AffineGrid", "BlackmanWindow", "DFT", "Det", "GlobalLpPool", "GridSample", "GroupNormalization", "HammingWindow"}
    | {"HannWindow", "InstanceNormalization", "LRN", "LpNormalization", "LpPool", "MaxRoiPool", "MeanVarianceNormalization"}
    | {"MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "RoiAlign", "STFT", "SoftmaxCrossEntropyLoss"}
)
#: Number by number, or the choice of one: as exact as their inputs.
CHEAP = frozenset(
    {"Abs", "Add", "Ceil", "Celu", "Clip", "Div", "Elu", "Equal", "Erf", "Floor", "Gelu", "Greater", "GreaterOrEqual"}
    | {"HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Neg"}
    | {"PRelu", "ReduceMax", "ReduceMin", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softsign", "Sub", "Sum", "Swish", "Tanh"}
    | {"ThresholdedRelu", "Where"}
)
#: Numbers change their place and nothing else.
MOVES = frozenset(
    {"Compress", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad"}
    | {"Reshape", "ReverseSequence", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile"}
    | {"Transpose", "Trilu", "Unsqueeze"}
)
#: A number beyond the range of half means "never" or "no bound" here, and the largest half says the same.
SELECTS = frozenset({"Clip", "Max", "Min", "Where"}) | MOVES

# what kernels of normfuse hold in the dtype of activations; scales of quantized tensors are float32 in all of them
_ACTIVATIONS = frozenset({"gain", "key", "query", "residual", "shift", "sum", "value", "weight", "x", "y"})
# TensorRT-RTX 1.7: the parser asks for float32, half or int8; no type is inferred for a bfloat16 deconvolution
_NOT_IN_BFLOAT16 = frozenset({"ConvTranspose", "HardSwish"})
# statistics that the op keeps in float32 beside half data
_STATISTICS = {"BatchNormalization": (1, 2, 3, 4)}


def flexible(node: ir.Node, opset: int, low: ir.DataType) -> tuple[frozenset[int], frozenset[int]]:
    """Places of the float32 inputs and outputs of `node` that may be of dtype `low` instead; the others stay float32.

    An op that nobody describes has none.
    """
    ir = need("onnx_ir", extra="onnx")
    if node.domain == DOMAIN:
        return carries_activations(node)
    schema = _schema(node, opset)
    refused = low == ir.DataType.BFLOAT16 and node.op_type in _NOT_IN_BFLOAT16
    if schema is None or refused or node.op_type in ("Cast", "If", "Loop", "Scan"):
        return frozenset(), frozenset()
    allowed = {c.type_param_str for c in schema.type_constraints if f"tensor({low.name.lower()})" in c.allowed_type_strs}
    fixed = _STATISTICS.get(node.op_type, ())
    inputs = frozenset(
        i
        for i, v in enumerate(node.inputs)
        if v is not None and v.dtype == ir.DataType.FLOAT and i not in fixed and _formal(schema.inputs, i) in allowed
    )
    # an output whose type no input tells (ConstantOfShape, EyeLike, mean of LayerNormalization) has a float32 of its own
    bound = {_formal(schema.inputs, i) for i in inputs} | ({"T3"} if node.op_type == "DequantizeLinear" else set())
    outputs = frozenset(
        i for i, v in enumerate(node.outputs) if v.dtype == ir.DataType.FLOAT and _formal(schema.outputs, i) in bound & allowed
    )
    return inputs, outputs


def carries_activations(node: ir.Node) -> tuple[frozenset[int], frozenset[int]]:
    """Places of the float32 inputs and outputs of an op of normfuse that its kernels take in half as well."""
    ir = need("onnx_ir", extra="onnx")
    op = OPS.get(node.op_type)
    if op is None:
        return frozenset(), frozenset()
    names = tuple(name.removesuffix("?") for name in op.inputs)
    # the bias of a float product is one of its weights, that of an integer product is added in float32
    low = _ACTIVATIONS | ({"bias"} if "exponents" not in names else set())
    inputs = frozenset(
        i
        for i, v in enumerate(node.inputs)
        if v is not None and v.dtype == ir.DataType.FLOAT and i < len(names) and names[i] in low
    )
    outputs = frozenset(
        i
        for i, v in enumerate(node.outputs)
        if v.dtype in (ir.DataType.FLOAT, None) and i < len(op.outputs) and op.outputs[i].removesuffix("?") in low
    )
    return inputs, outputs


def infer_dtypes(nodes: list[ir.Node], opset: int) -> None:
    """Fill in dtypes of values that the exporter left open, in topological order, from the schemas of the ops."""
    ir = need("onnx_ir", extra="onnx")
    for node in nodes:
        schema = _schema(node, opset)
        for i, out in enumerate(node.outputs):
            if out.dtype is not None or schema is None:
                continue
            formal = _formal(schema.outputs, i)
            only = [c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == formal]
            if only and len(only[0]) == 1:  # the INT32 of MatMulInteger
                formal = str(only[0][0])
            same = [v.dtype for j, v in enumerate(node.inputs) if v is not None and _formal(schema.inputs, j) == formal]
            if "to" in node.attributes:
                out.dtype = ir.DataType(node.attributes["to"].value)
            elif same and same[0] is not None:
                out.dtype = same[0]
            elif formal.startswith("tensor("):
                out.dtype = getattr(ir.DataType, formal[len("tensor(") : -1].upper())


def _schema(node: ir.Node, opset: int) -> Any:
    defs = need("onnx", extra="onnx").defs
    if node.domain not in COMMON_DOMAINS or not defs.has(node.op_type, ""):
        return None
    return defs.get_schema(node.op_type, opset, "")


def _formal(parameters: Any, i: int) -> str:
    """Type, or variable for one, of the i-th parameter; the last one may stand for any number."""
    return str(parameters[min(i, len(parameters) - 1)].type_str) if parameters else ""
