"""Exact files: real architectures, the kernels that OpenVINO makes of them, names, axes, dtypes, structure of outputs."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.export import Exported, to_openvino
from normfuse.export.openvino.graph import as_run, provenance
from normfuse.export.openvino.result import OpenVinoExported
from normfuse.export.openvino.runtime import compiled, opened
from tests.export.models import attention, relative
from tests.export.openvino.openvino_models import MODELS, outputs, written

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Callable[[str], tuple[nn.Module, Any, OpenVinoExported]]:
    """A model by name, its inputs, and its file, which is written once."""

    @cache
    def made(name: str) -> tuple[nn.Module, Any, OpenVinoExported]:
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        return model, inputs, written(normfuse.optimize(model, inputs), tmp_path_factory.mktemp(name))

    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_is_the_same_function(name, real):
    model, inputs, made = real(name)
    assert made.error is not None
    assert made.error.max_rel < 1e-5
    feeds = inputs if isinstance(inputs, dict) else dict(zip(made.inputs, inputs, strict=True))
    with torch.no_grad():
        wanted = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
    assert relative(next(iter(outputs(made.path, **feeds).values())), wanted) < 1e-5


def test_openvino_fuses_norms_attention_and_activations(real):
    """Each RMSNorm is one kernel, and so are the attention of a layer and a bias with what follows it."""
    *_, made = real("vit")
    assert made.ran is not None
    assert made.norms == {"RMS": 5}
    kinds = {name.partition(":")[0] for name in made.ran.kernels}
    assert not kinds & {"Softmax", "MatMul", "MVN", "ReduceMean", "Power", "Gelu"}
    assert made.ran.products == (10, 0)
    assert "RMS" in str(made)


def test_rotary_positions_are_one_kernel(real):
    *_, made = real("llama")
    assert made.ran is not None
    assert made.ran.kernels["RoPE:f32"] == 4
    assert made.norms == {"RMS": 5}


@pytest.mark.parametrize("form", ["decomposed", "attention23"])
def test_both_forms_of_attention(form, tmp_path):
    model, x = attention(), torch.randn(2, 5, 32)
    made = written(model, tmp_path, example_inputs=(x,), attention=form, opset=23)
    assert relative(outputs(made.path, x=x)["output"], model(x)) < 1e-5


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor, unread: Tensor, mask: Tensor) -> dict[str, object]:
        y = self.norm(self.linear(x))
        return {"a": y.relu(), "b": (x, mask.sum(-1)), "best": y.argmax(-1), "flag": 3}


def test_names_axes_and_the_structure_of_outputs(tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    model = Structured().eval()
    inputs = torch.randn(3, 8), torch.randn(3, 4), torch.ones(3, 8, dtype=torch.bool)
    fast = normfuse.optimize(model, inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    made = written(fast, tmp_path)
    assert made.inputs == ("x", "unread", "mask")
    assert made.outputs == ("a", "b.0", "b.1", "best")
    assert any("flag" in note for note in made.notes)
    session = opened(made.path, threads=1)
    assert [(i.name, i.dtype) for i in session.inputs] == [("x", "float32"), ("unread", "float32"), ("mask", "bool")]
    assert [i.sizes[1] for i in session.inputs] == [8, 4, 8]
    assert not any(isinstance(i.sizes[0], int) for i in session.inputs)
    for n in (1, 5):
        x, mask = torch.randn(n, 8), torch.rand(n, 8) > 0.5
        found = session.outputs({"x": x, "unread": torch.randn(n, 4), "mask": mask})
        wanted = model(x, x, mask)
        assert found["a"].dtype == torch.float32
        assert relative(found["a"], wanted["a"]) < 1e-5
        assert torch.equal(found["b.0"], x)
        assert torch.equal(found["b.1"], wanted["b"][1])
        assert torch.equal(found["best"], wanted["best"])


def test_an_axis_that_varies_in_attention(tmp_path):
    model, inputs = MODELS["bert"]()
    tokens = {1: torch.export.Dim("tokens", min=2, max=64)}
    fast = normfuse.optimize(model, inputs, dynamic_shapes={"input_ids": tokens, "attention_mask": tokens})
    made = written(fast, tmp_path)
    ids = torch.arange(40).reshape(2, 20)
    found = outputs(made.path, input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted = model(ids, torch.ones_like(ids))
    assert relative(found["last_hidden_state"], wanted.last_hidden_state) < 1e-5


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[nn.Module, Tensor, nn.Module, int]:
    """A model, its input, the optimized model, and how large its file is in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32)).eval()
    x = torch.randn(3, 64)
    fast = normfuse.optimize(model, (x,))
    return model, x, fast, written(fast, tmp_path_factory.mktemp("wide")).bytes


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 5e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("io_dtype", ["fp32", "low"])
def test_narrow_files(dtype, bound, io_dtype, wide, tmp_path):
    model, x, fast, bytes_wide = wide
    made = written(fast, tmp_path, dtype=dtype, io_dtype=io_dtype)
    assert made.bytes < bytes_wide
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    given = low if io_dtype == "low" else torch.float32
    y = outputs(made.path, input=x.to(given))["output"]
    assert y.dtype == given
    assert relative(y.float(), model(x)) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_dtypes(dtype, tmp_path):
    """OpenVINO computes in float32; what it lacks is said, and a float16 model keeps its dtypes."""
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8)).eval().to(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    made = written(model, tmp_path, example_inputs=(x,))
    if dtype is torch.float16:
        assert not made.notes
    else:
        assert "OpenVINO lacks" in made.notes[0]
    taken = opened(made.path, threads=1).inputs[0].dtype
    y = outputs(made.path, input=x.to(getattr(torch, taken)))["output"]
    assert relative(y, model(x)) < {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-5}[dtype]


def test_the_file_says_where_it_is_from(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    made = written(normfuse.optimize(model, (torch.randn(2, 8),)), tmp_path)
    facts = provenance(made.path)
    assert facts["normfuse.target"] == "openvino"
    assert facts["normfuse.version"] == normfuse.__version__
    assert "normfuse.runtime" not in facts  # that is a release of ONNX Runtime
    assert openvino.Core().read_model(str(made.path)).get_rt_info(["framework", "normfuse.target"]).astype(str) == "openvino"
    assert {f.name for f in tmp_path.iterdir()} == {"model.xml", "model.bin"}


def test_how_to_run_it_is_code_that_runs(tmp_path):
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    fast = normfuse.optimize(nn.Linear(8, 4).eval(), (torch.randn(3, 8),), dynamic_shapes=(batch,))
    made = written(fast, tmp_path)
    assert "batch: any size" in made.how_to_run
    space: dict[str, object] = {}
    exec(made.how_to_run, space)
    assert next(iter(space["outputs"].values())).shape == (1, 4)  # type: ignore[attr-defined]


def test_without_verification_it_is_not_run(tmp_path):
    made = written(
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval(), tmp_path, example_inputs=(torch.randn(2, 8),), verify=False
    )
    assert made.error is None
    assert made.ran is None
    assert made.norms == {"MVN": 1}
    assert isinstance(made, Exported)


def test_the_weights_lie_in_a_file_of_their_own(tmp_path):
    made = to_openvino(nn.Linear(700, 700).eval(), tmp_path / "a.xml", example_inputs=(torch.randn(1, 700),), progress=False)
    assert (tmp_path / "a.bin").stat().st_size > 700 * 700 * 4 - 1
    assert made.bytes > 700 * 700 * 4
    assert as_run(compiled(made.path, threads=1)).products == (1, 0)


def test_an_outdated_file_is_replaced_whole(tmp_path: Path):
    x = torch.randn(1, 8)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Linear(8, 4).eval()
        made = written(model, tmp_path, example_inputs=(x,), force=True)
        assert relative(outputs(made.path, input=x)["output"], model(x)) < 1e-6
