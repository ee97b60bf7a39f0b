"""Model repositories of NVIDIA Triton Inference Server: read by the server's own schema, compared with the file in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse import native
from normfuse.errors import NormfuseError, UsageError
from normfuse.export import to_onnx
from normfuse.export.onnx.runtime import session
from normfuse.export.server import write_repository
from normfuse.export.server.signature import DTYPES
from normfuse.export.server.text import Symbol, message
from tests.export.quantized_models import linear
from tests.export.server.server_models import config, image, model, onnx, parsed, tree, type_name

ort = pytest.importorskip("onnxruntime")

BATCH = {0: "batch"}


def test_the_configuration_says_what_the_file_says(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(self.embed(ids)) * mask.unsqueeze(-1)
            return x, x.amax((1, 2))

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    inputs = (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool))
    exported = to_onnx(Encoder().eval(), tmp_path / "e.onnx", example_inputs=inputs, dynamic_shapes=(sizes, sizes))
    served = write_repository(tmp_path / "models", "encoder", exported.path, max_batch=8)
    assert tree(tmp_path / "models") == ["encoder/1/model.onnx", "encoder/config.pbtxt"]
    assert set(served.files) == {served.path / "1/model.onnx", served.path / "config.pbtxt"}
    found = config(served)
    assert (found.name, found.backend, found.max_batch_size) == ("encoder", "onnxruntime", 8)
    assert found.HasField("dynamic_batching")
    assert [(g.kind == g.KIND_AUTO, g.count) for g in found.instance_group] == [(True, 1)]

    runs = session(served.path / "1/model.onnx", threads=1)
    names = {"tensor(int64)": "TYPE_INT64", "tensor(bool)": "TYPE_BOOL", "tensor(float)": "TYPE_FP32"}
    for stated, real in ((found.input, runs.get_inputs()), (found.output, runs.get_outputs())):
        assert [t.name for t in stated] == [t.name for t in real]
        assert [type_name(t) for t in stated] == [names[t.type] for t in real]
        for a, b in zip(stated, real, strict=True):
            sizes_without_batch = [-1 if not isinstance(size, int) else size for size in b.shape[1:]]
            assert list(a.reshape.shape if a.HasField("reshape") else a.dims) == sizes_without_batch
    # one number an item: the server has no empty dims
    assert list(found.output[1].dims) == [1]
    assert found.output[1].HasField("reshape")

    assert [w.batch_size for w in found.model_warmup] == [1, 8]
    for warmup in found.model_warmup:
        feeds = {
            name: torch.zeros(warmup.batch_size, *value.dims, dtype=torch.bool if name == "mask" else torch.int64).numpy()
            for name, value in warmup.inputs.items()
        }
        assert all(value.zero_data for value in warmup.inputs.values())
        runs.run(None, feeds)


@pytest.mark.parametrize("dtype", [pytest.param(d, id=d) for d in DTYPES if d != "bfloat16"])
def test_every_element_type_of_onnx_runtime(tmp_path: Path, dtype: str) -> None:
    file = model(tmp_path / "m.onnx", {"x": (dtype, ["n", 2])}, {"y": ("x", dtype, ["n", 2])})
    found = config(write_repository(tmp_path / "r", "m", file))
    element = session(file, threads=1).get_inputs()[0].type
    short = {"TYPE_FP32": "float", "TYPE_FP64": "double", "TYPE_FP16": "float16"}
    name = type_name(found.input[0])
    assert element == f"tensor({short.get(name, name.removeprefix('TYPE_').lower())})"
    assert type_name(found.output[0]) == type_name(next(iter(found.model_warmup)).inputs["x"]) == name


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        pytest.param({"x": [2, 3]}, {"y": ("x", [2, 3])}, r"the first axis of x float32 \[2, 3\] is fixed", id="fixed"),
        pytest.param({"x": ["n", 3], "z": [1, 3]}, {"y": ("x", ["n", 3])}, "the first axis of z", id="one-fixed-input"),
        pytest.param({"x": ["n", 3], "z": ["m", 3]}, {"y": ("x", ["n", 3])}, r"differ \(m, n\)", id="two-axes"),
        pytest.param({"x": ["n", "n"]}, {"y": ("x", ["n", "n"])}, "a second time", id="square"),
        pytest.param({"x": ["n", "n + 1"]}, {"y": ("x", ["n", "n + 1"])}, "a second time", id="expression"),
        pytest.param({"x": ["n", 3], "s": []}, {"y": ("x", ["n", 3])}, r"s float32 \[\] has no axes", id="scalar"),
    ],
)
def test_no_batching_where_requests_cannot_be_stacked(tmp_path: Path, inputs: Any, outputs: Any, reason: str) -> None:
    file = model(
        tmp_path / "m.onnx",
        {n: ("float32", s) for n, s in inputs.items()},
        {n: (source, "float32", s) for n, (source, s) in outputs.items()},
    )
    served = write_repository(tmp_path / "r", "m", file)
    found = config(served)
    assert served.max_batch == found.max_batch_size == 0
    assert not found.HasField("dynamic_batching")
    for tensor in found.input:
        shape = inputs[tensor.name]
        assert list(tensor.dims) == ([size if isinstance(size, int) else -1 for size in shape] or [1])
        assert not tensor.HasField("reshape")
    # the server passes over a warm-up of batch size 0
    assert [w.batch_size for w in found.model_warmup] == [1]
    with pytest.raises(UsageError, match=reason):
        write_repository(tmp_path / "again", "m", file, max_batch=4)
    assert not (tmp_path / "again").exists()


def test_batching_can_be_turned_off(tmp_path: Path) -> None:
    found = config(write_repository(tmp_path / "r", "m", image(tmp_path / "m.onnx"), max_batch=0))
    assert found.max_batch_size == 0
    assert list(found.input[0].dims) == [-1, 3, 4]
    single = config(write_repository(tmp_path / "s", "m", tmp_path / "m.onnx", max_batch=1))
    assert (single.max_batch_size, single.HasField("dynamic_batching"), len(single.model_warmup)) == (1, False, 1)


def test_options_reach_the_configuration(tmp_path: Path) -> None:
    file = image(tmp_path / "m.onnx")
    served = write_repository(
        tmp_path / "r", "m", file, max_batch=32, preferred_batches=(8, 32), queue_delay_us=500, instances=3, device="cpu",
        threads=2, warmup=False,
    )  # fmt: skip
    found = config(served)
    assert list(found.dynamic_batching.preferred_batch_size) == [8, 32]
    assert found.dynamic_batching.max_queue_delay_microseconds == 500
    (group,) = found.instance_group
    assert (group.kind, group.count) == (group.KIND_CPU, 3)
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    assert not found.model_warmup
    assert not served.notes
    assert "state threads" in str(write_repository(tmp_path / "s", "m", file, instances=3, device="cpu"))


def test_the_server_may_build_the_engine(tmp_path: Path) -> None:
    served = write_repository(
        tmp_path / "r", "m", image(tmp_path / "m.onnx"), accelerator="tensorrt", precision="fp16", device="gpu"
    )  # fmt: skip
    (accelerator,) = config(served).optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("tensorrt", {"precision_mode": "FP16"})


def test_values_in_the_file_are_no_inputs(tmp_path: Path) -> None:
    value = onnx.numpy_helper.from_array(torch.ones(3).numpy(), "w")
    file = model(
        tmp_path / "m.onnx",
        {"x": ("float32", ["n", 3]), "w": ("float32", [3])},
        {"y": ("z", "float32", ["n", 3])},
        nodes=[onnx.helper.make_node("Mul", ["x", "w"], ["z"])],
        initializers=[value],
    )
    found = config(write_repository(tmp_path / "r", "m", file))
    assert ([t.name for t in found.input], found.max_batch_size) == (["x"], 64)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, id=ascii(n))
        for n in ('a"b', "back\\slash", "tab\there", "line\nbreak", "return\r1", "größe", "日本", "a/b:0", "😀")
    ],
)
def test_every_name_survives_the_text_format(name: str) -> None:
    fields = {"name": name, "max_batch_size": 3, "input": [{"name": name, "data_type": Symbol("TYPE_FP32"), "dims": [-1, 2]}]}
    found = parsed(message(fields))
    assert (found.name, found.input[0].name, list(found.input[0].dims)) == (name, name, [-1, 2])


# --- warm-up ----------------------------------------------------------------------------------------------------------


def _in_rows_of(count: int, file: Path) -> Path:
    """Takes only inputs whose second axis is a multiple of `count`."""
    shape = onnx.numpy_helper.from_array(torch.tensor([0, -1, count]).numpy(), "shape")
    return model(
        file,
        {"x": ("float32", ["n", "length"])},
        {"y": ("z", "float32", ["n", None, count])},
        nodes=[onnx.helper.make_node("Reshape", ["x", "shape"], ["z"])],
        initializers=[shape],
    )


def test_a_size_that_runs_is_found(tmp_path: Path) -> None:
    found = config(write_repository(tmp_path / "r", "m", _in_rows_of(224, tmp_path / "m.onnx")))
    assert {tuple(w.inputs["x"].dims) for w in found.model_warmup} == {(224,)}


def test_a_warm_up_that_fails_here_is_left_out(tmp_path: Path) -> None:
    file = _in_rows_of(7 * 11, tmp_path / "m.onnx")
    served = write_repository(tmp_path / "r", "m", file)
    assert not config(served).model_warmup
    assert any("no warm-up" in n and "warmup_shapes" in n for n in served.notes)
    stated = write_repository(tmp_path / "s", "m", file, warmup_shapes={"x": (1, 154)})
    assert {tuple(w.inputs["x"].dims) for w in config(stated).model_warmup} == {(154,)}
    with pytest.raises(UsageError, match="does not run on zeros of the stated shapes"):
        write_repository(tmp_path / "t", "m", file, warmup_shapes={"x": (1, 153)})


# --- weights and kernels beside the file ------------------------------------------------------------------------------


def _with_weights(file: Path, location: str) -> Path:
    value = onnx.numpy_helper.from_array(torch.ones(3).numpy(), "w")
    data = bytes(value.raw_data)
    value.ClearField("raw_data")
    value.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        value.external_data.add(key=key, value=text)
    place = file.parent / location
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    return model(
        file,
        {"x": ("float32", ["n", 3])},
        {"y": ("z", "float32", ["n", 3])},
        nodes=[onnx.helper.make_node("Mul", ["x", "w"], ["z"])],
        initializers=[value],
    )


@pytest.mark.parametrize("location", ["m.onnx.abc.data", "weights/all.bin"])
def test_weights_come_along_under_their_name(tmp_path: Path, location: str) -> None:
    served = write_repository(tmp_path / "r", "m", _with_weights(tmp_path / "m.onnx", location))
    assert tree(served.path) == sorted(["1/model.onnx", f"1/{location}", "config.pbtxt"])
    assert session(served.path / "1/model.onnx", threads=1).run(None, {"x": torch.ones(1, 3).numpy()})[0].tolist() == [[1, 1, 1]]


def test_weights_that_are_missing_or_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = _with_weights(tmp_path / "in/m.onnx", "../outside.bin")
    with pytest.raises(
        UsageError, match=r"takes tensor 'w' from '\.\./outside\.bin': weights must stand in the folder of the file"
    ):
        write_repository(tmp_path / "r", "m", file)
    file = _with_weights(tmp_path / "in/m.onnx", "lost.bin")
    (tmp_path / "in/lost.bin").unlink()
    with pytest.raises(UsageError, match=r"lost\.bin are missing"):
        write_repository(tmp_path / "r", "m", file)
    with pytest.raises(UsageError, match=r"the server calls the model"):
        write_repository(tmp_path / "r", "m", _with_weights(tmp_path / "in/m.onnx", "model.onnx"))


class _Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_kernels_come_along_on_request(tmp_path: Path) -> None:
    file = to_onnx(
        _Quantized().eval(), tmp_path / "q.onnx", example_inputs=(torch.randn(2, 37),), dynamic_shapes=(BATCH,), form="native"
    ).path
    plain = write_repository(tmp_path / "r", "q", file, device="cpu")
    assert any("ops of normfuse" in n and "kernels=True" in n for n in plain.notes)
    assert not config(plain).HasField("model_operations")
    if not native.available():
        with pytest.raises(NormfuseError, match="native kernels"):
            write_repository(tmp_path / "s", "q", file, device="cpu", kernels=True)
        return
    served = write_repository(tmp_path / "s", "q", file, device="cpu", kernels=True, server_folder="/srv/models/")
    (library,) = config(served).model_operations.op_library_filename
    assert library == "/srv/models/q/libnormfuse.so"
    assert any(library in n for n in served.notes)
    # the copy is what a runtime takes for the ops of this file
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(served.path / "libnormfuse.so"))
    options.intra_op_num_threads = 1
    runs = ort.InferenceSession(str(served.path / "1/model.onnx"), options, providers=["CPUExecutionProvider"])
    assert runs.run(None, {runs.get_inputs()[0].name: torch.ones(1, 37).numpy()})[0].shape == (1, 20)
    with pytest.raises(UsageError, match="kernels run on the CPU, and device is 'auto'"):
        write_repository(tmp_path / "t", "q", file, kernels=True)


def test_kernels_without_a_use_are_not_copied(tmp_path: Path) -> None:
    served = write_repository(tmp_path / "r", "m", image(tmp_path / "m.onnx"), device="cpu", kernels=True)
    assert any("no kernels were copied" in n for n in served.notes)
    assert tree(served.path) == ["1/model.onnx", "config.pbtxt"]


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"name": ""}, "model name ''", id="no-name"),
        pytest.param({"name": "a/b"}, "model name 'a/b'", id="slash"),
        pytest.param({"name": "../m"}, "model name", id="way-out"),
        pytest.param({"name": "my model"}, "model name", id="space"),
        pytest.param({"backend": "openvino"}, "unknown backend 'openvino', expected onnxruntime or tensorrt", id="backend"),
        pytest.param({"backend": "tensorrt"}, "has no manifest", id="onnx-as-engine"),
        pytest.param({"max_batch": -1}, "max_batch is -1", id="max-batch"),
        pytest.param({"max_batch": 4, "preferred_batches": (8,)}, "preferred batch size 8: expected 1 to 4", id="preferred"),
        pytest.param({"max_batch": 0, "preferred_batches": (8,)}, "preferred batch size 8: expected none", id="preferred-alone"),
        pytest.param({"preferred_batches": (0,)}, "preferred batch size 0", id="preferred-zero"),
        pytest.param({"queue_delay_us": -1}, "queue_delay_us is -1", id="delay"),
        pytest.param({"instances": 0}, "instances is 0", id="instances"),
        pytest.param({"device": "tpu"}, "device is 'tpu'", id="device"),
        pytest.param({"threads": 0}, "threads is 0", id="threads"),
        pytest.param({"accelerator": "cuda"}, "accelerator is 'cuda'", id="accelerator"),
        pytest.param({"accelerator": "tensorrt", "device": "cpu"}, "the accelerator tensorrt runs on a GPU", id="accelerated-cpu"),
        pytest.param({"accelerator": "tensorrt", "precision": "int8"}, "precision is 'int8'", id="precision"),
        pytest.param({"precision": "fp16"}, "precision is for accelerator", id="precision-alone"),
        pytest.param({"version": 0}, "version is 0", id="version-0"),
        pytest.param({"version": "newest"}, "version is 'newest'", id="version-word"),
        pytest.param({"version": True}, "version is True", id="version-bool"),
        pytest.param({"by_capability": {"8.9": "x.engine"}}, "by_capability is for engines", id="capability"),
        pytest.param({"warmup_shapes": {"z": (1,)}}, "no input 'z'; its inputs are x float32", id="warm-up-name"),
        pytest.param({"warmup_shapes": {"x": (1, 2, 4)}}, "cannot have the shape", id="warm-up-size"),
        pytest.param({"warmup_shapes": {"x": (1, 3)}}, "expected 3 sizes", id="warm-up-rank"),
        pytest.param({"warmup_shapes": {"x": (0, 3, 4)}}, "cannot have the shape", id="warm-up-empty"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    file = image(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=match):
        write_repository(tmp_path / "r", options.pop("name", "m"), file, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    ("dtype", "shape", "match"),
    [
        pytest.param("string", ["n", 1], "is a tensor of strings", id="strings"),
        pytest.param("bfloat16", ["n", 1], "has no bfloat16 tensors", id="bfloat16"),
        pytest.param("complex64", ["n", 1], "elements of type complex64", id="complex"),
        pytest.param("float32", ["n", 0], "an axis of size 0", id="empty"),
        pytest.param("float32", None, "has no shape in the file", id="no-shape"),
    ],
)
def test_tensors_that_the_server_does_not_take(tmp_path: Path, dtype: str, shape: Any, match: str) -> None:
    file = model(tmp_path / "m.onnx", {"x": (dtype, shape)}, {"y": ("x", dtype, shape)})
    with pytest.raises(UsageError, match=match):
        write_repository(tmp_path / "r", "m", file)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"\x08\x99not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name, match in (("gone.onnx", "there is no file"), ("garbage.onnx", "not an ONNX model"), ("empty.onnx", "not an ONNX")):
        with pytest.raises(UsageError, match=match):
            write_repository(tmp_path / "r", "m", tmp_path / name)
    sequence = onnx.helper.make_tensor_sequence_value_info("x", 1, ["n"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "s", [sequence], [sequence])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "s.onnx"))
    with pytest.raises(UsageError, match="'x' is a sequence, expected a tensor"):
        write_repository(tmp_path / "r", "m", tmp_path / "s.onnx")
