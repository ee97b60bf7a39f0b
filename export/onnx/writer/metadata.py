"""What a file says of its origin, in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import normfuse
from normfuse.export.onnx.program import Program
from normfuse.export.onnx.writer.save import sha256_of_tensors, weights_sha256
from normfuse.export.targets import Target
from normfuse.extras import need
from normfuse.reports.record import record

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["append_metadata", "origin"]


def origin(gm: nn.Module, found: Program, model: ir.Model, target: Target, opset: int) -> dict[str, str]:
    """Versions, hashes of weights and example inputs, and what `normfuse.optimize` did and found."""
    facts = {
        "version": normfuse.__version__,
        "torch": torch.__version__.split("+")[0],
        "target": target.name,
        "opset": str(opset),
        "inputs_sha256": sha256_of_tensors(t for t in found.flat_inputs() if isinstance(t, torch.Tensor)),
        "weights_sha256": weights_sha256(model),
    }
    made = record(gm)
    if made is not None:
        report = made.report
        facts["passes"] = json.dumps([[p.name, len(p.applied)] for p in report.passes])  # a pass may run twice
        if report.quantization:
            facts["calibration"] = "none" if report.calibration is None else str(report.calibration)
            if report.sqnr is not None:
                facts["sqnr"] = f"{report.sqnr:.1f} dB"
        if report.exact is not None:
            facts["exact"] = f"{report.exact.max_rel:.3e}"
        if report.drift is not None and not report.quantization:  # integers against the same integers say nothing
            facts["drift"] = f"{report.drift.max_rel:.3e}"
    return facts


def append_metadata(file: Path, facts: Mapping[str, str]) -> None:
    """Add `metadata_props` to a written model, each named `normfuse.<key>`, and normfuse as its producer.

    Protobuf merges messages that stand one behind the other, and of names the last one counts, so that the verified bytes stay as
    they are and are not read again.
    """
    onnx = need("onnx", extra="onnx")
    extra = onnx.ModelProto(producer_name="normfuse", producer_version=normfuse.__version__)
    for key, value in facts.items():
        extra.metadata_props.add(key=f"normfuse.{key}", value=value)
    with file.open("ab") as f:
        f.write(extra.SerializeToString())
