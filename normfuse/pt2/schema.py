"""`models/model.json`: every object that may stand in it, field by field. `program` rebuilds a file from these parts alone."""

import re
from typing import Any

from normfuse.ir.ranges import parsed_ranges
from normfuse.pt2.expressions import SYMBOL, guard, size
from normfuse.pt2.operators import check_call
from normfuse.pt2.parts import (
    Check,
    Maybe,
    boolean,
    each,
    identifier,
    integer,
    integer_in,
    mapping,
    matching,
    number,
    one_of,
    path,
    plain,
    printed,
    record,
    word,
)
from normfuse.pt2.problems import Broken
from normfuse.pt2.trees import inputs, outputs

__all__ = ["DEVICE", "SCALAR_TYPE", "program"]

DEVICE = record(type=matching("cpu|cuda|meta|mps|xpu", "cpu, cuda, meta, mps or xpu"), index=Maybe(integer_in(-1, 1023)))
SCALAR_TYPE = integer_in(0, 63)
_LAYOUT = integer_in(0, 7)

_hint = one_of(as_int=integer, as_bool=boolean, as_float=number)
_expression = record(expr_str=size, hint=Maybe(_hint))
_size = one_of(as_expr=_expression, as_int=integer)
_flag = one_of(as_expr=_expression, as_bool=boolean)
_real = one_of(as_expr=_expression, as_float=number)
_tensor_meta = record(
    dtype=SCALAR_TYPE, sizes=each(_size), requires_grad=boolean, device=DEVICE, strides=each(_size), storage_offset=_size,
    layout=_LAYOUT,
)  # fmt: skip
_tensor = record(name=identifier)
_tensor_or_none = one_of(as_tensor=_tensor, as_none=boolean)


def _named(**literal: Check) -> Check:
    return one_of(as_name=identifier, **literal)


def _argument(text: Check) -> Check:
    return one_of(
        as_none=boolean, as_tensor=_tensor, as_tensors=each(_tensor), as_int=integer, as_ints=each(integer), as_float=number,
        as_floats=each(number), as_string=text, as_sym_int=_named(as_int=integer), as_sym_ints=each(_named(as_int=integer)),
        as_scalar_type=SCALAR_TYPE, as_memory_format=integer_in(0, 4), as_layout=_LAYOUT, as_device=DEVICE, as_bool=boolean,
        as_bools=each(boolean), as_sym_bool=_named(as_bool=boolean), as_sym_bools=each(_named(as_bool=boolean)),
        as_graph=record(name=identifier, graph=_graph), as_optional_tensors=each(_tensor_or_none),
        as_sym_float=_named(as_float=number), as_sym_floats=each(_named(as_float=number)), as_optional_tensor=_tensor_or_none,
        as_complex=record(real=number, imag=number), as_nested_tensors=each(each(_tensor)), as_int_lists=each(each(integer)),
        as_float_lists=each(each(number)),
    )  # fmt: skip


def _graph(value: Any, where: str) -> Any:
    return _GRAPH(value, where)


def _or_nothing(check: Check) -> Check:
    """Graphs over values have no names for their arguments."""
    return lambda value, where: value if value == "" else check(value, where)


_value = _argument(plain)
_operand = record(name=_or_nothing(identifier), arg=_argument(printed), kind=Maybe(integer_in(0, 2)))
_NODE = record(
    target=printed, inputs=each(_operand), outputs=each(_value), metadata=mapping(word, lambda value, where: value),
    is_hop_single_tensor_return=Maybe(boolean), name=Maybe(identifier),
)  # fmt: skip
#: Where a node comes from, for reports; what else PyTorch keeps there makes it look up names.
_PROVENANCE = ("stack_trace", "nn_module_stack", "torch_fn")


def _node(value: Any, where: str) -> dict[str, Any]:
    made: dict[str, Any] = _NODE(value, where)
    check_call(made["target"], made["inputs"], where)
    kept = {k: v for k, v in made["metadata"].items() if k in _PROVENANCE and isinstance(v, str)}
    noted = parsed_ranges(str(made["metadata"].get("custom", "")))
    made["metadata"] = {k: re.sub(r"[^\n -~\w]", " ", v) for k, v in kept.items()} | ({} if noted is None else {"custom": noted})
    return made


_GRAPH = record(
    inputs=each(_value), outputs=each(_value), nodes=each(_node), tensor_values=mapping(identifier, _tensor_meta),
    sym_int_values=mapping(identifier, _size), sym_bool_values=mapping(identifier, _flag),
    is_single_tensor_return=Maybe(boolean), custom_obj_values=Maybe(record()),
    sym_float_values=Maybe(mapping(identifier, _real)),
)  # fmt: skip
_constant = one_of(as_none=boolean, as_int=integer, as_float=number, as_string=plain, as_bool=boolean)
_input = one_of(
    user_input=record(arg=_value),
    parameter=record(arg=_tensor, parameter_name=path),
    buffer=record(arg=_tensor, buffer_name=path, persistent=boolean),
    tensor_constant=record(arg=_tensor, tensor_constant_name=path),
    constant_input=record(name=identifier, value=_constant),
)
_output = one_of(
    user_output=record(arg=_value),
    loss_output=record(arg=_tensor),
    buffer_mutation=record(arg=_tensor, buffer_name=path),
    parameter_mutation=record(arg=_tensor, parameter_name=path),
    user_input_mutation=record(arg=_tensor, user_input_name=identifier),
)
_call = record(
    inputs=each(_value), outputs=each(_value), in_spec=inputs, out_spec=outputs, forward_arg_names=Maybe(each(identifier)),
)  # fmt: skip
_range = record(min_val=Maybe(integer), max_val=Maybe(integer))
_PROGRAM = record(
    graph_module=record(
        graph=_graph,
        signature=record(input_specs=each(_input), output_specs=each(_output)),
        module_call_graph=each(record(fqn=path, signature=Maybe(_call))),
        metadata=Maybe(mapping(word, lambda value, where: value)),
        treespec_namedtuple_fields=Maybe(record()),
    ),
    opset_version=mapping(word, integer),
    range_constraints=mapping(matching(SYMBOL, "the name of a size"), _range),
    schema_version=record(major=integer, minor=integer),
    verifiers=Maybe(each(matching("ATEN|TRAINING|EDGE", "ATEN or TRAINING"))),
    torch_version=Maybe(plain),
    guards_code=Maybe(each(guard)),
)


def program(value: Any, where: str) -> dict[str, Any]:
    """A saved program rebuilt from what is allowed.

    Raises:
        Unsafe: something in it may have effects, or is not known.
        Broken: something is missing or of the wrong kind.
    """
    try:
        made: dict[str, Any] = _PROGRAM(value, where)
    except RecursionError as e:
        raise Broken(f"{where} is nested too deeply") from e
    if made["graph_module"].get("metadata"):
        made["graph_module"]["metadata"] = {}  # notes for people who debug PyTorch
    return made
