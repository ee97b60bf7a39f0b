"""The programs of native/tests: every kernel on this machine's instruction sets, and on those of other machines in emulation.

They are linked with the shared object as it is installed. For AVX-512 the sources are compiled again on SIMDe, which computes
its intrinsics with what is here; for NEON a cross compiler and qemu do it. native/tests/README.md says how to run them by hand.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from normfuse import native
from tests.places import ROOT

NATIVE = ROOT / "native"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = ("-std=c++17", "-pthread", "-ffp-contract=off", "-w", "-I", str(NATIVE))

pytestmark = [pytest.mark.checkout, pytest.mark.slow]


def _compile(compiler: str, *arguments: str) -> None:
    done = subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def _objects(compiler: str, folder: Path, *flags: str) -> list[str]:
    """Every kernel without ONNX Runtime's side, compiled with `flags`."""
    sources = [s for s in sorted(NATIVE.rglob("*.cpp")) if s.relative_to(NATIVE).parts[0] not in ("ort", "tensorrt", "tests")]
    made = [str(folder / f"{s.parent.name}_{s.stem}.o") for s in sources]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda pair: _compile(compiler, *flags, "-c", str(pair[0]), "-o", pair[1]), zip(sources, made, strict=True)))
    return made


def _has_simde() -> bool:
    if COMPILER is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    command = [COMPILER, "-x", "c++", "-E", "-include", "simde/x86/avx512.h", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("test_linear", ("20",), id="products"),
        pytest.param("test_norm", ("1",), id="norm and softmax"),
        pytest.param("test_conv", ("1", "10"), id="convolution"),
        pytest.param("test_attention", ("60",), id="attention"),
        pytest.param("fuzz", ("4000", "1"), id="random calls and mistakes"),
    ],
)
def test_on_this_machine(name: str, arguments: Sequence[str], tmp_path: Path) -> None:
    program = str(tmp_path / name)
    _compile(str(COMPILER), "-O1", str(NATIVE / "tests" / f"{name}.cpp"), str(native.path()), "-o", program)
    found = _run(program, *arguments)
    assert all(isa in found for isa in native.isas())


# What the emulations run takes the longest: a few shapes of the products and of attention, and calls of everything.
_EMULATED = (("test_linear", ("0",)), ("test_attention", ("3",)), ("fuzz", ("1500", "1")))


@pytest.mark.slow
@pytest.mark.skipif(not _has_simde(), reason="needs an x86-64 machine and SIMDe (Debian, Ubuntu: apt install libsimde-dev)")
def test_avx512_through_simde(tmp_path: Path) -> None:
    # Without optimization: compiling what the emulation inlines takes longer than running it.
    objects = _objects(str(COMPILER), tmp_path, "-O0", "-DNORMFUSE_SIMDE")
    for name, arguments in _EMULATED:
        _compile(str(COMPILER), "-O0", str(NATIVE / "tests" / f"{name}.cpp"), *objects, "-o", str(tmp_path / name))
        found = _run(str(tmp_path / name), *arguments)
        assert "avx512vnni" in found
        assert "avxvnni" in found


@pytest.mark.slow
@pytest.mark.skipif(not (CROSS and QEMU), reason="needs aarch64 in emulation (Debian: apt install g++-aarch64-linux-gnu qemu-user)")
def test_neon_through_qemu(tmp_path: Path) -> None:
    objects = _objects(str(CROSS), tmp_path, "-O1")
    for name, arguments in _EMULATED:
        _compile(str(CROSS), "-O1", "-static", str(NATIVE / "tests" / f"{name}.cpp"), *objects, "-o", str(tmp_path / name))
        assert "neondot" in _run(str(QEMU), str(tmp_path / name), *arguments)
