"""An NVIDIA GPU, and the time that it says it took."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from normfuse.errors import NormfuseError, UsageError

__all__ = ["DeviceCall", "Gpu", "as_graph", "find_gpu"]

_WARM_UP = 3  # calls before a graph is captured: lazy set-up and autotuning must not end up in it


@dataclass(frozen=True)
class Gpu:
    """What a latency on a GPU depends on besides the model.

    Attributes:
        name: as the driver states it.
        capability: compute capability, such as "9.0".
        memory: bytes.
        driver: its version; "unknown" where `nvidia-smi` is missing.
        cuda: version that torch was built with.
    """

    name: str
    capability: str
    memory: int
    driver: str
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability.replace('.', '')}), driver {self.driver}, CUDA {self.cuda}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_gpu() -> Gpu:
    """The GPU that torch uses by default.

    Raises:
        UsageError: there is none; the message says what was looked for.
    """
    import torch

    if torch.version.cuda is None:
        raise UsageError(f"no NVIDIA GPU to run on: torch {torch.__version__} is built without CUDA; install a build with it")
    try:
        ready = torch.cuda.is_available() and torch.cuda.device_count() > 0
    except RuntimeError as e:  # a driver that does not answer
        raise UsageError(f"no NVIDIA GPU to run on: {' '.join(str(e).split())[:300]}") from e
    if not ready:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES={hidden!r}"
        raise UsageError(f"no NVIDIA GPU to run on: torch {torch.__version__} for CUDA {torch.version.cuda} finds no device{seen}")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(found.name, f"{found.major}.{found.minor}", found.total_memory, _driver(), torch.version.cuda)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = asked.stdout.split()
    return lines[0] if asked.returncode == 0 and lines else "unknown"


class DeviceCall:
    """Work for the GPU. Called, it is done when the call returns; `seconds` gives the time that the device took.

    It runs on a stream of its own: TensorRT waits for the device after each run on the default one.

    Args:
        launch: starts the work once, on the stream that is current.
    """

    def __init__(self, launch: Callable[[], Any]) -> None:
        import torch

        self._launch = launch
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            self._launch()
        self._stream.synchronize()

    def seconds(self) -> float:
        """Run once; seconds between two events on the stream around it."""
        import torch

        with torch.cuda.stream(self._stream):
            self._start.record()
            self._launch()
            self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


def as_graph(name: str, call: Callable[[], Any]) -> Callable[[], None]:
    """`call` captured as a CUDA graph; what comes back replays it on the stream that is current.

    Args:
        name: of what is captured, for the message.
        call: reads and writes the same memory each time.

    Raises:
        NormfuseError: it cannot be captured, for example because it waits for a result of the device.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()  # the graph writes into these tensors each time it is replayed
    except RuntimeError as e:
        raise NormfuseError(
            f"{name} cannot be captured as a CUDA graph ({' '.join(str(e).split())[:300]}); measure it without: --no-graph"
        ) from e

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay
