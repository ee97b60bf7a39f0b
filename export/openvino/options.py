"""Options of `to_openvino` as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from normfuse.export.options import Common, DtypeName, ExportOptions, IoDtype, ModuleKeywords

if TYPE_CHECKING:
    import torch

__all__ = ["OpenVinoKeywords", "OpenVinoOptions"]

_INLINE = 2**20  # the ONNX file in between keeps its weights beside it: its message need not hold them


@dataclass(frozen=True, kw_only=True)
class OpenVinoOptions(Common):
    """How a module becomes a file of OpenVINO: the keyword arguments of `normfuse.export.to_openvino`, which says what each means.

    Raises:
        UsageError: one of them is wrong by itself, or two of them do not go together.
    """

    threads: int | None = None

    def __post_init__(self) -> None:
        self._check(("fp32", "fp16", "bf16"))
        self.as_file()

    def as_file(self) -> ExportOptions:
        """Of the ONNX model that the file is made of."""
        return ExportOptions(
            target="openvino", dtype=self.dtype, io_dtype=self.io_dtype, opset=self.opset, attention=self.attention, form=self.form,
            verify=self.verify, tolerance=self.tolerance, force=self.force, progress=self.progress, threads=self.threads,
            external_data_above=_INLINE,
        )  # fmt: skip


class OpenVinoKeywords(ModuleKeywords, total=False):
    """The fields of `OpenVinoOptions`."""

    dtype: DtypeName | torch.dtype | None
    io_dtype: IoDtype
    threads: int | None
    force: bool
    progress: bool
