"""What is done to the graph of an ONNX file, in place, and what is asked of it before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normfuse.errors import UsageError
from normfuse.export.onnx.conversion.opset import silent
from normfuse.export.ops import DOMAIN
from normfuse.export.options import ExportOptions
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["check_possible", "simplified"]


def simplified(model: ir.Model) -> None:
    """Constants computed, BatchNorms in the weights before them, what does nothing gone: the identities of onnxscript.

    Functions are written out, but for those of normfuse's domain: kernels stand for them.
    """
    optimizer = need("onnxscript.optimizer", extra="onnx")
    with silent():
        optimizer.optimize_ir(model, inline=all(f.domain != DOMAIN for f in model.functions.values()))


def check_possible(model: ir.Model, options: ExportOptions, path: object) -> None:
    """Raises UsageError where the target does not have an operator of the file, or the file is no wider than the asked dtype."""
    where = options.where
    strange = sorted(_domains(model) - set(where.domains))
    if strange and not where.runs_here and where.runtime != "OpenVINO":  # its frontend reads some, and says which not
        raise UsageError(
            f"{path} has operators of {', '.join(strange)}, which the target {where.name} does not have: start from the file "
            "before it was optimized for its runtime"
        )
    ir = need("onnx_ir", extra="onnx")
    found = {v.dtype for v in model.graph.initializers.values()}
    narrow = next((d for d in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) if d in found and ir.DataType.FLOAT not in found), None)
    if options.computes_in == "fp64" or (options.computes_in == "fp32" and narrow is not None):
        raise UsageError(
            f"--dtype {options.computes_in}: a file cannot be made more exact than it is, and {path} is in "
            f"{'float32' if narrow is None else narrow.name.lower()}; start from the model that it was made of"
        )


def _domains(model: ir.Model) -> set[str]:
    """Domains of its operators, but for ONNX's own and those whose meaning stands in the file."""
    meant = {f.domain for f in model.functions.values()}
    found = {node.domain for graph in model.graphs() for node in graph}
    return found - meant - {"", "ai.onnx"}
