"""The machine that a measurement ran on, and whether it was quiet."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Machine", "QuietClock", "cores", "cpu_model"]

_LIBRARIES = ("normfuse", "torch", "onnxruntime", "onnx", "numpy", "timm", "transformers")


@dataclass(frozen=True)
class Machine:
    """What a latency depends on besides the model.

    Attributes:
        cpu: model name as the operating system states it.
        cores: physical cores that this process may use.
        system: operating system and architecture.
        python: version of Python.
        libraries: versions of the installed libraries that take part.
    """

    cpu: str
    cores: int
    system: str
    python: str
    libraries: dict[str, str]

    @classmethod
    def here(cls) -> "Machine":
        return cls(cpu_model(), len(cores()), f"{platform.system()} {platform.machine()}", platform.python_version(), _versions())


def cores() -> tuple[int, ...]:
    """One logical CPU of each physical core that this process may use, lowest first."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = siblings.read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        first.setdefault(core, cpu)
    return tuple(first.values())


class QuietClock:
    """How much CPU time other processes took since the clock was made, in seconds; 0.0 where that cannot be read."""

    def __init__(self) -> None:
        self._busy = _busy_seconds()
        self._own = time.process_time()

    def foreign(self, workers: float) -> float:
        """CPU seconds of everybody else; `workers` is what the processes that are being measured used."""
        own = time.process_time() - self._own + workers
        return max(0.0, _busy_seconds() - self._busy - own)


def _busy_seconds() -> float:
    try:
        with open("/proc/stat", encoding="ascii") as f:
            fields = [int(n) for n in f.readline().split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


def cpu_model() -> str:
    """The processor's name as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
