"""What `to_openvino` tells."""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.export.openvino.graph import Ran
from normfuse.export.result import Exported

__all__ = ["OpenVinoExported"]


@dataclass(frozen=True)
class OpenVinoExported(Exported):
    """One file of OpenVINO: as `Exported`, with `opset` of the ONNX model in between, and operators and norms of OpenVINO.

    Attributes:
        ran: what OpenVINO makes of it on the CPU of this machine; None when it was not run.
    """

    ran: Ran | None = None

    @property
    def how_to_run(self) -> str:
        """Python that runs the file in OpenVINO, on zeros."""
        lines = [
            "import numpy as np",
            "import openvino",
            "",
            "# without the hint OpenVINO rounds to bfloat16 where a CPU can: 1 % apart",
            "model = openvino.Core().compile_model(",
            f"    {str(self.path)!r}, 'CPU', {{'INFERENCE_PRECISION_HINT': 'f32'}}",
            ")",
            "outputs = model({",
            *self._zeros(),
        ]
        return "\n".join([*lines, "})", ""])

    def _head(self) -> list[str]:
        lines = [f"{self.path}: {self.target}, {self.bytes / 1e6:.1f} MB with its weights, {sum(self.ops.values())} operators"]
        if self.ran is not None and self.ran.products[0]:
            every, integers = self.ran.products
            lines.append(f"  products   {every}, {integers} of them in integers on this CPU")
        return lines
