"""A file in another opset."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from normfuse.errors import ExportError
from normfuse.export.onnx.writer.opset17 import to_opset_17
from normfuse.export.ops import DOMAIN
from normfuse.export.options import ExportOptions
from normfuse.export.runtimes import format_of, newest_opset, parse_runtime
from normfuse.export.targets import MIN_OPSET
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["in_opset", "silent"]

# Operators that took another meaning under the same signature: the scale of GroupNormalization by group, then by channel; the
# divisor of a pool at a rounded-up border; where a resized pixel is read.
_OTHER_MEANING = ("AveragePool", "GroupNormalization", "Resize", "RoiAlign")


def in_opset(model: ir.Model, options: ExportOptions) -> None:
    """The opset that is asked for, or the newest that the asked runtime reads; the version of the format goes with it.

    An operator whose signature is the same in both stays as it is. Where one is not, ONNX's converters know the way up.

    Raises:
        ExportError: an operator of the file has no form in the opset.
    """
    now = model.opset_imports.get("", 0)
    readable = now if options.runtime is None else newest_opset(parse_runtime(options.runtime))
    wanted = options.opset or min(now, readable)
    if wanted != now:
        _moved(model, now, wanted)
    if wanted != now or options.runtime is not None:
        model.ir_version = min(model.ir_version, format_of(max(wanted, MIN_OPSET))) if wanted <= now else format_of(wanted)


def _moved(model: ir.Model, now: int, wanted: int) -> None:
    strange = _changed(model, now, wanted)
    if not strange:
        _relabelled(model, wanted)
    elif wanted == MIN_OPSET < now and not _changed(model, now, MIN_OPSET + 1):
        _relabelled(model, MIN_OPSET + 1)
        to_opset_17(model)
    elif wanted < now or any(f.domain == DOMAIN for f in model.functions.values()):
        named = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        raise ExportError(
            f"the file is in opset {now}, and opset {wanted} has no {named} like that; export it again from the model "
            "that it was made of"
        )
    else:
        _converted(model, wanted)


def _changed(model: ir.Model, now: int, wanted: int) -> list[str]:
    """Operators of the file that are others in the two opsets."""
    return sorted({node.op_type for node in _nodes(model) if not _alike(node.op_type, now, wanted)})


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    graphs = [*model.graphs(), *(f.graph for f in model.functions.values())]
    return (node for graph in graphs for node in graph if node.domain in ("", "ai.onnx"))


def _alike(op: str, one: int, other: int) -> bool:
    """The operator takes and gives the same in both opsets, but for types that it has learnt."""
    defs = need("onnx", extra="onnx").defs
    try:
        first, second = defs.get_schema(op, one, ""), defs.get_schema(op, other, "")
    except defs.SchemaError:  # one of them does not have it
        return False
    if first.since_version == second.since_version:
        return True
    return op not in _OTHER_MEANING and _signature(first) == _signature(second)


def _signature(schema: Any) -> Any:
    attributes = {name: (a.type, a.required, str(a.default_value)) for name, a in schema.attributes.items()}
    return attributes, *([(p.name, p.option) for p in side] for side in (schema.inputs, schema.outputs))


def _relabelled(model: ir.Model, opset: int) -> None:
    model.opset_imports[""] = opset
    for function in model.functions.values():
        if "" in function.opset_imports:
            function.opset_imports[""] = opset


def _converted(model: ir.Model, opset: int) -> None:
    converter = need("onnxscript.version_converter", extra="onnx")
    try:
        with silent():
            converter.convert_version(model, opset, fallback=True)
    except Exception as e:  # of onnxscript and of ONNX, of many kinds
        raise ExportError(f"the file cannot be written in opset {opset}: {' '.join(str(e).split())[:300]}") from e
    if model.opset_imports.get("") != opset:
        raise ExportError(f"ONNX's converters have no way to opset {opset} for all operators of the file; leave the opset as it is")


@contextmanager
def silent() -> Iterator[None]:
    """Without the log of the libraries: what fails is an error of ours."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
