"""One plugin class for all of normfuse's ops in TensorRT: it launches the PTX that its node carries.

    y[0..] = kernel(x[0..], rows)        rows = all axes of the first input but the last

`IPluginV3One`, because that is the one form that TensorRT 10, 11 and TensorRT for RTX share, and which needs no GPU to build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from normfuse.errors import ExportError, NormfuseError
from normfuse.export.tensorrt.plugins.kernel import Kernel
from normfuse.export.tensorrt.plugins.payload import NUMBERS, TEXTS, TYPES, Payload
from normfuse.extras import need

__all__ = ["NAMESPACE", "OPS", "VERSION", "register"]

NAMESPACE, VERSION = "normfuse", "1"
#: Op types that have plugins.
OPS = ("CrmsNorm", "L1Norm", "QuantizeRows", "RmsNorm", "RmsNormLinear", "ShiftQuantMatMul", "TwoPassSoftmax")


def register(trt: Any) -> None:
    """Make normfuse's plugins known to TensorRT; again: nothing.

    Needed before an ONNX file with such nodes is parsed, and before an engine is loaded. Where the C++ library has been loaded
    with `load_library`, its plugins stay.

    Args:
        trt: `tensorrt` (10 or 11) or `tensorrt_rtx`.
    """
    registry = trt.get_plugin_registry()
    missing = [name for name in OPS if registry.get_creator(name, VERSION, NAMESPACE) is None]
    for creator in _creators(trt, missing):
        if not registry.register_creator(creator, NAMESPACE):
            raise ExportError(f"{trt.__name__} {trt.__version__} refuses the plugin {creator.name}")
        _alive.append(creator)


_alive: list[Any] = []  # TensorRT keeps addresses only


def _creators(trt: Any, names: Iterable[str]) -> list[Any]:
    """The classes are made here, since their bases are those of the TensorRT at hand."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    types = {name: getattr(trt, attribute) for name, attribute in TYPES.items()}
    char, int32 = trt.PluginFieldType.CHAR, trt.PluginFieldType.INT32

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, name: str, payload: Payload) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = name, NAMESPACE, VERSION
            self.num_outputs, self.timing_cache_id = len(payload.outputs), ""
            self.payload = payload
            self.kernel: Kernel | None = None
            self.kept: list[Any] = []

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.plugin_name, self.payload)

        def get_output_data_types(self, input_types: Any) -> list[Any]:
            return [types[name] for name in self.payload.outputs]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            shapes = []
            for features in self.payload.features:
                shape = trt.DimsExprs(inputs[0])
                shape[len(shape) - 1] = builder.constant(features)
                shapes.append(shape)
            return shapes

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            wanted = (*self.payload.inputs, *self.payload.outputs)[pos]
            desc = in_out[pos].desc
            return bool(desc.format == trt.TensorFormat.LINEAR and desc.type == types[wanted])

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """The last call before `enqueue`, and no graph is being captured: a builder that times copies, which no context has
            attached, loads the kernel here. One without a GPU comes here too, and never further.
            """
            with contextlib.suppress(NormfuseError):
                self.loaded()

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return 0

        def attach_to_context(self, context: Any) -> Any:
            attached = self.clone()
            attached.loaded()
            return attached

        def loaded(self) -> Kernel:
            """The kernel on the current device, from the first time that this copy is prepared there.

            Raises:
                ExportError: the device has no image of it, or the driver refuses it.
                MissingExtra: there are no bindings of the driver.
            """
            if self.kernel is None:
                self.kernel = Kernel(self.payload, need("cuda.bindings.driver", extra="tensorrt"))
            return self.kernel

        def get_fields_to_serialize(self) -> Any:
            fields = self.payload.fields()
            texts = [(name, np.frombuffer(str(fields[name]).encode(), np.int8).copy(), char) for name in TEXTS]
            numbers = [(name, np.array(fields[name], np.int32), int32) for name in NUMBERS]
            self.kept = [array for _, array, _ in (*texts, *numbers)]  # TensorRT reads them after this call
            return trt.PluginFieldCollection([trt.PluginField(*field) for field in (*texts, *numbers)])

        def enqueue(self, in_descs: Any, out_descs: Any, inputs: Any, outputs: Any, workspace: int, stream: int) -> None:
            rows = 1
            for size in tuple(in_descs[0].dims)[:-1]:
                rows *= size
            self.loaded().launch((*inputs, *outputs), rows, stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, NAMESPACE, VERSION
            empty = np.array([], np.int32)
            texts = [trt.PluginField(field, b"", char) for field in TEXTS]
            numbers = [trt.PluginField(field, empty, int32) for field in NUMBERS]
            self.field_names = trt.PluginFieldCollection([*texts, *numbers])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return Plugin(self.name, Payload.read({f.name: _data(f) for f in fields if f.name in (*TEXTS, *NUMBERS)}))

    return [Creator(name) for name in names]


def _data(field: Any) -> bytes | list[int]:
    """Bytes of a text, which the binding gives as int8; numbers of the other fields."""
    if isinstance(field.data, bytes):
        return field.data
    array = np.asarray(field.data)
    return array.tobytes() if field.name in TEXTS else [int(n) for n in array]
