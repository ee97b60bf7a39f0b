"""ONNX files of others as other files: what they compute, in which opset and precision, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from normfuse.errors import ExportError, UsageError
from normfuse.export import ExportOptions
from normfuse.export.onnx.conversion.api import convert_onnx
from normfuse.export.onnx.inspect import facts
from normfuse.export.onnx.runtime import run as run_file
from normfuse.export.onnx.runtime import session
from tests.cli_runner import Run, runner

WIDTH = 8


def written(folder: Path, nodes: list[Any], weights: dict[str, Any], *, opset: int = 18, name: str = "given.onnx") -> Path:
    """A file with an input x of any batch and an output y."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "given", [value("x", TensorProto.FLOAT, ["batch", 3, WIDTH, WIDTH])], [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(w), k) for k, w in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, str(folder / name))
    return folder / name


def network(folder: Path, seed: int = 0, **how: Any) -> Path:
    """Conv, BatchNorm, Relu, a mean whose axes are a constant node, and a layer."""
    draw = np.random.default_rng(seed)

    def normal(*size: int) -> Any:
        return draw.standard_normal(size).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "gain", "bias", "mean", "var"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([2, 3]))),
        helper.make_node("ReduceMean", ["c", "axes"], ["d"], keepdims=0),
        helper.make_node("Identity", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "v"], ["y"], transB=1),
    ]
    weights = {
        "w": normal(5, 3, 3, 3), "gain": normal(5), "bias": normal(5), "mean": normal(5), "var": normal(5) ** 2 + 0.5,
        "v": normal(4, 5),
    }  # fmt: skip
    return written(folder, nodes, weights, **how)


def images(batch: int = 2) -> dict[str, torch.Tensor]:
    return {"x": torch.randn((batch, 3, WIDTH, WIDTH), generator=torch.Generator().manual_seed(7))}


def answer(path: Path, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(run_file(session(path), feeds).values()))


@pytest.mark.parametrize(("opset", "seed"), [(None, 0), (17, 1), (20, 2), (23, 3)])
def test_the_new_file_computes_the_same(tmp_path: Path, opset: int | None, seed: int) -> None:
    given = network(tmp_path, seed)
    before = given.read_bytes()
    made = convert_onnx(given, tmp_path / "new.onnx", images(), ExportOptions(opset=opset))
    assert given.read_bytes() == before
    assert made.opset == (opset or 18)
    assert made.ops == {"Conv": 1, "Gemm": 1, "ReduceMean": 1, "Relu": 1}
    assert made.error is not None
    assert made.error.max_rel < 1e-6
    for batch in (1, 3):
        feeds = images(batch)
        torch.testing.assert_close(answer(tmp_path / "new.onnx", feeds), answer(given, feeds), rtol=1e-5, atol=1e-5)
    assert facts(tmp_path / "new.onnx").runtime == made.runtime != ""
    assert onnx.load(str(made.path)).producer_name == "normfuse"


def test_a_runtime_bounds_opset_and_format(tmp_path: Path) -> None:
    given = network(tmp_path, opset=22)
    made = convert_onnx(given, tmp_path / "new.onnx", images(), ExportOptions(runtime="1.17"))
    assert (made.opset, made.runtime) == (20, "1.17")
    assert facts(tmp_path / "new.onnx").ir <= 9


@pytest.mark.parametrize("io", ["fp32", "low"])
def test_half_precision_is_narrow_and_near(tmp_path: Path, io: Any) -> None:
    given = network(tmp_path)
    made = convert_onnx(given, tmp_path / "half.onnx", images(), ExportOptions(dtype="fp16", io_dtype=io))
    assert made.error is not None
    assert 0 < made.error.max_rel < 2e-2
    assert made.signature[0].dtype == ("float32" if io == "fp32" else "float16")
    with pytest.raises(UsageError, match="cannot be made more exact"):
        convert_onnx(tmp_path / "half.onnx", tmp_path / "wide.onnx", images(), ExportOptions(dtype="fp64"))


def test_bfloat16_is_compared_before(tmp_path: Path) -> None:
    made = convert_onnx(network(tmp_path), tmp_path / "b.onnx", images(), ExportOptions(dtype="bf16"))
    assert "compared in float32, before the conversion to bfloat16" in made.notes
    assert "bfloat16" in {TensorProto.DataType.Name(t.data_type).lower() for t in onnx.load(str(made.path)).graph.initializer}


def test_weights_beside_the_file_come_along(tmp_path: Path) -> None:
    given = network(tmp_path)
    model = onnx.load(str(given))
    onnx.save(model, str(given), save_as_external_data=True, location="weights.data", size_threshold=0)
    (tmp_path / "out").mkdir()
    convert_onnx(given, tmp_path / "out" / "new.onnx", images())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new.onnx"]
    feeds = images()
    torch.testing.assert_close(answer(tmp_path / "out" / "new.onnx", feeds), answer(given, feeds), rtol=1e-5, atol=1e-5)


def test_a_file_that_rounds_is_held_to_decibels(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    weights = {"s": np.float32(0.05), "z": np.int8(0), "w": np.ones((2, 3, 3, 3), np.float32)}
    made = convert_onnx(written(tmp_path, nodes, weights), tmp_path / "new.onnx", images(), ExportOptions(opset=21))
    assert made.ops["QuantizeLinear"] == 1
    assert made.tolerance is None
    assert made.sqnr is not None
    assert made.sqnr > 60


def test_a_wrong_simplification_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any) -> None:
        weight = model.graph.initializers["w"]
        weight.const_value = onnx_ir.tensor(2 * weight.const_value.numpy())

    monkeypatch.setattr("normfuse.export.onnx.conversion.api.simplified", wrong)
    made = convert_onnx(network(tmp_path), tmp_path / "new.onnx", images())
    assert "nothing was simplified: the new file deviates" in made.notes[0]
    torch.testing.assert_close(answer(made.path, images()), answer(tmp_path / "given.onnx", images()), rtol=1e-5, atol=1e-5)


