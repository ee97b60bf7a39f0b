"""Operators of quantized models, `torch.ops.normfuse.*`; importing this package registers them.

Each is *defined* by a function in plain PyTorch, in the file of its name: sums of integers are exact, so that every other
implementation gives the same ones. On a CPU the native kernels run in its place where they were built; float64 always takes the
definition. On an NVIDIA GPU norms, softmax, quantize_rows and products are Triton kernels where triton works. Operators have shapes
for torch.compile and torch.export, and no backward.

    shiftquant_linear            floats → quantize by rows or with one scale → integer product → activation
    shiftquant_conv2d            the same for a convolution, quantized by image
    shiftquant_embedding         rows of a packed table
    attention                    softmax(scale q kᵀ + mask) v
    shiftquant_attention         the same, whose q kᵀ is an integer product
    quantize_rows                floats → integers and a scale a row
    norm_quantize                (residual +) norm → integers and a scale a row
    shiftquant_matmul            integers → integer product → activation, residual → floats
    shiftquant_matmul_quantize   integers → integer product → activation → integers
    rms_norm, crms_norm, l1_norm, two_pass_softmax
                                 over the last axis, floats to floats
    add_rms_norm, add_crms_norm  the same behind a residual addition, whose sum they give too
    rms_norm_linear              a linear layer behind an RMSNorm, the division behind the product
    quantize_codes, dequantize_codes, codes_conv2d, codes_add, codes_gate, codes_max_pool2d, codes_mean, codes_take,
    codes_upsample
                                 what convolutional networks in codes are made of (`normfuse.ops.codes`)

`OPERATORS` holds the record of each (`normfuse.ops.operator`). A file of this folder that states an `Operator` is all that it takes
to have one (docs/writing-an-operator.md).
"""

from __future__ import annotations

from normfuse.ops.add_norm import add_crms_norm, add_rms_norm
from normfuse.ops.attention import attention, shiftquant_attention
from normfuse.ops.codes import (
    codes_add,
    codes_conv2d,
    codes_gate,
    codes_max_pool2d,
    codes_mean,
    codes_take,
    codes_upsample,
    dequantize_codes,
    quantize_codes,
)
from normfuse.ops.norm_quantize import norm_quantize
from normfuse.ops.norms import crms_norm, l1_norm, rms_norm
from normfuse.ops.operator import Operator
from normfuse.ops.quantize_rows import quantize_rows
from normfuse.ops.rms_norm_linear import rms_norm_linear
from normfuse.ops.shiftquant_conv2d import conv_columns, shiftquant_conv2d
from normfuse.ops.shiftquant_embedding import shiftquant_embedding
from normfuse.ops.shiftquant_linear import shiftquant_linear
from normfuse.ops.shiftquant_matmul import shiftquant_matmul, shiftquant_matmul_quantize
from normfuse.ops.two_pass_softmax import two_pass_softmax
from normfuse.stated import stated

__all__ = [
    "OPERATORS", "Operator", "add_crms_norm", "add_rms_norm", "attention", "codes_add", "codes_conv2d", "codes_gate",
    "codes_max_pool2d", "codes_mean", "codes_take", "codes_upsample", "conv_columns", "crms_norm", "dequantize_codes",
    "l1_norm", "norm_quantize", "quantize_codes", "quantize_rows", "rms_norm", "rms_norm_linear", "shiftquant_attention",
    "shiftquant_conv2d", "shiftquant_embedding", "shiftquant_linear", "shiftquant_matmul", "shiftquant_matmul_quantize",
    "two_pass_softmax",
]  # fmt: skip


#: By name.
OPERATORS = {operator.name: operator for operator in stated(__name__, __path__, Operator)}
for _operator in OPERATORS.values():
    _operator.register()
