"""Models that are not in float32: what their files compute in, and that they are right."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import ExportError, UsageError
from normfuse.export import to_onnx
from normfuse.export.onnx.precision.recast import recast
from normfuse.export.onnx.precision.spelling import spelled_dtype
from normfuse.export.onnx.program import program
from normfuse.export.onnx.runtime import session
from normfuse.numerics import evaluate
from tests.cli_runner import runner
from tests.zoo_entry import randomise_norms

onnx = pytest.importorskip("onnx")

W4A8 = normfuse.ShiftQuant(weight_bits=4, activation_bits=8, prefer="size")


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Words(nn.Module):
    """Reads integers; its attention mask is written with the least number of the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.up, self.down = nn.Embedding(40, 32), nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        scores = (x @ x.mT) / ids.shape[1]
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = scores.masked_fill(later, torch.finfo(x.dtype).min).softmax(-1) @ x
        return x + self.down(self.up(self.norm(x)).relu())


def subject(build: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8) if build is Conv else torch.randint(0, 40, (2, 6))
    return randomise_norms(build()).eval(), x


def exported(model: nn.Module, x: Tensor, file: Path, dtype: Any = None, **options: Any) -> Any:
    model = copy.deepcopy(model)
    kind = next(p.dtype for p in model.parameters())
    fast = normfuse.optimize(model, (x.to(kind) if x.is_floating_point() else x,), **options)
    return to_onnx(fast, file, dtype=dtype, progress=False, measure_seconds=0.1)


def ran(file: Path, x: Tensor) -> np.ndarray[Any, Any]:
    opened = session(file, threads=1)
    (given,) = opened.get_inputs()
    kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    found: np.ndarray[Any, Any] = opened.run(None, {given.name: x.numpy().astype(kinds[given.type])})[0]
    return found


def error(have: np.ndarray[Any, Any], want: Tensor) -> float:
    return float((torch.from_numpy(have).double() - want.double()).abs().max() / want.double().abs().max())


CASES = [
    # model, its dtype, what is asked for, what the file gives, bound against the float32 model
    pytest.param(Conv, torch.bfloat16, None, np.float32, 3e-2, id="bf16"),
    pytest.param(Conv, torch.bfloat16, "float16", np.float32, 3e-2, id="bf16-as-fp16"),
    pytest.param(Conv, torch.float16, None, np.float16, 5e-3, id="fp16"),
    pytest.param(Conv, torch.float16, "fp32", np.float32, 5e-3, id="fp16-as-fp32"),
    pytest.param(Conv, torch.float64, None, np.float32, 1e-5, id="fp64-without-kernels"),
    pytest.param(Words, torch.float64, None, np.float64, 1e-5, id="fp64"),
    pytest.param(Words, torch.float64, torch.float32, np.float32, 1e-5, id="fp64-as-fp32"),
    pytest.param(Words, torch.float64, "half", np.float32, 1e-2, id="fp64-as-fp16"),
    pytest.param(Words, torch.float32, "double", np.float64, 1e-5, id="fp32-as-fp64"),
    pytest.param(Words, torch.bfloat16, "fp64", np.float64, 3e-2, id="bf16-as-fp64"),
    pytest.param(Words, torch.bfloat16, None, np.float32, 3e-2, id="bf16-words"),
]


@pytest.mark.parametrize(("build", "kind", "asked", "gives", "bound"), CASES)
def test_a_model_is_exported_in_the_dtype_asked_for(
    build: Any, kind: torch.dtype, asked: Any, gives: Any, bound: float, tmp_path: Path
) -> None:
    model, x = subject(build)
    with torch.no_grad():
        want = model(x)
    made = exported(copy.deepcopy(model).to(kind), x, tmp_path / "m.onnx", asked)
    have = ran(made.path, x)
    assert have.dtype == gives
    assert error(have, want) <= bound
    changed = kind is not torch.float32 and not (kind is torch.float16 and asked is None) and gives is not np.float64
    assert any("exported in" in n and str(kind).removeprefix("torch.") in n for n in made.notes) == (
        changed or asked in ("fp64", "double")
    )


def test_a_bfloat16_model_gives_a_bfloat16_file(tmp_path: Path) -> None:
    model, x = subject(Conv)
    made = exported(model.bfloat16(), x, tmp_path / "m.onnx", "bf16")
    assert made.error is not None  # compared before the conversion
    kinds = {t.data_type for t in onnx.load(made.path).graph.initializer if len(t.dims) > 1}
    assert kinds == {onnx.TensorProto.BFLOAT16}


def test_the_given_module_stays_as_it_is(tmp_path: Path) -> None:
    model, x = subject(Conv)
    fast = normfuse.optimize(model.bfloat16(), (x.bfloat16(),))
    before = {k: v.clone() for k, v in fast.state_dict().items()}
    to_onnx(fast, tmp_path / "m.onnx", progress=False)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in fast.state_dict().items())
    assert fast(x.bfloat16()).dtype is torch.bfloat16


def test_float64_without_kernels_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    model, x = subject(Conv)
    with pytest.raises(ExportError, match=r"no float64 kernels on the CPU.*export it in float32"):
        exported(model.double(), x, tmp_path / "m.onnx", "fp64")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("text", [pytest.param(t, id=str(t)) for t in ("fp16", "float16", "half", "FP16", torch.float16)])
def test_dtypes_in_any_spelling(text: Any) -> None:
    assert spelled_dtype(text) == "fp16"


def test_a_misspelt_dtype_gets_a_suggestion(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(UsageError, match=r"unknown dtype 'floot32'.*did you mean 'float32'"):
        spelled_dtype("floot32")
    with runner("nothing", "", tmp_path, monkeypatch, capsys) as command:
        code, _, told = command("export", "torchvision:resnet18", "-o", "m.onnx", "--dtype", "bfloat61")
        assert code == 2
        assert "did you mean 'bfloat16'" in told
        assert "\n" not in told.strip()
        code, _, told = command("export", "torchvision:resnet18", "-o", "m.onnx", "--dtype", "float64")
        assert code == 2
        assert "conv1" in told


def test_a_bfloat16_folder_from_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = randomise_norms(transformers.Qwen2ForCausalLM(config)).eval()
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "model")
    with runner("nothing", "", tmp_path, monkeypatch, capsys) as command:
        code, told, wrong = command("export", "hf:model", "-o", "m.onnx", "--target", "portable")
    assert code == 0, wrong
    assert "exported in float32: the model computes in bfloat16" in " ".join(told.split())
    opened = session(tmp_path / "m.onnx", threads=1)
    ids = torch.randint(0, 100, (1, 16))
    (have, *_) = opened.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    with torch.no_grad():
        assert error(have, model(ids).logits) <= 3e-2


# -- what a graph asks for -------------------------------------------------------------------------------------------------


class Asks(nn.Module):
    """Dtypes that follow from nothing but the graph: default epsilons, ranges of floats, integers that are divided."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(0, x.shape[1], dtype=x.dtype)
        half = torch.tensor([1, 3]) / torch.tensor([2, 2])
        return torch.nn.functional.rms_norm(x * 1e-4 + steps, (x.shape[1],)) * half.to(x.dtype).sum() + torch.zeros(1).to(x.dtype)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_graph_in_another_dtype_is_the_same_function(kind: torch.dtype) -> None:
    x = torch.randn(3, 4)
    graph = program(Asks().eval(), (x.to(kind),)).exported.module()
    assert isinstance(graph, torch.fx.GraphModule)
    other = recast(graph, {kind: torch.float32})
    (have,) = other(x.to(kind).float())
    assert have.dtype is torch.float32
    torch.testing.assert_close(have, Asks()(x.to(kind)).float(), rtol=torch.finfo(kind).eps * 8 + 1e-6, atol=1e-3)
    assert graph(x.to(kind))[0].dtype is kind


def test_a_graph_that_reads_bits_has_no_other_dtype() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.int32) & 1

    graph = program(Bits().eval(), (torch.randn(3, 4),)).exported.module()
    assert isinstance(graph, torch.fx.GraphModule)
    with pytest.raises(ExportError, match="reads the bits"):
        recast(graph, {torch.float32: torch.float64})


# -- quantization ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [Conv, Words], ids=lambda b: b.__name__)
def test_quantization_takes_a_model_as_it_is(build: Any, kind: torch.dtype, tmp_path: Path) -> None:
    model, x = subject(build)
    given = x.to(kind) if x.is_floating_point() else x
    spec = normfuse.ShiftQuant(weight_bits=4, activation_bits=8, prefer="size", embedding_bits=8)
    plain = normfuse.optimize(model, (x,), quantize=spec)
    fast = normfuse.optimize(copy.deepcopy(model).to(kind), (given,), quantize=spec)
    layers = [e for e in normfuse.report(fast).quantization if e.kind != "model"]
    assert layers
    assert all(e.weight_bits for e in layers)
    with torch.no_grad():
        want, reference, have = model(x), plain(x), fast(given)
    assert have.dtype is kind
    noise = float((reference - want).square().sum())
    assert float((have.float() - want).square().sum()) <= 2 * noise
    made = to_onnx(fast, tmp_path / "m.onnx", progress=False, measure_seconds=0.1)
    found = ran(made.path, x)
    assert found.dtype == np.float32
    assert float((torch.from_numpy(found) - want).square().sum()) <= 2 * noise


def test_quantization_of_nothing_is_an_error_that_says_why() -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), nn.ReLU()).eval(), torch.randn(2, 8)
    with pytest.raises(UsageError, match="has quantized nothing: the model has no linear layer"):
        normfuse.optimize(model, (x,), quantize=W4A8)
    broken = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    spec = normfuse.ShiftQuant(weight_bits=4, activation_bits=8, prefer="size", keep=("1",))
    with pytest.raises(UsageError, match=r"none of 2 layers: 1 because .*; 1 because .*\. Leave quantize= out"):
        normfuse.optimize(broken, (x,), quantize=spec, verify="off")


# -- memory ----------------------------------------------------------------------------------------------------------------


def test_a_float64_run_holds_one_large_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs name all their constants first; in float64 they would be four times a bfloat16 model."""
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(6))).bfloat16().eval()
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    made = evaluate._constant

    def counted(value: Any, exact: bool) -> Any:
        nonlocal most
        found = made(value, exact)
        if exact and isinstance(found, Tensor) and found.numel() == 300 * 300:
            alive.append(weakref.ref(found))
            most = max(most, sum(r() is not None for r in alive))
        return found

    monkeypatch.setattr(evaluate, "_constant", counted)
    normfuse.optimize(model, (torch.randn(2, 300).bfloat16(),))
    assert len(alive) >= 6
    assert most == 1
