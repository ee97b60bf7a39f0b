"""Engines in a model repository: their manifests, profiles and GPUs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from normfuse.errors import UsageError
from normfuse.export.server import write_repository
from normfuse.export.tensorrt.engine import Engine
from normfuse.export.tensorrt.engine import Tensor as EngineTensor
from tests.export.server.server_models import config, engine, tree, type_name

pytest.importorskip("onnxruntime")


def test_an_engine_is_served_within_its_profile(tmp_path: Path) -> None:
    served = write_repository(tmp_path / "r", "m", engine(tmp_path / "m.engine", plugins={"RmsNorm": 3}))
    assert tree(served.path) == ["1/model.plan", "1/model.plan.json", "config.pbtxt"]
    found = config(served)
    assert (found.backend, found.max_batch_size, list(found.input[0].dims)) == ("tensorrt", 32, [3, 4])
    assert (type_name(found.input[0]), type_name(found.output[0])) == ("TYPE_FP16", "TYPE_FP32")
    assert {(w.batch_size, tuple(w.inputs["x"].dims)) for w in found.model_warmup} == {(1, (3, 4)), (32, (3, 4))}
    assert any("RmsNorm" in n and "LD_PRELOAD" in n for n in served.notes)
    assert any("TensorRT 10.16.0" in n for n in served.notes)
    with pytest.raises(UsageError, match="built for at most 32; build it with larger --shapes"):
        write_repository(tmp_path / "s", "m", tmp_path / "m.engine", max_batch=33)


def test_what_the_builder_writes_is_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.engine"
    file.write_bytes(b"plan")
    built = Engine(
        path=file, module="tensorrt", version="11.4", capabilities=("8.9",), dtype="fp16", bytes=4,
        sha256="of another file", weight_bytes=None, activation_bytes=None,
        inputs=(EngineTensor("x", "int64", (-1, -1)),), outputs=(EngineTensor("y", "bfloat16", (-1, 8)),),
        profiles={"x": {"min": [1, 1], "opt": [4, 16], "max": [8, 64]}}, layers=(),
    )  # fmt: skip
    (tmp_path / "m.engine.json").write_text(built.to_json())
    with pytest.raises(UsageError, match="belongs to another engine"):
        write_repository(tmp_path / "r", "m", file)
    text = json.loads(built.to_json()) | {"sha256": hashlib.sha256(b"plan").hexdigest()}
    (tmp_path / "m.engine.json").write_text(json.dumps(text))
    served = write_repository(tmp_path / "r", "m", file)
    found = config(served)
    assert (list(found.input[0].dims), found.max_batch_size) == ([-1], 8)
    assert (type_name(found.input[0]), type_name(found.output[0])) == ("TYPE_INT64", "TYPE_BF16")
    assert {tuple(w.inputs["x"].dims) for w in found.model_warmup} == {(16,)}
    assert any("outside the sizes" in n for n in served.notes)
    with pytest.raises(UsageError, match=r"from \[1, 1\] to \[8, 64\]"):
        write_repository(tmp_path / "s", "m", file, warmup_shapes={"x": (1, 65)})


def test_an_engine_that_takes_no_single_item(tmp_path: Path) -> None:
    profile = {"min": [2, 3, 4], "opt": [4, 3, 4], "max": [8, 3, 4]}
    served = write_repository(tmp_path / "r", "m", engine(tmp_path / "m.engine", profiles={"x": profile}))
    found = config(served)
    assert (found.max_batch_size, list(found.input[0].dims)) == (0, [-1, 3, 4])
    assert list(found.model_warmup[0].inputs["x"].dims) == [4, 3, 4]
    assert any("no batch below 2" in n for n in served.notes)


def test_engines_for_several_gpus(tmp_path: Path) -> None:
    main, other = engine(tmp_path / "a.engine"), engine(tmp_path / "b.engine")
    served = write_repository(tmp_path / "r", "m", main, by_capability={"8.9": other})
    found = config(served)
    assert dict(found.cc_model_filenames) == {"8.9": "model_8_9.plan"}
    assert (served.path / "1/model_8_9.plan").read_bytes() == other.read_bytes()
    assert (served.path / "1/model.plan").read_bytes() == main.read_bytes()
    small = {"min": [1, 3, 4], "opt": [1, 3, 4], "max": [4, 3, 4]}
    served = write_repository(tmp_path / "s", "m", main, by_capability={"8.9": engine(other, profiles={"x": small})})
    assert config(served).max_batch_size == 4
    different = engine(other, outputs=[{"name": "y", "dtype": "float32", "shape": [-1, 6]}])
    with pytest.raises(UsageError, match=r"expected .* like the other engine"):
        write_repository(tmp_path / "t", "m", main, by_capability={"8.9": different})
    with pytest.raises(UsageError, match="'sm_89' is no compute capability"):
        write_repository(tmp_path / "t", "m", main, by_capability={"sm_89": other})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"module": "tensorrt_rtx"}, "TensorRT for RTX, and the server loads engines of TensorRT only", id="rtx"),
        pytest.param({"sha256": "0"}, "belongs to another engine", id="hash"),
        pytest.param({"inputs": ...}, "'inputs' is missing or empty", id="no-inputs"),
        pytest.param({"outputs": {}}, "'outputs' is missing or empty", id="outputs-no-list"),
        pytest.param({"inputs": [{"name": "x"}]}, "expected an object with name, dtype and shape", id="half-an-input"),
        pytest.param({"inputs": [{"name": "x", "dtype": "float32", "shape": ["n"]}]}, "with name, dtype and shape", id="words"),
        pytest.param({"inputs": [{"name": "x", "dtype": "fp4", "shape": [1]}]}, "elements of type fp4", id="dtype"),
        pytest.param({"profiles": {}}, "the profile of input 'x' is null", id="no-profile"),
        pytest.param({"profiles": {"x": {"min": [1], "opt": [1], "max": [1]}}}, "with 3 sizes each", id="profile-rank"),
        pytest.param({"profiles": [1]}, "the profile of input 'x'", id="profiles-no-object"),
        pytest.param({"plugins": 3}, "'plugins' is a int", id="plugins"),
        pytest.param({"outputs": [{"name": "y", "dtype": "float32", "shape": []}]}, "is a scalar", id="scalar"),
    ],
)
def test_a_manifest_that_does_not_say_what_it_must(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        write_repository(tmp_path / "r", "m", engine(tmp_path / "m.engine", **changes))
    assert not (tmp_path / "r").exists()


def test_a_manifest_that_is_missing_or_no_json(tmp_path: Path) -> None:
    file = engine(tmp_path / "m.engine")
    manifest = tmp_path / "m.engine.json"
    for text, match in (("{", "cannot be read"), ("[]", "found a JSON list"), ("\udc80", "cannot be read")):
        manifest.write_text(text, errors="surrogateescape")
        with pytest.raises(UsageError, match=match):
            write_repository(tmp_path / "r", "m", file)
    manifest.unlink()
    with pytest.raises(UsageError, match=r"has no manifest: expected .*m\.engine\.json"):
        write_repository(tmp_path / "r", "m", file)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"device": "cpu"}, "an engine of TensorRT runs on a GPU", id="cpu"),
        pytest.param({"threads": 2}, "threads is for ONNX files", id="threads"),
        pytest.param({"accelerator": "tensorrt"}, "accelerator is for ONNX files", id="accelerator"),
        pytest.param({"kernels": True}, "kernels is for ONNX files", id="kernels"),
        pytest.param({"by_capability": {"8.9": "gone.engine"}}, r"there is no file gone\.engine", id="missing-engine"),
    ],
)
def test_wrong_arguments_for_an_engine(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        write_repository(tmp_path / "r", "m", engine(tmp_path / "m.engine"), **options)
