"""The ops of the domain `normfuse`, each defined in standard ops: bodies of functions, and what portable files hold instead."""

from normfuse.export.ops.attention import ATTENTION
from normfuse.export.ops.emitter import DOMAIN, FunctionBody, Op
from normfuse.export.ops.norms import CRMS_NORM, L1_NORM, NORM_QUANTIZE, RMS_NORM
from normfuse.export.ops.quantize_rows import QUANTIZE_ROWS
from normfuse.export.ops.rms_norm_linear import RMS_NORM_LINEAR
from normfuse.export.ops.shiftquant_conv2d import SHIFTQUANT_CONV2D
from normfuse.export.ops.shiftquant_embedding import SHIFTQUANT_EMBEDDING
from normfuse.export.ops.shiftquant_linear import SHIFTQUANT_LINEAR
from normfuse.export.ops.shiftquant_matmul import SHIFTQUANT_MATMUL, SHIFTQUANT_MATMUL_QUANTIZE
from normfuse.export.ops.two_pass_softmax import TWO_PASS_SOFTMAX

__all__ = ["DOMAIN", "OPS", "FunctionBody", "Op"]

#: By op type.
OPS = {
    op.name: op
    for op in (
        ATTENTION,
        CRMS_NORM,
        L1_NORM,
        NORM_QUANTIZE,
        QUANTIZE_ROWS,
        RMS_NORM,
        RMS_NORM_LINEAR,
        SHIFTQUANT_CONV2D,
        SHIFTQUANT_EMBEDDING,
        SHIFTQUANT_LINEAR,
        SHIFTQUANT_MATMUL,
        SHIFTQUANT_MATMUL_QUANTIZE,
        TWO_PASS_SOFTMAX,
    )
}
