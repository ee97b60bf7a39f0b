"""What a runtime takes: opset, contrib ops, form of attention."""

import difflib
from dataclasses import dataclass

from normfuse.errors import UsageError
from normfuse.export.runtimes import newest_opset, parse_runtime

__all__ = [
    "ATTENTION_FORMS",
    "FUSED_NORM_OPSET",
    "MAX_OPSET",
    "MIN_OPSET",
    "NATIVE_ATTENTION",
    "QUANTIZED_FORMS",
    "TARGETS",
    "Target",
    "target_named",
]

#: Oldest opset: LayerNormalization exists from 17 on, and nothing older can be exported by torch.
MIN_OPSET = 17
#: Newest opset that torch translates to.
MAX_OPSET = 23
#: First opset with RMSNormalization and Attention.
FUSED_NORM_OPSET = 23

#: `decomposed`: MatMul, Softmax, MatMul. `attention23`: the standard op of opset 23. `mha`: MultiHeadAttention of
#: ONNX Runtime. `qkv`: Attention of ONNX Runtime, which also holds the projection of the input to q, k and v.
ATTENTION_FORMS = ("decomposed", "attention23", "mha", "qkv")
#: Attention of normfuse's kernels, in files whose quantized layers are in the native form.
NATIVE_ATTENTION = "native"

#: Forms of quantized layers. `native`: ops of normfuse's kernel library, with function bodies for where it is not; `integer`:
#: MatMulInteger and ConvInteger; `qdq`: QuantizeLinear and DequantizeLinear with static scales; `weight_only`: weights in integers,
#: DequantizeLinear, and activations in float.
QUANTIZED_FORMS = ("native", "integer", "qdq", "weight_only")


@dataclass(frozen=True)
class Target:
    """Where a file is to run.

    Attributes:
        name: what the user writes.
        opset: the opset that is used unless another is asked for.
        contrib: ops of the domain `com.microsoft` may be used.
        attention: the forms of attention that the target takes, the default one first.
        quantized: the forms of quantized layers that it takes.
        note: why these values, in one line.
    """

    name: str
    opset: int
    contrib: bool
    attention: tuple[str, ...]
    quantized: tuple[str, ...]
    note: str

    def has_fused_norms(self, opset: int) -> bool:
        """RMSNormalization may be used; below opset 23 it is spelt out in older ops."""
        return opset >= FUSED_NORM_OPSET

    def attention_at(self, opset: int, *, native: bool = False) -> tuple[str, ...]:
        """The forms that exist at `opset`, the default one first; that of the kernel library where the file uses it anyway."""
        found = tuple(form for form in self.attention if form != "attention23" or opset >= FUSED_NORM_OPSET)
        return found if native else tuple(form for form in found if form != NATIVE_ATTENTION)


TARGETS = {
    t.name: t
    for t in (
        Target(
            "onnxruntime",
            23,
            True,
            (*ATTENTION_FORMS, NATIVE_ATTENTION),
            ("native", "integer", "qdq"),
            "RMSNormalization-23 costs half of LayerNormalization on CPU",
        ),
        # A TensorRT-RTX builder refuses Attention-23 in fp32 unless it is marked decomposable, and fuses the plain form as well.
        # It has no MatMulInteger and no ConvInteger.
        Target(
            "tensorrt",
            23,
            False,
            ("decomposed", "attention23"),
            ("qdq", "weight_only"),
            "the parser takes RMSNormalization-23 as one kernel",
        ),
        Target(
            "portable",
            20,
            False,
            ("decomposed", "attention23"),
            ("integer", "qdq", "weight_only"),
            "the opset that torch itself exports to",
        ),
    )
}


_CALLED = {"trt": "tensorrt", "ort": "onnxruntime", "onnx": "portable", "standard": "portable"}  # by others


def target_named(name: str) -> Target:
    """The target called `name`.

    Raises:
        UsageError: there is none; the message names the closest one.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(_CALLED.get(str(name).lower(), str(name)), TARGETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UsageError(f"unknown target {name!r}{hint} Known targets: {', '.join(TARGETS)}")


def opset_for(target: Target, opset: int | None, runtime: str | None = None) -> int:
    """`opset`, or the default of `target`; the newest that ONNX Runtime `runtime` reads, where that is older.

    Raises:
        UsageError: torch cannot export to it, or `runtime` does not read it.
    """
    newest = MAX_OPSET if runtime is None else newest_opset(parse_runtime(runtime))
    if opset is None:
        return min(target.opset, newest)
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset!r} is not supported: expected an integer from {MIN_OPSET} to {MAX_OPSET}")
    if opset > newest:
        raise UsageError(
            f"opset {opset}: ONNX Runtime {runtime} reads opsets up to {newest}; leave opset out, or name a newer runtime"
        )
    return opset
