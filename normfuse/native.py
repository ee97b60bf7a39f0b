"""The native kernels: a shared object that PyTorch and ONNX Runtime call alike, so that both run the same integers.

`available()` says whether it is there and `why_not()` why it is not; everything in normfuse also works without it, slower. ONNX
Runtime takes the same file: `options.register_custom_ops_library(str(normfuse.native.path()))`. `NORMFUSE_NATIVE=0` in the
environment switches the kernels off, in Python only.

`call` is the one way in: it hands over the arguments of a function of native/normfuse.h in their order, without the threads (those
of `torch.get_num_threads()`), tensors as themselves, absent ones as None, and raises what the function has to say. Which arguments
a function takes is stated by the operator that it was written for (`Function`, in `normfuse.ops`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from normfuse import words
from normfuse.errors import NormfuseError, UsageError
from normfuse.native_library import SWITCH, library_file, switched_off

__all__ = [
    "ATTENTION", "CACHE", "CODES_CONV", "CONV", "EPILOGUES", "F32", "F32_OR_NONE", "FLOAT", "FUNCTIONS", "I8", "I8_OR_NONE", "I32",
    "I64", "INT", "KINDS", "LONG", "STRIDED", "STRIDED_OR_NONE", "U8", "U8_OR_NONE", "WEIGHT", "WEIGHTS", "Attention", "Cache",
    "CodesConv", "Conv", "Function", "Weight", "available", "call", "codes_bytes", "declare", "force_isa", "isa", "isas", "library",
    "operators", "path", "sorted_channels", "threads", "weight", "why_not",
]  # fmt: skip

EPILOGUES = {word: number for number, word in enumerate(words.EPILOGUES)}
FUNCTIONS = {word: number for number, word in enumerate(words.FUNCTIONS)}
KINDS = {word: number for number, word in enumerate(words.KINDS)}
_REBUILD = "then install normfuse again (in a checkout: pip install -e .)"


class Weight(ctypes.Structure):
    """`struct nf_weight`; made by `weight`, which keeps the tensors alive that it points to."""

    _fields_ = [
        ("n", c_int64), ("k", c_int64), ("bits", c_int32), ("groups", c_int32), ("sizes", c_void_p), ("order", c_void_p),
        ("packed", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("multipliers", c_void_p), ("block", c_int32),
    ]  # fmt: skip
    keep: tuple[Tensor | None, ...]


class Conv(ctypes.Structure):
    """`struct nf_conv`."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "c", "h", "w", "kh", "kw")),
        *((name, c_int64 * 2) for name in ("stride", "pad_begin", "pad_end", "dilation")),
        ("conv_groups", c_int64),
    ]


