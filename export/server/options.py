"""How a file is to be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

from normfuse.errors import UsageError, did_you_mean

__all__ = ["BACKENDS", "DEVICES", "ServeKeywords", "ServeOptions"]

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["auto", "cpu", "gpu"]
Precision = Literal["fp32", "fp16"]
BACKENDS: tuple[str, ...] = get_args(Backend)
DEVICES: tuple[str, ...] = get_args(Device)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The keyword arguments of `write_repository`, which says what each means.

    Raises:
        UsageError: one of them is wrong by itself, or two of them do not go together.
    """

    backend: Backend | None = None
    by_capability: Mapping[str, str | Path] | None = None
    max_batch: int | None = None
    preferred_batches: Sequence[int] = ()
    queue_delay_us: int = 0
    instances: int = 1
    device: Device = "auto"
    threads: int | None = None
    accelerator: Literal["tensorrt"] | None = None
    precision: Precision = "fp32"
    warmup: bool = True
    warmup_shapes: Mapping[str, Sequence[int]] | None = None
    kernels: bool = False
    server_folder: str = "/models"
    version: int | Literal["next"] = 1
    force: bool = False

    def __post_init__(self) -> None:
        if self.backend not in (None, *BACKENDS):
            raise UsageError(
                f"unknown backend {self.backend!r}, expected {' or '.join(BACKENDS)}{did_you_mean(self.backend, BACKENDS)}"
            )
        if self.device not in DEVICES:
            raise UsageError(f"device is {self.device!r}, expected auto, cpu or gpu")
        if self.instances < 1:
            raise UsageError(f"instances is {self.instances}, expected 1 or more")
        if self.queue_delay_us < 0:
            raise UsageError(f"queue_delay_us is {self.queue_delay_us}, expected 0 or more")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}, expected 1 or more")
        if self.accelerator not in (None, "tensorrt"):
            raise UsageError(f"accelerator is {self.accelerator!r}, expected None or 'tensorrt'")
        if self.precision not in ("fp32", "fp16"):
            raise UsageError(f"precision is {self.precision!r}, expected fp32 or fp16")
        if self.precision != "fp32" and self.accelerator is None:
            raise UsageError("precision is for accelerator='tensorrt'; other runtimes use the types that stand in the file")

    def check(self, backend: str) -> None:
        """Raises UsageError where one of them and the backend do not go together."""
        if backend == "tensorrt":
            if self.device == "cpu":
                raise UsageError("device is 'cpu', and an engine of TensorRT runs on a GPU; give the server the ONNX file")
            for name in ("threads", "accelerator", "kernels"):
                if getattr(self, name):
                    raise UsageError(f"{name} is for ONNX files, and the artifact is an engine")
        elif self.accelerator is not None and self.device == "cpu":
            raise UsageError("device is 'cpu', and the accelerator tensorrt runs on a GPU")
        if self.kernels and self.device != "cpu":
            raise UsageError(f"kernels run on the CPU, and device is {self.device!r}; expected device='cpu'")


class ServeKeywords(TypedDict, total=False):
    """The fields of `ServeOptions`."""

    backend: Backend | None
    by_capability: Mapping[str, str | Path] | None
    max_batch: int | None
    preferred_batches: Sequence[int]
    queue_delay_us: int
    instances: int
    device: Device
    threads: int | None
    accelerator: Literal["tensorrt"] | None
    precision: Precision
    warmup: bool
    warmup_shapes: Mapping[str, Sequence[int]] | None
    kernels: bool
    server_folder: str
    version: int | Literal["next"]
    force: bool
