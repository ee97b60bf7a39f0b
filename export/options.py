"""Options of an export as values: checked once, where they are made, and handed down whole.

The keyword arguments of `to_onnx` and `to_tensorrt` are their fields, and the command line reads its choices from their types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, get_args

from normfuse.errors import UsageError, did_you_mean
from normfuse.export.targets import (
    FUSED_NORM_OPSET,
    AttentionForm,
    QuantizedForm,
    Target,
    TargetName,
    attention_forms,
    opset_for,
    target_named,
)
from normfuse.export.tensorrt.flavour import FLAVOURS, Flavour
from normfuse.export.tensorrt.profiles import Profile, parse_shapes

if TYPE_CHECKING:
    import torch

__all__ = [
    "ATTENTION",
    "FORMS",
    "IO_DTYPES",
    "MAX_PROTO",
    "Common",
    "DtypeName",
    "EngineKeywords",
    "EngineOptions",
    "ExportKeywords",
    "ExportOptions",
    "FileKeywords",
    "IoDtype",
    "ModuleKeywords",
    "PluginName",
    "Shapes",
]  # fmt: skip

Attention = Literal["auto", AttentionForm]
Form = Literal["auto", QuantizedForm]
IoDtype = Literal["fp32", "low"]
#: As people write them; any case, and `torch.float16` itself, are understood as well.
DtypeName = Literal[
    "fp32", "fp16", "bf16", "fp64", "float32", "float", "single", "f32", "float16", "half", "f16", "bfloat16",
    "float64", "double", "f64",
]  # fmt: skip
PluginName = Literal["rms_norm", "crms_norm", "l1_norm", "rms_norm_linear", "shiftquant_linear", "two_pass_softmax"]
Shapes = Mapping[str, Any] | Sequence[str] | None

ATTENTION: tuple[str, ...] = get_args(Attention)
FORMS: tuple[str, ...] = get_args(Form)
#: What inputs and outputs can be: float32 with one cast each, or the dtype that the file computes in.
IO_DTYPES: tuple[str, ...] = get_args(IoDtype)
#: Weights above this many bytes go to a second file. A protobuf message ends at 2 GiB; the graph needs some of it.
MAX_PROTO = 2**31 - 64 * 2**20
_INLINE = 2**20  # the file that an engine is made of keeps its weights beside it, so that reading its signature does not read them


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every kind of file is asked alike."""

    dtype: DtypeName | torch.dtype | None = None
    io_dtype: IoDtype = "fp32"
    opset: int | None = None
    attention: Attention = "auto"
    form: Form = "auto"
    verify: bool = True
    tolerance: float | None = None
    force: bool = False
    progress: bool = True

    def _check(self, dtypes: tuple[str, ...]) -> None:
        if self.dtype is not None:
            from normfuse.export.onnx.precision.spelling import spelled_dtype

            object.__setattr__(self, "dtype", spelled_dtype(self.dtype, known=dtypes))
        _known("io_dtype", self.io_dtype, IO_DTYPES)
        _known("form of attention", self.attention, ATTENTION)
        _known("form", self.form, FORMS)

    @property
    def computes_in(self) -> str | None:
        """`dtype` by its short name."""
        return cast("str | None", self.dtype)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Common):
    """How a module becomes an ONNX file: the keyword arguments of `normfuse.export.to_onnx`, which says what each means.

    Raises:
        UsageError: one of them is wrong by itself, or two of them do not go together.
    """

    target: TargetName = "onnxruntime"
    runtime: str | None = None
    int4_initializers: bool = False
    tune: bool = False
    measure_seconds: float = 10.0
    threads: int | None = None
    external_data_above: int = MAX_PROTO

    def __post_init__(self) -> None:
        self._check(("fp32", "fp16", "bf16", "fp64"))
        attention_forms(self.where, self.newest, self.attention, native=True)

    @property
    def where(self) -> Target:
        """What the target takes."""
        return target_named(self.target)

    @property
    def newest(self) -> int:
        """The opset of the file, or the newest that may be tried."""
        return opset_for(self.where, self.opset, self.runtime)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Common):
    """How a module becomes a TensorRT engine: the keyword arguments of `normfuse.export.to_tensorrt`, which says what each means.

    Raises:
        UsageError: one of them is wrong by itself, or two of them do not go together.
    """

    shapes: Shapes = None
    flavour: Flavour | None = None
    capabilities: Sequence[str] = ()
    plugins: Sequence[PluginName] = ()

    def __post_init__(self) -> None:
        self._check(("fp32", "fp16", "bf16"))
        object.__setattr__(self, "shapes", parse_shapes(self.shapes))
        object.__setattr__(self, "capabilities", tuple(self.capabilities))
        object.__setattr__(self, "plugins", tuple(self.plugins))
        if self.flavour is not None and self.flavour not in FLAVOURS:
            raise UsageError(
                f"unknown flavour {self.flavour!r}: expected {' or '.join(FLAVOURS)}{did_you_mean(self.flavour, FLAVOURS)}"
            )
        for text in self.capabilities:
            if not isinstance(text, str) or not text.replace(".", "", 1).isdigit() or "." not in text:
                raise UsageError(
                    f"unknown compute capability {text!r}: expected numbers like 8.6, as NVIDIA lists them for each GPU"
                )
        if self.plugins:
            from normfuse.export.tensorrt.plugins.plans import PLUGINS

            unknown = [name for name in self.plugins if name not in PLUGINS]
            if unknown:
                raise UsageError(
                    f"no plugin is called {unknown[0]!r}: expected {', '.join(PLUGINS)}{did_you_mean(unknown[0], PLUGINS)}"
                )
        self.as_file()

    @property
    def profiles(self) -> dict[str, Profile]:
        """`shapes`, read."""
        return cast("dict[str, Profile]", self.shapes)

    @property
    def weights_in(self) -> str:
        """The dtype of weights and products, unless the model has another half one."""
        return self.computes_in or "fp32"

    def as_file(self) -> ExportOptions:
        """Of the ONNX file that the engine is made of."""
        options = ExportOptions(
            target="tensorrt", dtype=self.dtype, io_dtype=self.io_dtype, opset=self.opset, attention=self.attention, form=self.form,
            verify=self.verify, tolerance=self.tolerance, progress=self.progress, external_data_above=_INLINE,
        )  # fmt: skip
        if self.attention != "auto":
            return options
        return dataclasses.replace(options, attention="attention23" if options.newest >= FUSED_NORM_OPSET else "decomposed")


class FileKeywords(TypedDict, total=False):
    """Of what is built of an ONNX file; the fields of `EngineOptions` that are not about the export."""

    dtype: DtypeName | torch.dtype | None
    io_dtype: IoDtype
    shapes: Shapes
    flavour: Flavour | None
    capabilities: Sequence[str]
    force: bool
    progress: bool


class ModuleKeywords(TypedDict, total=False):
    """Of what starts from a module."""

    opset: int | None
    attention: Attention
    form: Form
    verify: bool
    tolerance: float | None


class EngineKeywords(FileKeywords, ModuleKeywords, total=False):
    """The fields of `EngineOptions`."""

    plugins: Sequence[PluginName]


class ExportKeywords(ModuleKeywords, total=False):
    """The fields of `ExportOptions`."""

    dtype: DtypeName | torch.dtype | None
    io_dtype: IoDtype
    target: TargetName
    runtime: str | None
    int4_initializers: bool
    tune: bool
    measure_seconds: float
    threads: int | None
    external_data_above: int
    force: bool
    progress: bool


def _known(what: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UsageError(f"unknown {what} {value!r}: expected {', '.join(names)}{did_you_mean(value, names)}")
