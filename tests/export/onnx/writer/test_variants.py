"""A file has one name for each function body: no reader can take one body for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import normfuse
from normfuse import native
from normfuse.export import to_onnx
from normfuse.export.onnx.inspect import op_counts
from normfuse.export.onnx.runtime import run, session
from normfuse.export.onnx.writer.variants import base_name, load_model, one_name_each
from normfuse.export.ops import DOMAIN, OPS

onnx = pytest.importorskip("onnx")
onnx_inliner = pytest.importorskip("onnx.inliner")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def native_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 96),
        nn.GELU(),
        nn.Linear(96, 64),
        nn.ReLU(),
        nn.LayerNorm(64),
        nn.Linear(64, 48, bias=False),
        nn.Linear(48, 8),
    ).eval()
    x = torch.randn(16, 64)
    path = tmp_path_factory.mktemp("native") / "m.onnx"
    fast = normfuse.optimize(model, (x,), quantize=normfuse.ShiftQuant(weight_bits=4, prefer="size"))
    to_onnx(fast, path, form="native", opset=18, threads=1, progress=False)
    return path, fast, x


def test_every_body_has_a_name_of_its_own(native_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    model = onnx.load(native_file[0])
    names = [(f.domain, f.name) for f in model.functions]
    assert len(names) == len(set(names)) > 3
    assert not any(f.overload for f in model.functions)
    assert not any(n.overload for n in model.graph.node)
    ours = {n.op_type for n in model.graph.node if n.domain == DOMAIN}
    assert ours == {name for _, name in names}
    assert {base_name(n) for n in ours} <= set(OPS)
    if native.available():
        assert ours <= set(native.operators())
    assert all(len(f.input) >= len(n.input) for f in model.functions for n in model.graph.node if n.op_type == f.name)
    for f in model.functions:  # tools drop an input that no node reads, and then the others are at the wrong places
        assert set(f.input) <= {name for n in f.node for name in n.input}, f.name


def test_the_file_is_as_old_as_its_opset(native_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, fast, x = native_file
    assert onnx.load(path).ir_version == 8
    expected = fast(x)
    (found,) = run(session(path, threads=1, kernels=False), {"input": x}).values()
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_other_readers_open_it(native_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    model = onnx.load(native_file[0])
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {v.name for v in inferred.graph.value_info}
    assert {o for n in model.graph.node for o in n.output if o} - {o.name for o in model.graph.output} <= shapes
    onnx_inliner.inline_local_functions(model)


def test_counts_do_not_depend_on_names(native_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    counted = {op for op in op_counts(native_file[0]) if op.startswith(f"{DOMAIN}.")}
    assert counted
    assert counted <= {f"{DOMAIN}.{op}" for op in OPS}


def test_loading_undoes_the_names(native_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    model = load_model(native_file[0])
    ours = [n for n in model.graph if n.domain == DOMAIN]
    assert all(n.op_type in OPS and n.op_identifier() in model.functions for n in ours)
    before = [n.op_identifier() for n in ours]
    with one_name_each(model):
        assert [n.op_type for n in ours] == [n.op_type for n in onnx.load(native_file[0]).graph.node if n.domain == DOMAIN]
    assert [n.op_identifier() for n in ours] == before


@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim"])
def test_a_tool_simplifies_it(native_file: tuple[Path, nn.Module, torch.Tensor], tool: str, tmp_path: Path) -> None:
    tools = pytest.importorskip(tool)
    path, fast, x = native_file
    if tool == "onnxslim":
        slim = tools.slim(str(path))
    else:
        slim, fine = tools.simplify(onnx.load(path))
        assert fine
    onnx.save(slim, tmp_path / "slim.onnx")
    (found,) = run(session(tmp_path / "slim.onnx", threads=1, kernels=False), {"input": x}).values()
    expected = fast(x)
    assert (found - expected).norm() <= 1e-3 * expected.norm()
