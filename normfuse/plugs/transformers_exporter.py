"""The backend "normfuse" of `transformers.exporters`: a Hugging Face model, optimized and proven, as ONNX.

    import normfuse.plugs.transformers_exporter  # registers it
    exported = NormfuseExporter().export(model, inputs, NormfuseConfig(dynamic=True))
    exported(**inputs)                           # in ONNX Runtime; what the model returns
    exported.save_pretrained("folder")           # read back by ExportedModel.from_pretrained("folder")

transformers captures the model, normfuse does everything after that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfuse import native
from normfuse.api import optimize
from normfuse.errors import MissingExtra, UsageError, did_you_mean
from normfuse.export import ExportOptions, to_onnx
from normfuse.export.options import DtypeName, Form
from normfuse.export.targets import TargetName
from normfuse.extras import need
from normfuse.passes import PassName
from normfuse.quant.scheme import Scheme
from normfuse.quant.words import Widths
from normfuse.reports.record import report
from normfuse.reports.report import Report

__all__ = ["NormfuseConfig", "NormfuseExporter", "NormfuseRunner", "reports"]

_hub = need("transformers", extra="hf")
try:
    _auto = need("transformers.exporters.auto", extra="hf")
    _Config: Any = need("transformers.exporters.configs", extra="hf").DynamoConfig
    _Exporter: Any = need("transformers.exporters.exporter_dynamo", extra="hf").DynamoExporter
    _Onnx: Any = need("transformers.exporters.exporter_onnx", extra="hf").OnnxExporter
    _Runner: Any = need("transformers.exporters.runners.runner_onnx", extra="hf").OnnxModelRunner
    _register = _auto.register_backend
except (ImportError, AttributeError, MissingExtra) as e:
    raise MissingExtra(
        f"transformers {_hub.__version__} takes no exporters of others (tested with 5.23): pip install --upgrade transformers"
    ) from e

FORMAT = "normfuse"
_KEPT = 64  # reports
_reports: list[Report] = []


def reports() -> tuple[Report, ...]:
    """What was done to each graph that this process exported with the backend, the newest last; at most 64."""
    return tuple(_reports)


@dataclass
class NormfuseConfig(_Config):  # type: ignore[misc]  # transformers is known when it runs
    """How a model is exported: what `transformers.exporters.DynamoConfig` has, and this.

    Attributes:
        passes, quantize, calibration: as in `normfuse.optimize`; batches are dictionaries of the forward's inputs.
        allow_random_calibration: take static scales from the sample inputs.
        target: "onnxruntime" or "portable".
        opset, runtime, dtype, form: as in `normfuse.export.to_onnx`.
    """

    export_format: str = FORMAT
    passes: Sequence[PassName] | None = None
    quantize: Scheme | Widths | None = None
    calibration: Any = None
    allow_random_calibration: bool = False
    target: TargetName = "onnxruntime"
    opset: int | None = None
    runtime: str | None = None
    dtype: DtypeName | None = None
    form: Form = "auto"

    def __post_init__(self) -> None:
        if self.quantizer is not None:
            raise UsageError("quantizer= is for the other backends of transformers: pass quantize=, e.g. quantize='w8a8'")
        if self.target not in _TARGETS:
            hint = did_you_mean(self.target, _TARGETS)
            raise UsageError(f"target={self.target!r}: this backend runs in ONNX Runtime; expected {' or '.join(_TARGETS)}{hint}")
        self.as_file()

    def as_file(self) -> ExportOptions:
        """The options of the file."""
        return ExportOptions(
            target=self.target, opset=self.opset, runtime=self.runtime, dtype=self.dtype, form=self.form, progress=False
        )

    def to_json_string(self) -> str:
        """Without what it was calibrated on."""
        kept, self.calibration = self.calibration, None
        try:
            return str(super().to_json_string())
        finally:
            self.calibration = kept


_TARGETS = ("onnxruntime", "portable")


class NormfuseExporter(_Exporter):  # type: ignore[misc]
    """Exports a `PreTrainedModel` to an `onnx_ir.Model` that was optimized, proven, run and compared."""

    export_format = FORMAT
    config_class = NormfuseConfig
    program_suffix = ".onnx"
    required_packages: Sequence[str] = ("torch", "onnx", "onnxscript", "onnxruntime")
    tested_versions: Mapping[str, str] = {}
    save_program = _Onnx.save_program
    load_program = _Onnx.load_program
    program_files = _Onnx.program_files

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
        """One graph.

        Raises:
            UsageError: the inputs hold a cache.
            NormfuseError: it cannot be optimized, or the file is not the same function.
        """
        cached = next((name for name, value in sample_inputs.items() if isinstance(value, _hub.Cache)), None)
        if cached is not None:
            raise UsageError(
                f"{cached} is a cache, which this backend does not take: a language model with its cache becomes a folder by "
                "normfuse.export.to_decoder, or normfuse export hf:DIR -o FOLDER --with-past"
            )
        program, metadata = super().export_program(model, sample_inputs, config)
        fast = optimize(
            program, passes=config.passes, quantize=config.quantize, calibration=config.calibration,
            allow_random_calibration=config.allow_random_calibration,
        )  # fmt: skip
        _reports[:] = [*_reports[1 - _KEPT :], report(fast)]
        ir = need("onnx_ir", extra="onnx")
        with tempfile.TemporaryDirectory(prefix="normfuse-exporter-") as folder:
            to_onnx(fast, Path(folder, "model.onnx"), config.as_file())
            made = ir.load(str(Path(folder, "model.onnx")))
            ir.external_data.load_to_model(made)
        metadata.out_constants = _constants(program)
        return made, metadata


def _constants(program: Any) -> list[list[Any]]:
    """Place and value of the outputs that are no tensors, which a file does not hold."""
    outputs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    return [[place, arg.value] for place, arg in enumerate(outputs) if hasattr(arg, "value")]


class NormfuseRunner(_Runner):  # type: ignore[misc]
    """Runs the file in ONNX Runtime, with normfuse's kernels where it has operators of them."""

    @classmethod
    def from_program(
        cls, program: Any, metadata: Any, device: Any = None, providers: Any = None, session_options: Any = None
    ) -> Any:
        """See `transformers.exporters.runners.runner_onnx.OnnxModelRunner.from_program`."""
        options = session_options or need("onnxruntime", extra="onnx").SessionOptions()
        if native.available() and any(node.domain == FORMAT for graph in program.graphs() for node in graph):
            options.register_custom_ops_library(str(native.path()))
        return super().from_program(program, metadata, device, providers, options)


_register(NormfuseExporter, NormfuseRunner)
