"""PTX of a kernel for any NVIDIA GPU, made on a machine that need not have one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normfuse.cache import cache_folder
from normfuse.errors import NormfuseError, UsageError
from normfuse.gpu.launch import Launch
from normfuse.gpu.source import OPTIONS, arguments, function, interpreted, source_hash, suited, toolchain

__all__ = ["CAPABILITIES", "Image", "compiled", "content_hash"]

#: Compute capabilities that images are made for, times ten. One for 80 or 89 also runs on everything newer, compiled again by the
#: driver; Triton writes those from 90 on for that architecture alone (sm_90a).
CAPABILITIES = (80, 86, 89, 90, 100, 120)

# The oldest versions of PTX that know the architectures: drivers of CUDA 12.0 take 8.0, and those of 12.8, the first ones for
# Blackwell, take 8.7. Left alone, Triton writes the newest version of all, which a driver one release older refuses.
_PTX = {80: 80, 86: 80, 89: 80, 90: 80, 100: 87, 120: 87}
_FORM = 1  # of a file in the cache

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()  # Triton's settings are those of the process


@dataclass(frozen=True)
class Image:
    """A kernel as a driver loads it. Addresses that it is called with must be multiples of 16.

    Attributes:
        ptx: text, without a NUL at its end.
        entry: name of the function.
        threads: of one program.
        shared: bytes of dynamic shared memory of one program; above 48 KiB the attribute
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of the function must be raised first.
        capability: a value of `CAPABILITIES`.
        arch: ".target" of the PTX, such as "sm_80" or "sm_90a".
        parameters: of the entry; those behind inputs, outputs and rows are addresses of scratch memory that is not used: pass 0.
    """

    ptx: str
    entry: str
    threads: int
    shared: int
    capability: int
    arch: str
    parameters: int


def compiled(launch: Launch, capability: int) -> Image:
    """The kernel of `launch` for one compute capability, from the cache or compiled (0.1 to 1 s).

    Raises:
        MissingExtra: triton is not installed.
        UsageError: the capability is not one of `CAPABILITIES`, or the process runs kernels in Triton's interpreter.
        NormfuseError: the compiler failed, or the kernel needs memory that nobody gives it.
    """
    if capability not in CAPABILITIES:
        raise UsageError(f"compute capability {capability}: expected one of {', '.join(map(str, CAPABILITIES))}")
    key = content_hash(launch, capability)
    path = cache_folder() / "ptx" / key[:2] / f"{key}.json"
    found = _read(path)
    if found is None:
        found = _compile(launch, capability)
        _write(path, found)
    return found


def content_hash(launch: Launch, capability: int) -> str:
    """SHA-256 of all that the image depends on: kernels, the launch, the compiler, the capability."""
    launch = suited(launch, capability)
    facts = asdict(launch) | {"constants": sorted(launch.constants.items()), "capability": capability, "form": _FORM}
    facts |= {"kernels": source_hash(), "triton": toolchain().__version__, "ptx": _PTX[capability]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _compile(launch: Launch, capability: int) -> Image:
    if interpreted():
        raise UsageError(
            "TRITON_INTERPRET is set: kernels run in Triton's interpreter and cannot be compiled; unset it and start again"
        )
    launch = suited(launch, capability)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = function(launch)
    names = list(kernel.arg_names)
    given = arguments(launch, names)
    types = {i.name: f"*{i.dtype}" for i in launch.inputs} | {o.name: f"*{o.dtype}" for o in launch.outputs} | {"rows": "i32"}
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={n: launch.constants[n] for n in names if n in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "i32") != "i32"},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "ptx_version": _PTX[capability], **OPTIONS}
    with _one_at_a_time, _plain():
        try:
            made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        except Exception as e:  # whatever a compiler may raise
            raise NormfuseError(
                f"{launch.kernel} does not compile for compute capability {capability} with the constants "
                f"{dict(launch.constants)}: {type(e).__name__}: {str(e).strip()[-600:]}"
            ) from e
    return _image(launch, capability, made, len(given))


def _image(launch: Launch, capability: int, made: Any, given: int) -> Image:
    ptx, meta = str(made.asm["ptx"]), made.metadata
    scratch = {k: getattr(meta, k, 0) or 0 for k in ("global_scratch_size", "profile_scratch_size")}
    if any(scratch.values()):
        raise NormfuseError(f"{launch.kernel} needs scratch memory ({scratch}), which a plugin cannot give")
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if head is None or target is None:
        raise NormfuseError(f"{launch.kernel}: the PTX for compute capability {capability} has no entry or no target")
    if re.search(r"^\s*trap;", ptx, re.MULTILINE):  # Triton says nothing when a kernel does not fit, and writes this
        raise NormfuseError(f"{launch.kernel} does not fit compute capability {capability}: its PTX only traps; use smaller tiles")
    parameters = head[2].count(".param")
    if parameters < given:
        raise NormfuseError(f"{launch.kernel}: the entry has {parameters} parameters; expected at least {given}")
    threads = int(meta.num_warps) * 32
    return Image(ptx, head[1], threads, int(meta.shared), capability, target[1], parameters)


@contextmanager
def _plain() -> Iterator[None]:
    """Triton's settings for one compilation: no paths of this machine in the PTX, and no second cache beside ours."""
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="normfuse-triton-") as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True
        yield


def _read(path: Path) -> Image | None:
    """What `_write` left, or None where it is missing or damaged."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        image = Image(**entry["image"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as e:
        _log.info("%s is not readable and is made again: %s", path, e)
        return None
    if entry.get("sha256") != _digest(image):
        _log.info("%s is damaged and is made again", path)
        return None
    return image


def _write(path: Path, image: Image) -> None:
    """Whole or not at all; a cache that cannot be written costs time and nothing else."""
    text = json.dumps({"image": asdict(image), "sha256": _digest(image)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".json", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as e:
        _log.warning("compiled kernels are not kept: %s", e)


def _digest(image: Image) -> str:
    return hashlib.sha256(json.dumps(asdict(image), sort_keys=True).encode()).hexdigest()
