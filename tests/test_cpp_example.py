"""examples/cpp: a C++ program that runs our files. Built where CMake, a compiler and ONNX Runtime's headers are at hand.

ONNXRUNTIME_INCLUDE_DIR=/folder/with/onnxruntime_cxx_api.h pytest -m "" tests/test_cpp_example.py; the library is the wheel's.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import normfuse
from normfuse import native
from normfuse.export import to_onnx
from tests.places import ROOT
from tests.zoo import ZOO

ort = pytest.importorskip("onnxruntime")
HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "/usr/include/onnxruntime")
LIBRARY = next(Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*"), None)

pytestmark = [
    pytest.mark.checkout,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"),
    pytest.mark.skipif(not Path(HEADERS, "onnxruntime_cxx_api.h").exists(), reason="ONNXRUNTIME_INCLUDE_DIR names no headers"),
    pytest.mark.skipif(LIBRARY is None, reason="this build of onnxruntime carries no libonnxruntime.so"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # what the archives of ONNX Runtime have, and its wheel has not
        (folder / name).symlink_to(str(LIBRARY))
    found = (f"-DONNXRUNTIME_INCLUDE_DIR={HEADERS}", f"-DONNXRUNTIME_LIBRARY={folder / 'libonnxruntime.so'}")
    for command in (("-S", str(ROOT / "examples" / "cpp"), "-B", str(folder), *found), ("--build", str(folder))):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run_onnx"


def _quantized(folder: Path) -> tuple[Path, np.ndarray]:
    entry = ZOO["preln_vit"]
    spec = normfuse.ShiftQuant(weight_bits=8, activation_bits=8, prefer="size")
    small = normfuse.optimize(entry.build(), entry.args, quantize=spec, calibration=[entry.args])
    written = to_onnx(small, folder / "small.onnx", form="native")
    session = ort.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    feed = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
    return written.path, session.run(None, feed)[0]


def _run(program: Path, *arguments: object) -> np.ndarray:
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return np.array(done.stdout.split(), np.float32)


def test_a_native_file_gives_in_cpp_what_it_gives_in_python(program: Path, tmp_path: Path) -> None:
    path, expected = _quantized(tmp_path)
    np.testing.assert_allclose(_run(program, path), expected.ravel(), atol=1e-6)
    if native.available():
        np.testing.assert_allclose(_run(program, path, native.path()), expected.ravel(), atol=1e-5)


def test_what_cannot_be_read_is_one_line(program: Path, tmp_path: Path) -> None:
    done = subprocess.run([str(program), str(tmp_path / "nothing.onnx")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
