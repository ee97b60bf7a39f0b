"""Builds the kernels of native/ into normfuse/_native.so, which pyproject.toml cannot say; everything else stands there.

The object is loaded through ctypes and by ONNX Runtime, never imported, so it needs no Python header and serves every version of
Python: the wheel is tagged py3-none-PLATFORM. Where it cannot be built the install goes on without it (`normfuse.native.why_not`).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "native"
COMMIT = "_commit.txt"  # read by normfuse/commit.py
APART = ("tensorrt", "tests")  # rooms that are not in the object: a library of its own, and programs
# The arithmetic must be that of the source: a product and a sum are fused where it says so, nowhere else.
COMPILE = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


def kernels(*suffixes: str) -> list[str]:
    """Files of the object, from the root of the repository."""
    found = (p for p in NATIVE.rglob("*") if p.suffix in suffixes and p.relative_to(NATIVE).parts[0] not in APART)
    return sorted(str(p.relative_to(ROOT)) for p in found)


def compiler() -> list[str]:
    """$CXX; else the compiler Python was built with, if it is here; else the usual names."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for command in (sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise CompileError("no C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install; or set CXX)")


def run(*command: str) -> None:
    """Run a command; what it says to standard error is shown."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise CompileError(f"{command[0]}: {e.strerror}") from e
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")


class Build(build_ext):
    """Builds the shared object; without a compiler the package is installed without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        super().run()
        if not Path(self.get_ext_fullpath("normfuse._native")).exists():
            self.warn("normfuse is installed without its native kernels; `normfuse.native.why_not()` says what to do")

    def build_extension(self, ext: Any) -> None:
        if os.name == "nt":
            raise CompileError("the native kernels are written for GCC and Clang; on Windows the portable forms are used")
        cxx = compiler()
        # cibuildwheel and Apple's Python name the architecture this way
        arch = shlex.split(os.environ.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        flags = [*COMPILE, "-I", str(NATIVE), *arch, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        made = [str(objects / Path(source).with_suffix(".o")) for source in ext.sources]

        def compiled(source: str, target: str) -> None:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            run(*cxx, *flags, "-c", str(ROOT / source), "-o", target)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compiled, ext.sources, made))
        # A runtime that unloads the object while a thread of its pool is still inside would crash: it stays.
        link = ["-Wl,-z,nodelete", "-Wl,-z,defs"] if platform.system() == "Linux" else []
        run(*cxx, "-shared", "-pthread", *arch, *made, *link, *shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(out))


def commit() -> str:
    """The commit of this checkout, with + behind it where files differ; empty outside of one."""
    if not (ROOT / ".git").exists():
        return ""
    asked = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_commit(package: Path) -> None:
    """Into the copy of the package that is built; one from a source distribution has it already."""
    found = commit()
    if found:
        (package / COMMIT).unlink(missing_ok=True)  # a source distribution may hold a link
        (package / COMMIT).write_text(found + "\n", encoding="utf-8")


class Package(build_py):
    """The modules, and the commit that they are of."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib, "normfuse"))


class Sources(sdist):
    """The sources, and the commit that they are of."""

    def make_release_tree(self, base_dir: str, files: Any) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir, "normfuse"))


class Wheel(bdist_wheel):
    """A wheel for any Python 3 on this platform: the shared object does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "normfuse._native",
            sources=kernels(".cpp"),
            depends=kernels(".h", ".inc"),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build, "build_py": Package, "sdist": Sources, "bdist_wheel": Wheel},
)
