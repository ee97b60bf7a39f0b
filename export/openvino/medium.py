"""Files of OpenVINO, made of the ONNX model that is finished for it.

OpenVINO's own frontend for ONNX reads it: that is one translation for all quantized forms and dtypes, and its graphs were as
fast as those of `openvino.convert_model` of the exported program, or faster (docs/architecture.md).
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfuse.errors import ExportError
from normfuse.export.onnx.medium import OnnxFile
from normfuse.export.onnx.writer.save import save_model
from normfuse.export.openvino.graph import Ran, as_run, layer_counts, norm_counts, with_facts
from normfuse.export.openvino.runtime import opened, read, said
from normfuse.export.options import ExportOptions
from normfuse.export.session import Session
from normfuse.extras import need
from normfuse.files import spelled

__all__ = ["OpenVinoFile"]


class OpenVinoFile(OnnxFile):
    """An .xml file, and a .bin file of the same name beside it.

    Attributes:
        ran: what OpenVINO makes of the last file that was run; None before that.
    """

    libraries = ("onnx", "onnxscript", "openvino")
    extra = "openvino"

    def __init__(self) -> None:
        self.ran: Ran | None = None

    def save(self, model: Any, path: Path, *, limit: int) -> None:
        ov = need("openvino", extra="openvino")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            plain = Path(folder, "model.onnx")
            save_model(model, plain, limit=limit)
            made = read(plain)
            try:
                ov.save_model(made, spelled(path), compress_to_fp16=False)
            except Exception as e:
                raise ExportError(f"OpenVINO cannot write {path.name}: {said(e)}") from e
            finally:
                del made  # it maps the file, which Windows does not remove meanwhile
                gc.collect()

    def check(self, path: Path) -> None:
        read(path)

    def sessions(self, path: Path, options: ExportOptions, layers: str | None, *, as_written: bool = False) -> Sequence[Session]:
        session = opened(path, threads=options.threads)
        self.ran = as_run(session.ready)
        return (session,)

    def tell(self, path: Path, facts: Mapping[str, str]) -> None:
        # "runtime" is the oldest ONNX Runtime
        told = {key: value for key, value in facts.items() if key != "runtime"}
        path.write_text(with_facts(path.read_text(encoding="utf-8"), told), encoding="utf-8")

    def counts(self, path: Path) -> tuple[dict[str, int], dict[str, int]]:
        """The normalizations are those that OpenVINO runs: in the file an RMSNorm is spelt out."""
        ops = layer_counts(path)
        return ops, self.ran.norms if self.ran is not None else norm_counts(path)
