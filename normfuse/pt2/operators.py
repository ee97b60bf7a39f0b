"""Operators that a saved program may call: they compute values from tensors and do nothing else.

Which do is read from the schemas that PyTorch has registered. There is no list of thousands of names to keep, and none of
dangerous ones to keep complete: an operator that takes a file name, a stream or an object of a class has no place for it here.
"""

import re
from functools import cache
from typing import Any

from normfuse.pt2.problems import Unsafe

__all__ = ["check_call"]

_NAMESPACES = frozenset(("aten", "prims", "quantized_decomposed", "normfuse", "torchvision"))
#: Arguments in words, by name: they choose among variants of a computation.
_WORDS = frozenset(
    """
    UPLO activation api_name approximate assert_msg driver epilogue equation indexing interpolation kind mode norm ord p
    pad_mode padding padding_mode padding_side reduce reduction rounding_mode side
    """.split()
)
_VALUES = frozenset(
    """
    Tensor int SymInt bool SymBool float SymFloat number complex Device ScalarType Layout MemoryFormat
    """.split()
)
_WRAPPED = re.compile(r"(?:Optional|List)\[(.*)\]")
#: These make tensors from numbers.
_FACTORIES = frozenset(
    """
    arange bartlett_window blackman_window empty empty_permuted empty_strided eye fft_fftfreq fft_rfftfreq full hamming_window
    hann_window kaiser_window linspace logspace ones rand randint randn randperm range scalar_tensor tril_indices triu_indices
    zeros iota
    """.split()
)
#: These return nothing, or numbers, and only check.
_ASSERTIONS = frozenset(
    """
    _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _functional_assert_scalar sym_constrain_range
    sym_constrain_range_for_size _check_is_size
    """.split()
)
#: Of the operators of ATen that are called private, those that exporting a model leads to.
_PRIVATE = (
    frozenset(
        """
    __and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d
    _adaptive_avg_pool3d _batch_norm_no_update _batch_norm_with_update _cdist_forward _conj _convolution _convolution_mode
    _embedding_bag _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _functional_assert_async _functional_assert_scalar _grouped_mm
    _int_mm _linalg_det _linalg_eigh _linalg_slogdet _linalg_svd _local_scalar_dense _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _native_multi_head_attention _neg_view
    _pdist_forward _prelu_kernel _reshape_alias _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _scaled_mm _shape_as_tensor _softmax _stack
    _to_copy _transform_bias_rescale_qkv _transformer_encoder_layer_fwd _trilinear _unique2 _unsafe_index _unsafe_index_put
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _weight_norm _weight_norm_interface _weight_int8pack_mm _weight_int4pack_mm _thnn_fused_gru_cell
    _thnn_fused_lstm_cell _add_relu _addmm_activation _masked_softmax _safe_softmax _dim_arange _cast_Float _cast_Long
    _pad_circular _pad_enum
    """.split()
    )
    | _ASSERTIONS
)
#: Storage, history and devices of a tensor are no values; libraries of vendors read packed objects out of tensors.
_LEFT_OUT = re.compile(
    r"(set|set_data|resize|resize_as|pin_memory|is_pinned|record_stream|requires_grad|requires_grad_|retain_grad|data|rename"
    r"|rename_|align_\w*|refine_names|to_mkldnn|fbgemm_\w+|mkldnn_\w+|cudnn_\w+|miopen_\w+|quantized_(lstm|gru|rnn)\w*"
    r"|inductor_\w+|is_leaf|output_nr|retains_grad|backward|set_|resize_|resize_as_)"
)
#: Functions over whole graphs.
_OVER_GRAPHS = frozenset(
    """
    associative_scan cond invoke_subgraph map_impl scan while_loop wrap_with_autocast wrap_with_set_grad_enabled
    """.split()
)
#: Arithmetic on sizes.
_ON_SIZES = frozenset((
    *(f"_operator.{n}" for n in (
        "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lshift", "lt", "mod", "mul", "ne", "neg", "not_", "or_",
        "pos", "pow", "rshift", "sub", "truediv",
    )),
    *(f"torch.sym_{n}" for n in ("float", "int", "ite", "max", "min", "not", "sqrt", "sum", "fresh_size")),
    *(f"math.{n}" for n in ("ceil", "floor", "sqrt", "trunc")),
))  # fmt: skip
_TARGET = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?")


def check_call(target: str, arguments: list[dict[str, Any]], where: str) -> None:
    """A call as it stands in the file, its arguments as `{"name": .., "arg": {kind: value}}`.

    Raises:
        Unsafe: the operator is unknown, has effects, or may have some with these arguments.
    """
    if target in _ON_SIZES:
        return
    found = _TARGET.fullmatch(target)
    if found is None:
        raise Unsafe(f"{where} calls {target[:80]!r}, which is no operator")
    space, name, overload = found.groups()
    if space == "higher_order" and name in _OVER_GRAPHS and overload is None:
        return
    words = _words_of(space, name, overload or "default")
    if isinstance(words, str):
        raise Unsafe(f"{where} calls {target[:80]!r}, {words}")
    for argument in arguments:
        if argument["name"] not in words:
            raise Unsafe(f"{where} gives {target!r} an argument {argument['name']!r}, which it does not have")
        if ("as_string" in argument["arg"]) != (words[argument["name"]] and "as_none" not in argument["arg"]):
            raise Unsafe(f"{where} gives {target!r} a text, or none, for {argument['name']!r}")


@cache
def _words_of(space: str, name: str, overload: str) -> dict[str, bool] | str:
    """Arguments by name and whether they are words; or why the operator may not be called."""
    if space not in _NAMESPACES:
        return f"an operator of {space!r}: expected one of {', '.join(sorted(_NAMESPACES))}"
    if name.startswith("_") and name not in _PRIVATE:
        return "a private operator"
    if _LEFT_OUT.fullmatch(name):
        return "which changes more than values"
    schema = next((s for s in _schemas(space, name) if (s.overload_name or "default") == overload), None)
    if schema is None:
        return "which is not registered"
    if "..." in str(schema):
        return "which takes any number of arguments"
    words = {}
    for argument in schema.arguments:
        kind = str(argument.type)
        while wrapped := _WRAPPED.fullmatch(kind):
            kind = wrapped[1]
        if kind == "Generator":
            continue  # without it the global one is used
        words[argument.name] = kind == "str"
        if kind not in _VALUES and not (kind == "str" and argument.name in _WORDS):
            return f"which takes {argument.name!r} of type {kind}"
    if name not in _ASSERTIONS:
        if not schema.returns:
            return "which returns nothing: it is there for its effects"
        if name not in _FACTORIES and not any("Tensor" in str(a.type) for a in schema.arguments):
            return "which takes no tensor"
    return words


def _schemas(space: str, name: str) -> list[Any]:
    import torch

    return list(torch._C._jit_get_schemas_for_operator(f"{space}::{name}"))
