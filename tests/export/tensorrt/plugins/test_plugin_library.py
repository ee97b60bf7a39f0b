"""The plugins in C++: their launches with a driver that only writes down what it is asked, and engines built with the library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.places import ROOT

NATIVE = ROOT / "native" / "tensorrt"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
HEADERS = os.environ.get("TENSORRT_INCLUDE_DIR", "")

pytestmark = [
    pytest.mark.checkout,
    pytest.mark.skipif(not NATIVE.is_dir(), reason="no repository around the tests"),
    pytest.mark.skipif(sys.platform != "linux", reason="the library that stands for the driver is Linux's"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


COMPILE = (str(COMPILER), "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a libcuda.so.1 that writes down what it is asked."""
    folder = tmp_path_factory.mktemp("driver")
    source, library = NATIVE / "tests/fake_cuda.cpp", folder / "libcuda.so.1"
    subprocess.run([*COMPILE, "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    return folder


@pytest.fixture(scope="module")
def launch(driver_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs `native/tensorrt/tests/launch.cpp`; the lines that it and the driver print."""
    program = tmp_path_factory.mktemp("launch") / "launch"
    sources = [str(NATIVE / name) for name in ("payload.cpp", "driver.cpp", "tests/launch.cpp")]
    subprocess.run([*COMPILE, *sources, "-o", str(program), "-ldl"], check=True)

    def run(*arguments: str, driver: bool = True, **variables: object) -> list[str]:
        place = driver_folder if driver else driver_folder / "nowhere"
        found = {f"FAKE_{name.upper()}": str(value) for name, value in variables.items()}
        env = {**os.environ, "LD_LIBRARY_PATH": str(place), **found}
        done = subprocess.run([str(program), *arguments], env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run


def test_launch_has_pointers_rows_and_zeros(launch: Callable[..., list[str]]) -> None:
    """The image is loaded once for both kernels; no rows launch nothing; an odd address and too many rows are refused."""
    assert launch() == [
        "load PTX80",
        "function norm of 0x99",
        "launch 0xaa grid 12 1 1 block 128 1 1 shared 0 stream 0x55 extra 0: ffff00001000 2000 3000 7 0 0",
        "problem: the plugin norm: its tensor 2 is at no multiple of 16 bytes",
        "problem: the plugin norm: 2147483648 rows in 3221225472 programs; a launch has less than 2^31",
    ]


@pytest.mark.parametrize(
    ("capability", "image"),
    [
        pytest.param(86, "PTX80", id="an older one that runs on newer GPUs"),
        pytest.param(89, "PTX89", id="its own"),
        pytest.param(90, "PTX90a", id="one for this architecture alone"),
        pytest.param(120, "PTX89", id="not one for another architecture"),
    ],
)
def test_image_fits_the_device(launch: Callable[..., list[str]], capability: int, image: str) -> None:
    lines = launch(capability=capability)
    assert lines[0] == f"load {image}"
    assert ("attribute 8 of 0xaa = 100000" in lines) == (capability == 90)


def test_missing_context_becomes_that_of_the_first_device(launch: Callable[..., list[str]]) -> None:
    assert launch(context=0)[:2] == ["retain 0", "set current 0x78"]


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        pytest.param({"capability": 75}, (), "carries PTX for sm_80, sm_89, sm_90a; the device is sm_75", id="old device"),
        pytest.param({"fails": "cuInit"}, (), "cuInit of the GPU's driver failed: CUDA_ERROR_ILLEGAL_ADDRESS", id="no GPU"),
        pytest.param({"fails": "cuModuleLoadData"}, (), r"cuModuleLoadData(PTX of norm, sm_80)", id="PTX"),
        pytest.param({"fails": "cuLaunchKernel"}, (), "cuLaunchKernel(norm) of the GPU's driver failed", id="launch"),
        pytest.param({}, ("ptx",), "carries no ptx", id="missing field"),
        pytest.param({}, ("images",), "3 images and 1 numbers", id="short images"),
        pytest.param({}, ("inputs", "fp16,f8"), "unknown element type f8", id="type"),
        pytest.param({}, ("inputs", "i8,i8,i8,i8,i8"), "has 6 parameters for 6 tensors and the rows", id="too few parameters"),
        pytest.param({}, ("outputs", "i8,i8"), "2 outputs and the features of 1", id="features"),
    ],
)
def test_what_is_wrong_is_said(
    launch: Callable[..., list[str]], variables: dict[str, object], arguments: tuple[str, ...], message: str
) -> None:
    last = launch(*arguments, **variables)[-1]
    assert last.startswith("problem: ")
    assert message in last


def test_machine_without_a_driver_is_told(launch: Callable[..., list[str]]) -> None:
    if any(Path(folder, "libcuda.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")):
        pytest.skip("there is a driver")
    assert launch(driver=False)[-1].startswith("problem: the GPU's driver is not there: libcuda.so.1")


# -- the plugins in Python, with the real bindings of TensorRT and of the driver ------------------------------------------

PYTHON = """
import sys, numpy as np, tensorrt_rtx as trt
from normfuse.export.tensorrt.plugins import register
from normfuse.export.tensorrt.plugins.payload import Code, Payload
codes = Code(80, False, 128, 0, 6, b"PTX80"), Code(90, True, 256, 100_000, 6, b"PTX90a")
payload = Payload("norm", codes, 2, 3, ("fp16", "fp32"), ("i8",), (64,))
register(trt)
register(trt)
creator = trt.get_plugin_registry().get_creator("RmsNorm", "1", "normfuse")
text, int32 = trt.PluginFieldType.CHAR, trt.PluginFieldType.INT32
data = {k: np.frombuffer(v.encode(), np.int8) if isinstance(v, str) else np.array(v, np.int32) for k, v in payload.fields().items()}
given = [trt.PluginField(k, v, text if v.dtype == np.int8 else int32) for k, v in data.items()]
plugin = creator.create_plugin("a", trt.PluginFieldCollection(given), trt.TensorRTPhase.RUNTIME)
again = creator.create_plugin("b", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
assert again.payload == plugin.payload == payload
attached = again.attach_to_context(None)
desc = trt.PluginTensorDesc()
desc.dims = trt.Dims([7, 1, 64])
attached.enqueue([desc, desc], [desc], [0xFFFF00001000, 0x2000], [0x3000], 0, 0x55)
"""


@pytest.mark.parametrize(
    ("capability", "lines"),
    [
        pytest.param(
            86,
            [
                "load PTX80",
                "function norm of 0x99",
                "launch 0xaa grid 12 1 1 block 128 1 1 shared 0 stream 0x55 extra 0: ffff00001000 2000 3000 7 0 0",
            ],
            id="portable",
        ),
        pytest.param(
            90,
            [
                "load PTX90a",
                "function norm of 0x99",
                "attribute 8 of 0xaa = 100000",
                "launch 0xaa grid 12 1 1 block 256 1 1 shared 100000 stream 0x55 extra 0: ffff00001000 2000 3000 7 0 0",
            ],
            id="exact",
        ),
    ],
)
def test_python_plugin_asks_the_driver_for_the_same(driver_folder: Path, capability: int, lines: list[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has the classes of plugins")
    pytest.importorskip("cuda.bindings", reason="launches kernels")
    env = {**os.environ, "LD_LIBRARY_PATH": str(driver_folder), "FAKE_CAPABILITY": str(capability)}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", PYTHON], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == lines


# -- with TensorRT's headers ---------------------------------------------------------------------------------------------


def _cmake(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("cmake") is None:
        pytest.skip("no CMake")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TENSORRT_")}
    return subprocess.run(["cmake", "-S", str(NATIVE), "-B", str(folder), *options], env=env, capture_output=True, text=True)


def test_build_without_headers_says_where_they_are(tmp_path: Path) -> None:
    done = _cmake(tmp_path, f"-DTENSORRT_INCLUDE_DIR={tmp_path}")
    assert done.returncode != 0
    assert "NvInferRuntime.h was not found" in done.stderr
    assert "-DTENSORRT_INCLUDE_DIR" in done.stderr


CHILD = """
import importlib, json, sys
library, file, plan_file, name = sys.argv[1:]
trt = importlib.import_module(name)
registry = trt.get_plugin_registry()
registry.load_library(library)
ours = sorted(c.name for c in registry.all_creators if c.plugin_namespace == "normfuse")
from normfuse.export.tensorrt.plugins import plugin
plugin.register(trt)
logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(file), [parser.get_error(i).desc() for i in range(parser.num_errors)]
plan = builder.build_serialized_network(network, builder.create_builder_config())
open(plan_file, "wb").write(plan)
print(json.dumps({"creators": ours, "in_python": len(plugin._alive)}))
"""


@pytest.mark.skipif(not HEADERS, reason="TENSORRT_INCLUDE_DIR is not set: TensorRT's headers are in no package")
def test_library_builds_and_takes_the_place_of_the_python_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt_rtx", "triton", "onnx_ir", "onnx"):
        pytest.importorskip(module, reason="builds an engine")
    import onnx_ir as ir
    from onnx import TensorProto, helper

    from normfuse.export.tensorrt.flavour import environment
    from normfuse.export.tensorrt.plugins.placing import place
    from normfuse.export.tensorrt.plugins.plugin import OPS

    done = _cmake(tmp_path / "build", f"-DTENSORRT_INCLUDE_DIR={HEADERS}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], check=True, capture_output=True)
    (library,) = (tmp_path / "build").glob("*.so")

    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "cache"))
    nodes = [
        helper.make_node("QuantizeRows", ["x"], ["q", "scale"], domain="normfuse", name="/a/QuantizeRows", bits=8),
        helper.make_node("RmsNorm", ["x"], ["y"], domain="normfuse", name="/b/RmsNorm", eps=1e-6),
    ]
    values = [
        helper.make_tensor_value_info(name, code, [3, width])
        for name, code, width in (
            ("x", TensorProto.FLOAT16, 64),
            ("y", TensorProto.FLOAT16, 64),
            ("q", TensorProto.INT8, 64),
            ("scale", TensorProto.FLOAT, 1),
        )
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("normfuse", 1)]
    model = ir.from_proto(
        helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=opsets, ir_version=11)
    )
    place(model, ["rms_norm", "shiftquant_linear"], dtype="fp16", capabilities=(80, 90))
    ir.save(model, tmp_path / "m.onnx")
    with environment("tensorrt_rtx") as env:
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        command = [sys.executable, "-c", CHILD, str(library), str(tmp_path / "m.onnx"), str(tmp_path / "plan"), "tensorrt_rtx"]
        child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) == {"creators": sorted(OPS), "in_python": 0}
    plan = (tmp_path / "plan").read_bytes()
    for node in model.graph:
        for image in filter(None, node.attributes["ptx"].as_string().split("\0")):
            assert image.encode() in plan