def test_a_file_that_stays_wrong_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="deviates from the old one by"):
        convert_onnx(network(tmp_path), tmp_path / "new.onnx", images(), ExportOptions(dtype="fp16", tolerance=1e-9))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given.onnx"]


def test_outputs_that_tell_nothing_are_noted(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "zero"], ["y"])]
    made = convert_onnx(written(tmp_path, nodes, {"zero": np.float32(0)}), tmp_path / "new.onnx", images())
    assert made.notes == ("nothing was compared: the output is zero",)


def test_other_meanings_and_strange_operators_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2])]
    with pytest.raises(ExportError, match="opset 17 has no AveragePool like that"):
        convert_onnx(written(tmp_path, nodes, {}, opset=20), tmp_path / "new.onnx", images(), ExportOptions(opset=17))
    gelu = [helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft")]
    given = written(tmp_path, gelu, {}, name="gelu.onnx")
    with pytest.raises(UsageError, match=r"operators of com\.microsoft, which the target portable does not have"):
        convert_onnx(given, tmp_path / "new.onnx", images(), ExportOptions(target="portable"))
    rms = [helper.make_node("RMSNormalization", ["x", "g"], ["y"])]
    given = written(tmp_path, rms, {"g": np.ones(WIDTH, np.float32)}, opset=23, name="rms.onnx")
    with pytest.raises(ExportError, match="opset 20 has no RMSNormalization like that"):
        convert_onnx(given, tmp_path / "new.onnx", images(), ExportOptions(opset=20))


# -- the command line ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    network(tmp_path)
    with runner("no_models_of_conversion", "", tmp_path, monkeypatch, capsys) as found:
        yield found
    logging.getLogger("onnxscript").setLevel(logging.NOTSET)


def test_export_from_the_command_line(run: Run) -> None:
    code, out, err = run("export", "given.onnx", "-o", "new.onnx")
    assert (code, err) == (0, "")
    assert ["BatchNormalization", "1", "-"] in [line.split() for line in out.splitlines()]
    assert "ort.InferenceSession(" in out
    code, _, err = run("export", "new.onnx", "-o", "again.onnx")
    assert code == 2
    assert "new.onnx was written by normfuse, and nothing of it would change: pass --dtype, --opset, --target, --runtime, " in err
    assert run("export", "new.onnx", "-o", "older.onnx", "--opset", "18")[0] == 0
    code, out, err = run("export", "given.onnx", "-o", "half.onnx", "--dtype", "fp16", "--json", "--batch", "3")
    assert (code, err) == (0, "")
    assert json.loads(out)["export"]["ops"]["Cast"] == 4  # in and out, and around the mean
    code, _, err = run("verify", "given.onnx", "half.onnx")
    assert (code, err) == (0, "")


def test_openvino_from_a_file(run: Run) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    code, out, err = run("export", "given.onnx", "-o", "new.xml")
    assert (code, err) == (0, "")
    assert "compile_model(" in out
    code, out, err = run("inspect", "new.xml")
    assert (code, err) == (0, "")
    assert "input   x: float32[?, 3, 8, 8]" in out
    assert "normfuse.made_of: given.onnx" in out
    code, out, err = run("inspect", "new.xml", "new.xml", "--json")
    assert (code, err) == (0, "")
    assert [f["ir"] for f in json.loads(out)["files"]] == [11, 11]
    code, _, err = run("inspect", "new.xml", "given.onnx")
    assert code == 2
    assert "compares two .onnx files, or two .xml files" in err


@pytest.mark.slow
def test_bench_of_a_file_alone_and_against_others(run: Run) -> None:
    how = ("--rounds", "2", "--warmup", "0", "--json")
    for more, names in (
        ((), ("onnxruntime", "onnxruntime-optimized")),
        (("--against", "onnxruntime-int8"), ("onnxruntime-int8", "given.onnx")),
    ):
        code, out, err = run("bench", "given.onnx", *more, *how)
        assert code in (0, 1, 3), err
        told = json.loads(out)
        assert (told["a"]["name"], told["b"]["name"]) == names


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("export given.onnx -o q.onnx --quantize w8a8", "--quantize starts from the PyTorch model"),
        ("export given.onnx -o q.onnx --passes affine", "--passes starts from the PyTorch model"),
        ("export given.onnx -o q.onnx --attention mha", "--attention starts from the PyTorch model"),
        ("export given.onnx -o q.onnx --weights w.pt", "--weights starts from the PyTorch model"),
        ("export given.onnx -o q.onnx --shape z=1x3x8x8", "has no input 'z' (inputs: x)"),
        ("export given.onnx -o q.onnx --shape 1x3x8x8 --shape 1x3", "takes 1 inputs (x), and 2 are stated"),
        ("export given.onnx -o q.onnx --dtype half --runtime 1.16", "files are written for ONNX Runtime 1.17 and newer"),
        ("export missing.onnx -o q.onnx", "missing.onnx does not exist"),
        ("export given.onnx -o given.onnx", "exists already"),
        ("bench given.onnx --against compile", "compile starts from the PyTorch model"),
        ("bench given.onnx --report r.html", "--report tells what was done to the model"),
    ],
)
def test_mistakes_are_one_line(run: Run, args: str, message: str) -> None:
    code, _, err = run(*args.split())
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not Path("q.onnx").exists()
