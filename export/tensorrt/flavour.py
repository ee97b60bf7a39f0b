"""Which TensorRT builds: TensorRT for RTX, which needs no GPU to build, or TensorRT 10 and 11, which do.

Both have one Python interface; what differs is asked for by name where it is used (`hasattr`), not by version.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from normfuse.errors import ExportError, MissingExtra, UsageError

__all__ = ["FLAVOURS", "Flavour", "environment", "find", "load"]

#: Modules by preference: the first builds on any machine.
Flavour = Literal["tensorrt_rtx", "tensorrt"]
FLAVOURS: tuple[str, ...] = get_args(Flavour)


def find(flavour: str | None = None) -> str:
    """Name of the module to build with; nothing is imported, because its native code may fail where there is no driver.

    Raises:
        UsageError: there is no such flavour.
        MissingExtra: it is not installed; the message holds the pip line.
    """
    if flavour is not None and flavour not in FLAVOURS:
        raise UsageError(f"unknown flavour {flavour!r}: expected {' or '.join(FLAVOURS)}")
    for name in FLAVOURS if flavour is None else (flavour,):
        if importlib.util.find_spec(name) is not None:
            return name
    if flavour == "tensorrt":
        raise MissingExtra("tensorrt is not installed; install it on a machine with an NVIDIA GPU with: pip install tensorrt")
    raise MissingExtra("TensorRT is not installed; install it with: pip install 'normfuse[tensorrt]'")


def load(name: str) -> Any:
    """The module called `name`. Only for a process that may die.

    Raises:
        ExportError: it is there and does not load.
    """
    try:
        return importlib.import_module(name)
    except Exception as e:  # whatever the wheel's own loader raises where a library is missing
        raise ExportError(f"{name} is installed but does not load: {' '.join(str(e).split())[:300]}") from e


@contextmanager
def environment(name: str) -> Iterator[dict[str, str]]:
    """Environment of a process that loads the module called `name`.

    The parser of TensorRT for RTX opens its library by a name without a version when it meets a plugin, and its wheel has none of
    that name: the process would abort. A folder of our own holds the name; nothing is written where the wheel stands.
    """
    found = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="normfuse-trt-") as folder:
        if name == "tensorrt_rtx":
            for library in _libraries():
                Path(folder, library.name.partition(".so")[0] + ".so").symlink_to(library)
            found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (folder, found.get("LD_LIBRARY_PATH"))))
        yield found


def _libraries() -> list[Path]:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    places = [] if spec is None or spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return [lib for place in places for lib in sorted(Path(place).glob("libtensorrt_rtx.so.*"))[:1]]