class CodesConv(ctypes.Structure):
    """`struct nf_codes_conv`."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "c", "h", "w", "outputs", "kh", "kw")),
        *((name, c_int64 * 2) for name in ("stride", "pad_begin", "pad_end", "dilation")),
        ("groups", c_int64),
        *((name, c_int32) for name in ("zero", "low", "high")),
        ("residual_scale", c_float),
        ("function", c_int32),
        ("gain", c_float),
        ("offset", c_float),
    ]


class Attention(ctypes.Structure):
    """`struct nf_attention`."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim")),
        *((name, c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride", "y_stride", "mask_stride")),
        ("scale", c_float),
        ("causal", c_int32),
        ("bits", c_int32),
        ("softcap", c_float),
        ("window", c_int64),
    ]


class Cache(ctypes.Structure):
    """`struct nf_cache`."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "past", "present", "total")),
        *((name, c_int64) for name in ("q_row", "k_row", "v_row", "pairs", "positions", "window")),
        ("scale", c_float),
        ("softcap", c_float),
        ("interleaved", c_int32),
    ]


# What an argument is called in an error: its name, or a function and a number, put into words only then.
Place = str | tuple[str, int]


def _named(where: Place) -> str:
    return where if isinstance(where, str) else f"{where[0]}, argument {where[1]}"


class _Array:
    """A pointer argument: a dense tensor of one dtype in main memory, or None where the function allows it."""

    ctype = c_void_p

    def __init__(self, dtype: torch.dtype, *, optional: bool = False, strided: bool = False) -> None:
        self.dtype, self.optional, self.strided = dtype, optional, strided

    def __call__(self, value: Any, where: Place) -> int | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, Tensor):
            raise UsageError(f"{_named(where)}: found {type(value).__name__}, expected a {self.dtype} tensor")
        if value.dtype is not self.dtype or value.device.type != "cpu" or not (self.strided or value.is_contiguous()):
            found = f"{value.dtype} on {value.device} of shape {tuple(value.shape)} and strides {value.stride()}"
            raise UsageError(
                f"{_named(where)}: found {found}, expected {'a' if self.strided else 'a contiguous'} {self.dtype} tensor on cpu"
            )
        return value.data_ptr() or _NOWHERE


class _Number:
    def __init__(self, ctype: Any) -> None:
        self.ctype = ctype

    def __call__(self, value: Any, where: Place) -> Any:
        if type(value) is int or (type(value) is float and self.ctype is c_float):
            return value  # the function's own argument types convert it
        try:
            return self.ctype(value)
        except TypeError as e:
            raise UsageError(f"{_named(where)}: found {value!r}, expected a number") from e


class _Record:
    """A structure, or several in an array."""

    ctype = c_void_p

    def __init__(self, structure: type[ctypes.Structure], *, many: bool = False) -> None:
        self.structure, self.many = structure, many

    def __call__(self, value: Any, where: Place) -> Any:
        if type(value) is self.structure and not self.many:
            return byref(value)
        values = list(value) if self.many and isinstance(value, Sequence) else [value]
        if not values or not all(isinstance(v, self.structure) for v in values):
            raise UsageError(f"{_named(where)}: expected {'a list of ' if self.many else ''}native.{self.structure.__name__}")
        return (self.structure * len(values))(*values) if self.many else byref(values[0])


# An empty tensor has no address, and a null pointer means "absent" to some functions: this one is never read.
_nowhere = ctypes.create_string_buffer(64)
_NOWHERE = ctypes.addressof(_nowhere)

#: What functions take: dense tensors in main memory, numbers, structures; a strided tensor goes with its strides in a structure.
F32, F32_OR_NONE = _Array(torch.float32), _Array(torch.float32, optional=True)
STRIDED, STRIDED_OR_NONE = _Array(torch.float32, strided=True), _Array(torch.float32, optional=True, strided=True)
I8, I32, I64 = _Array(torch.int8), _Array(torch.int32), _Array(torch.int64)
I8_OR_NONE = _Array(torch.int8, optional=True)
U8, U8_OR_NONE = _Array(torch.uint8), _Array(torch.uint8, optional=True)
INT, LONG, FLOAT = _Number(c_int32), _Number(c_int64), _Number(c_float)
WEIGHT, WEIGHTS, CONV, ATTENTION = _Record(Weight), _Record(Weight, many=True), _Record(Conv), _Record(Attention)
CACHE, CODES_CONV = _Record(Cache), _Record(CodesConv)


class Function:
    """A function of native/normfuse.h and its arguments after the threads, in their order: `F32`, `LONG`, `WEIGHT`, …"""

    def __init__(self, name: str, *arguments: _Array | _Number | _Record) -> None:
        self.name, self.arguments = name, arguments


_FUNCTIONS: dict[str, Function] = {}


def declare(function: Function) -> None:
    """Make a function known to `call`; an object that does not have it is of another version, and counts as missing."""
    _FUNCTIONS[function.name] = function
    _load.cache_clear()


def path() -> Path:
    """Where the shared object is, or would be: also what ONNX Runtime's `register_custom_ops_library` takes.

    Raises:
        NormfuseError: it is not there; the message says why and what to do.
    """
    if not library_file().is_file():
        raise NormfuseError(_missing())
    return library_file()


def available() -> bool:
    """Whether the native kernels can be called."""
    return isinstance(_load(), ctypes.CDLL)


def why_not() -> str:
    """Why the native kernels cannot be called and what to do about it; empty where they can."""
    found = _load()
    return found if isinstance(found, str) else ""


def library() -> ctypes.CDLL:
    """The loaded object with the argument types of every function that is declared.

    Raises:
        NormfuseError: it cannot be loaded; the message says why and what to do.
    """
    found = _load()
    if isinstance(found, str):
        raise NormfuseError(found)
    return found


def call(name: str, *args: Any) -> None:
    """`name(threads, *args)` of native/normfuse.h; tensors must be dense, in main memory and of the right dtype.

    Sizes are the caller's word: a function reads and writes as many elements as its numbers say.

    Raises:
        UsageError: an argument is wrong.
        NormfuseError: there are no native kernels.
    """
    native = library()
    if name not in _FUNCTIONS:  # operators declare what they call, and nothing has asked for one yet
        importlib.import_module("normfuse.ops")
        native = library()
    kinds = _FUNCTIONS[name].arguments
    if len(args) != len(kinds):
        raise UsageError(
            f"{name}: found {len(args)} arguments, expected {len(kinds)} (those of native/normfuse.h after the threads)"
        )
    given = [kind(value, (name, i)) for i, (kind, value) in enumerate(zip(kinds, args, strict=True), 1)]
    problem = getattr(native, name)(threads(), *given)
    if problem is not None:
        raise UsageError(f"{name}: {problem.decode()}")


def codes_bytes(conv: CodesConv) -> int:
    """Bytes of the packed weights of a convolution of codes.

    Raises:
        UsageError: its sizes are not possible.
    """
    found: int = library().nf_codes_bytes(byref(conv))
    if found < 0:
        raise UsageError("nf_codes_bytes: the sizes of a convolution of codes are out of range")
    return found


def threads() -> int | None:
    """The pool of `torch.get_num_threads()` threads, as an address."""
    found: int | None = library().nf_pool(torch.get_num_threads())
    return found


def operators() -> tuple[str, ...]:
    """The ops of the domain `normfuse` that the library registers in ONNX Runtime, under all names that files give them."""
    return tuple(library().nf_operators().decode().split())


def isas() -> tuple[str, ...]:
    """The instruction sets of this machine that there are kernels for, best first; the last is "scalar"."""
    return tuple(library().nf_isa_available().decode().split())


def isa() -> str:
    """The instruction set that the kernels use now."""
    name: bytes = library().nf_isa()
    return name.decode()


def force_isa(name: str | None) -> None:
    """Make all kernels of this process use one instruction set; None is the best one again. For tests and measurements.

    Raises:
        UsageError: this machine does not have it.
    """
    problem = library().nf_force_isa(None if name is None else name.encode())
    if problem is not None:
        raise UsageError(f"force_isa({name!r}): {problem.decode()}; this machine has {', '.join(isas())}")


def sorted_channels(exponents: Tensor) -> tuple[Tensor, Tensor | None]:
    """Channels by exponent: how many have each (int32 [groups]) and their stable order (int32 [k]; None when all are 0)."""
    key = (exponents.data_ptr(), exponents.numel(), None if exponents.is_inference() else exponents._version)
    known = _sorted.get(exponents)
    if known is not None and known[0] == key:
        return known[1], known[2]
    if exponents.dtype is not torch.uint8 or exponents.dim() != 1 or not exponents.numel():
        found = f"{exponents.dtype} of shape {tuple(exponents.shape)}"
        raise UsageError(f"exponents: found {found}, expected uint8, one for each input channel")
    sizes = torch.bincount(exponents).to(torch.int32)
    order = torch.argsort(exponents, stable=True).to(torch.int32) if sizes.numel() > 1 else None
    _sorted[exponents] = (key, sizes, order)
    return sizes, order


def weight(
    packed: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    multipliers: Tensor | None = None,
    block: int = 0,
) -> Weight:
    """`struct nf_weight` of a packed weight (see `normfuse.quant.packing`): `scale.numel()` outputs, `exponents.numel()` inputs.

    Args:
        packed: of `pack`.
        exponents: uint8 [K].
        scale, bias: float32 [N].
        bits: of a code.
        multipliers: of `pack_multipliers`, within their range: it is not looked at here.
        block: channels that share one.

    Raises:
        UsageError: sizes or dtypes do not belong together.
        NormfuseError: there are no native kernels.
    """
    sizes, order = sorted_channels(exponents)
    n = scale.numel()
    expected = library().nf_packed_bytes(n, bits, sizes.numel(), sizes.data_ptr())
    if expected < 0:
        raise UsageError(
            f"a weight of {n} outputs, {bits} bits and {sizes.numel()} exponents: expected 2 to 8 bits and 1 to 16 exponents"
        )
    if packed.numel() != expected:
        raise UsageError(
            f"packed weight: found {packed.numel()} bytes, expected {expected} for [{n}, {exponents.numel()}] in {bits} bits"
        )
    if bias is not None and bias.numel() != n:
        raise UsageError(f"bias: found {bias.numel()} values, expected {n}")
    found = Weight(
        n, exponents.numel(), bits, sizes.numel(), sizes.data_ptr(), None if order is None else order.data_ptr(),
        _Array(torch.uint8)(packed, "packed weight"), F32(scale, "scale"), F32_OR_NONE(bias, "bias"),
        I8_OR_NONE(multipliers, "multipliers"), block,
    )  # fmt: skip
    found.keep = (packed, sizes, order, scale, bias, multipliers)
    return found


_sorted = WeakIdKeyDictionary()


def _missing() -> str:
    if os.name == "nt":
        return "the native kernels are written for Linux and macOS; everything works without them, slower"
    return (
        f"the native kernels were not built: {library_file()} does not exist. Have a C++17 compiler "
        f"(Debian, Ubuntu: apt install g++; macOS: xcode-select --install), {_REBUILD}"
    )


@functools.cache
def _load() -> ctypes.CDLL | str:
    if switched_off():
        return f"the native kernels are switched off by {SWITCH}=0 in the environment"
    if not library_file().is_file():
        return _missing()
    try:
        found = ctypes.CDLL(str(library_file()))
    except OSError as e:
        return f"the native kernels cannot be loaded ({e}); have a C++17 compiler, {_REBUILD}"
    try:
        for name, declared in _FUNCTIONS.items():
            function = getattr(found, name)
            function.argtypes = [c_void_p, *(kind.ctype for kind in declared.arguments)]
            function.restype = c_char_p
        for name, result, arguments in (
            ("nf_packed_bytes", c_int64, (c_int64, c_int32, c_int32, c_void_p)),
            ("nf_codes_bytes", c_int64, (c_void_p,)),
            ("nf_pool", c_void_p, (c_int32,)),
            ("nf_isa_available", c_char_p, ()),
            ("nf_operators", c_char_p, ()),
            ("nf_isa", c_char_p, ()),
            ("nf_force_isa", c_char_p, (c_char_p,)),
        ):
            function = getattr(found, name)
            function.argtypes, function.restype = list(arguments), result
    except AttributeError as e:
        return f"the native kernels in {library_file()} are of another version of normfuse ({e}): {_REBUILD}"
    return found
