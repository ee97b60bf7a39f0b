"""A model repository in the server itself.

The server comes out of the wheel of nvidia-pytriton, which holds it without its onnxruntime backend. A few lines of Python stand in
for that backend under its name, so that the server reads the configuration as it is: it warms up, puts requests together, adds a
version and takes it back. What the real backend does with the file is not tested here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfuse.export.server import write_repository
from tests.export.server.server_models import model, onnx

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

_STARTS_IN_S = 60.0

BACKEND = """
import os, sys
sys.path[:0] = {path!r}
import numpy as np
import onnxruntime
import triton_python_backend_utils as server

class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(os.path.join(args["model_repository"], args["model_version"], "model.onnx"))

    def execute(self, requests):
        inputs = [{{t.name(): np.from_dlpack(t) for t in r.inputs()}} for r in requests]
        rows = [len(next(iter(feeds.values()))) for feeds in inputs]
        print("RAN", sum(rows), "items of", len(rows), "requests", flush=True)
        feeds = {{name: np.concatenate([f[name] for f in inputs]) for name in inputs[0]}}
        results = [np.split(y, np.cumsum(rows)[:-1]) for y in self.session.run(None, feeds)]
        names = [o.name for o in self.session.get_outputs()]
        return [
            server.InferenceResponse([server.Tensor.from_dlpack(n, np.ascontiguousarray(y[i])) for n, y in zip(names, results)])
            for i in range(len(requests))
        ]
"""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(f"{self.url}/{path}", None if body is None else json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")

    def infer(self, name: str, x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], str]:
        """The first output, and the version that gave it."""
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
        answer = self.ask(f"v2/models/{name}/infer", {"inputs": [tensor]})
        out = answer["outputs"][0]
        return np.array(out["data"], np.float32).reshape(out["shape"]), answer["model_version"]

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that the server does by itself."""
        end = time.monotonic() + _STARTS_IN_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if true():
                    return
            except (urllib.error.URLError, ConnectionError):
                pass  # not up yet, or a model is being loaded
            time.sleep(0.1)
        raise AssertionError(f"nothing happened in {_STARTS_IN_S:.0f} s\n{self.log.read_text()}")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], Server]]:
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        pytest.skip("nvidia-pytriton, whose wheel holds the server, is not installed (pip install --no-deps nvidia-pytriton)")
    home = Path(found.submodule_search_locations[0], "tritonserver")
    stub = home / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"the wheel of nvidia-pytriton has nothing for Python {sys.version_info[0]}.{sys.version_info[1]}")
    backends = tmp_path / "backends"
    shutil.copytree(home / "backends" / "python", backends / "python")
    shutil.copy(stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_text(BACKEND.format(path=[p for p in sys.path if p]))
    running: list[subprocess.Popen[bytes]] = []

    def start(repository: Path) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        libraries = f"{sysconfig.get_config_var('LIBDIR')}{os.pathsep}{home.parent.parent / 'nvidia_pytriton.libs'}"
        log = tmp_path / "log.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [home / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}",
                 f"--http-port={port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false",
                 "--model-control-mode=explicit", "--load-model=*", "--exit-timeout-secs=1"],
                stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "LD_LIBRARY_PATH": libraries},
            )  # fmt: skip
        running.append(process)
        return Server(f"http://127.0.0.1:{port}", log, process)

    yield start
    for process in running:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _times(file: Path, factor: float) -> Path:
    weight = onnx.numpy_helper.from_array(np.full(3, factor, np.float32), "w")
    return model(
        file,
        {"x": ("float32", ["batch", 3])},
        {"y": ("z", "float32", ["batch", 3])},
        nodes=[onnx.helper.make_node("Mul", ["x", "w"], ["z"])],
        initializers=[weight],
    )


def test_a_repository_is_served_extended_and_taken_back(tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    repository = tmp_path / "models"
    write_repository(repository, "m", _times(tmp_path / "two.onnx", 2), max_batch=16, preferred_batches=(4,), queue_delay_us=1000)
    server = serve(repository)
    server.until(lambda: server.ask("v2/models/m/ready") == {})
    described = server.ask("v2/models/m")
    assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert described["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    # the warm-up: one item, then as many as the server takes, which it puts together itself
    assert [line for line in server.log.read_text().splitlines() if line.startswith("RAN")] == [
        "RAN 1 items of 1 requests",
        "RAN 16 items of 16 requests",
    ]
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    y, version = server.infer("m", x)
    assert (y.tolist(), version) == ((2 * x).tolist(), "1")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.infer("m", np.zeros((17, 3), np.float32))

    # a version appears when the server is told to look, and goes when the configuration names another one, or its folder goes
    added = write_repository(repository, "m", _times(tmp_path / "three.onnx", 3), max_batch=16, version="next")
    assert server.infer("m", x)[1] == "1"
    server.ask("v2/repository/models/m/load", {})
    assert (server.infer("m", x)[0].tolist(), server.infer("m", x)[1]) == ((3 * x).tolist(), "2")
    config = added.path / "config.pbtxt"
    config.write_text(f"{config.read_text()}version_policy {{ specific {{ versions: [1] }} }}\n")
    server.ask("v2/repository/models/m/load", {})
    assert (server.infer("m", x)[0].tolist(), server.infer("m", x)[1]) == ((2 * x).tolist(), "1")
    write_repository(repository, "m", tmp_path / "three.onnx", max_batch=16, version=2, force=True)
    server.ask("v2/repository/models/m/load", {})
    assert server.infer("m", x)[1] == "2"
    shutil.rmtree(added.path / "2")
    server.ask("v2/repository/models/m/load", {})
    assert server.infer("m", x)[1] == "1"


def test_models_without_a_batch_axis_are_served(tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    repository = tmp_path / "models"
    fixed = model(tmp_path / "f.onnx", {"x": ("float32", [2, 3])}, {"y": ("x", "float32", [2, 3])})
    numbers = model(tmp_path / "n.onnx", {"x": ("float32", ["batch"])}, {"y": ("x", "float32", ["batch"])})
    write_repository(repository, "fixed", fixed)
    write_repository(repository, "numbers", numbers, max_batch=4)
    server = serve(repository)
    for name in ("fixed", "numbers"):
        server.until(lambda name=name: server.ask(f"v2/models/{name}/ready") == {})
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert server.infer("fixed", x)[0].tolist() == x.tolist()
    # one number an item is [batch, 1] for clients and [batch] for the file
    assert server.infer("numbers", x[:, :1])[0].tolist() == x[:, :1].tolist()
