"""What a target is: what its runtime takes, and the folder that writes and runs its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfuse.export.session import Session

__all__ = [
    "ATTENTION_FORMS",
    "FUSED_NORM_OPSET",
    "MAX_OPSET",
    "MIN_OPSET",
    "NATIVE_ATTENTION",
    "QUANTIZED_FORMS",
    "AttentionForm",
    "Folder",
    "QuantizedForm",
    "Target",
    "TargetName",
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

TargetName = Literal["onnxruntime", "portable", "tensorrt", "openvino"]
"""As users write it. `normfuse.export.targets` knows which there are; type checkers read this line, and a test holds it to that."""


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


class Folder(Protocol):
    """What a folder of `export/` is to everybody else: one kind of file, who writes it and who runs it.

    A new target is such a folder, with a module `target` whose `FOLDER` is one of these, and its name in `normfuse.export.targets`.
    A function `to_<folder>` in its module `api` is `normfuse.export.to_<folder>`. Importing `target` loads neither torch nor the
    runtime: an engine of `normfuse.bench` lives in a process without torch.

    Attributes:
        what: one such file, for messages: "an ONNX file".
        suffixes: of its name, the usual one first.
        targets: what the runtimes of such a file take; the first one is meant where none is named.
        engine: name of its runtime among the engines of `normfuse bench`.
        on_gpu: it runs on a GPU, and is timed by its clock.
        options: the options class of `write`; the command line's flags are its fields.
    """

    what: str
    suffixes: tuple[str, ...]
    targets: tuple[Target, ...]
    engine: str
    on_gpu: bool

    @property
    def options(self) -> type[Any]: ...

    def write(self, gm: nn.Module, path: Path, options: Any) -> Any:
        """Write the optimized module to `path`; the file appears only after it was proven. Returns what to tell of it."""

    def convert(self, file: Path, path: Path, inputs: Mapping[str, Tensor], options: Any) -> Any:
        """Write the ONNX file `file` to `path`, held against it on `inputs` where it runs here. Returns what to tell of it."""

    def original(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, dynamic_shapes: Any = None) -> None:
        """Write the module that nobody has optimized, as everybody does for this runtime: what an optimized file must beat."""

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        """The file in its runtime."""

    def facts(self, path: Path) -> Mapping[str, str]:
        """What the file says of its origin: `normfuse.sqnr` and others."""

    def dtypes(self, path: Path) -> tuple[str, ...]:
        """Floating dtypes that it computes in, by torch's names: the coarsest one says how far it may be from its module."""

    def timed(self, path: str, arrays: Any, threads: int, *, graph: bool = True) -> Callable[[], Any]:
        """A call without arguments that runs the file once on `arrays`, by name or in the order of its inputs; without torch."""
