"""What a runtime takes: opset, contrib ops, form of attention."""

from dataclasses import dataclass
from typing import Literal, get_args

from normfuse.errors import UsageError, did_you_mean
from normfuse.export.runtimes import newest_opset, parse_runtime

__all__ = [
    "ATTENTION_FORMS",
    "FUSED_NORM_OPSET",
    "MAX_OPSET",
    "MIN_OPSET",
    "NATIVE_ATTENTION",
    "QUANTIZED_FORMS",
    "TARGETS",
    "AttentionForm",
    "QuantizedForm",
    "Target",
    "TargetName",
    "attention_forms",
    "opset_for",
    "target_named",
]

#: Oldest opset: LayerNormalization exists from 17 on, and nothing older can be exported by torch.
MIN_OPSET = 17
#: Newest opset that torch translates to.
MAX_OPSET = 23
#: First opset with RMSNormalization and Attention.
FUSED_NORM_OPSET = 23

#: `decomposed`: MatMul, Softmax, MatMul. `attention23`: the standard op of opset 23. `mha`: MultiHeadAttention of
#: ONNX Runtime. `qkv`: Attention of ONNX Runtime, which also holds the projection of the input to q, k and v. `native`:
#: attention of normfuse's kernels, in files whose quantized layers are in the native form.
AttentionForm = Literal["decomposed", "attention23", "mha", "qkv", "native"]
NATIVE_ATTENTION = "native"
#: Those that need no kernels of normfuse.
ATTENTION_FORMS: tuple[str, ...] = tuple(f for f in get_args(AttentionForm) if f != NATIVE_ATTENTION)

#: Forms of quantized layers. `native`: ops of normfuse's kernel library, with function bodies for where it is not; `integer`:
#: MatMulInteger and ConvInteger; `qdq`: QuantizeLinear and DequantizeLinear with static scales; `weight_only`: weights in integers,
#: DequantizeLinear, and activations in float. What each is stands in `normfuse.export.onnx.quantized`.
QuantizedForm = Literal["native", "integer", "qdq", "weight_only"]
QUANTIZED_FORMS: tuple[str, ...] = get_args(QuantizedForm)

TargetName = Literal["onnxruntime", "tensorrt", "portable"]


@dataclass(frozen=True)
class Target:
    """Where a file is to run, and what is taken there.

    Attributes:
        name: what the user writes.
        opset: the opset that is used unless another is asked for.
        attention: the forms of attention that it takes, the default one first.
        forms: the forms of quantized layers that it takes, in order of preference; which of those that stand side by side is the
            faster one is for a table or a clock to say.
        note: why these values, in one line.
        runtime: who runs it, for messages.
        domains: whose ops may be used beside those of ONNX.
        runs_here: it is the runtime that files are proven in: forms can be measured in it, and a file that it has no kernels for is
            no file.
        lacks: dtypes that it computes next to nothing in.
        own_in_float32: ops of normfuse and the scales of quantized layers are in float32.
        unsigned_codes: codes of activations are bytes with a zero point of 128; else int8 with a zero point of 0.
        codes_between: it adds, pools and concatenates codes as well, where pairs of QuantizeLinear and DequantizeLinear say so;
            codes are then unsigned, and weights int8.
        one_scale_tensors: a weight has one scale, with what is left of each output's behind the product.
    """

    name: TargetName
    opset: int
    attention: tuple[AttentionForm, ...]
    forms: tuple[tuple[QuantizedForm, ...], ...]
    note: str
    runtime: str = "ONNX Runtime on the CPU"
    domains: tuple[str, ...] = ()
    runs_here: bool = False
    lacks: tuple[str, ...] = ("bf16",)
    own_in_float32: bool = True
    unsigned_codes: bool = False
    codes_between: bool = False
    one_scale_tensors: bool = False

    @property
    def quantized(self) -> tuple[QuantizedForm, ...]:
        """The forms of quantized layers, the preferred ones first."""
        return tuple(form for rank in self.forms for form in rank)

    def attention_at(self, opset: int, *, native: bool = False) -> tuple[str, ...]:
        """The forms that exist at `opset`, the default one first; that of the kernel library where the file uses it anyway."""
        found = tuple(form for form in self.attention if form != "attention23" or opset >= FUSED_NORM_OPSET)
        return found if native else tuple(form for form in found if form != NATIVE_ATTENTION)


_ONNX_RUNTIME = Target(
    "onnxruntime",
    23,
    ("decomposed", "attention23", "mha", "qkv", "native"),
    (("native",), ("integer", "qdq")),
    "RMSNormalization-23 costs half of LayerNormalization on CPU",
    domains=("com.microsoft",),
    runs_here=True,
    unsigned_codes=True,
    codes_between=True,
)
# A TensorRT-RTX builder refuses Attention-23 in fp32 unless it is marked decomposable, and fuses the plain form as well.
# It has no MatMulInteger and no ConvInteger.
_TENSORRT = Target(
    "tensorrt",
    23,
    ("decomposed", "attention23"),
    (("qdq",), ("weight_only",)),
    "the parser takes RMSNormalization-23 as one kernel",
    runtime="TensorRT",
    lacks=("fp64",),
    own_in_float32=False,
    one_scale_tensors=True,
)
# Whatever reads it, the CPU kernels of ONNX Runtime are what most readers have.
_PORTABLE = Target(
    "portable",
    20,
    ("decomposed", "attention23"),
    (("qdq",), ("integer",), ("weight_only",)),
    "the opset that torch itself exports to",
    codes_between=True,
)
TARGETS: dict[str, Target] = {t.name: t for t in (_ONNX_RUNTIME, _TENSORRT, _PORTABLE)}


_CALLED = {"trt": "tensorrt", "ort": "onnxruntime", "onnx": "portable", "standard": "portable"}  # by others


def target_named(name: str) -> Target:
    """The target called `name`.

    Raises:
        UsageError: there is none; the message names the closest one.
    """
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(_CALLED.get(str(name).lower(), name), TARGETS) or "."
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


def attention_forms(target: Target, opset: int, asked: str, *, native: bool) -> tuple[str, ...]:
    """The forms of attention to try, the plain one first; `native` where the file uses the kernel library anyway.

    Raises:
        UsageError: the form that is `asked` for does not exist there.
    """
    possible = target.attention_at(opset, native=native)
    if asked == "auto":
        return possible if target.runs_here else possible[:1]
    if asked in possible:
        return (asked,)
    if asked == NATIVE_ATTENTION and asked in target.attention:
        reason = "stands in files whose quantized layers are in the native form"
    else:
        reason = (
            f"needs opset {FUSED_NORM_OPSET}"
            if asked in target.attention
            else f"uses ops that target {target.name!r} does not have"
        )
    raise UsageError(f"attention={asked!r} {reason}; possible here: auto, {', '.join(possible)}")
