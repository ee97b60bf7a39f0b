"""`torch.compile(model, backend="normfuse")` against the model: sizes that vary, weights that change, and what is left as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.plugs import torch_compile
from normfuse.plugs.torch_compile import backend, reports
from tests.zoo_entry import randomise_norms

EAGER = {"then": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch_compile._reports.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=backend, options=EAGER | options)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.LayerNorm(16)]
    return randomise_norms(nn.Sequential(*layers, nn.Linear(16, 4), nn.Dropout())).eval()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_batch_norm_is_folded_and_the_answers_are_the_models() -> None:
    model, x = net(), torch.randn(2, 3, 8, 8)
    fast = compiled(model)
    with torch.no_grad():
        assert close(fast(x), model(x))
        assert close(fast(-x), model(-x))
    (found,) = reports()
    assert found.norms_before == {"batch_norm": 1, "layer_norm": 1, "rms_norm": 0}
    assert found.norms_after == {"batch_norm": 0, "layer_norm": 0, "rms_norm": 1}
    assert found.applied


def test_sizes_that_vary_are_one_more_graph_and_no_more() -> None:
    model = net()
    fast = compiled(model)
    with torch.inference_mode():
        for batch in (2, 3, 5, 7):
            x = torch.randn(batch, 3, 8, 8)
            assert close(fast(x), model(x))
    assert len(reports()) == 2


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_a_length_that_varies_reaches_every_operator(dynamic: bool | None) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(30, 16), nn.LayerNorm(16), nn.Linear(16, 5)
            self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, ids: Tensor, scale: float | None) -> Tensor:
            x = self.embed(ids) + torch.arange(ids.shape[1], dtype=torch.float32)[:, None] / ids.shape[1]
            x = x + self.attend(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
            y = self.head(x).view(ids.shape[0] * ids.shape[1], 5)
            return y if scale is None else y * scale

    torch.manual_seed(0)
    model = randomise_norms(Text()).eval()
    fast = torch.compile(model, backend=backend, options=EAGER, dynamic=dynamic)
    scale = None if dynamic else 0.5  # Dynamo makes a float that may vary the value of a tensor
    with torch.no_grad():
        for shape in ((2, 6), (2, 9), (3, 11)):
            ids = torch.randint(0, 30, shape)
            assert close(fast(ids, scale), model(ids, scale))
    assert reports()


def test_weights_that_were_written_are_used(caplog: pytest.LogCaptureFixture) -> None:
    model, x = net(), torch.randn(2, 3, 8, 8)
    fast = compiled(model)
    with torch.no_grad():
        before = fast(x)
        model[4].weight.mul_(-2)
        assert close(fast(x), model(x))
        assert not close(fast(x), before)
        model.load_state_dict(net().state_dict())
        assert close(fast(x), before)
        model[1].running_mean = model[1].running_mean + 1  # another tensor in its place
        assert close(fast(x), model(x))
    assert len(reports()) >= 3
    with torch.no_grad():
        for _ in range(torch_compile._AGAIN + 1):
            model[4].weight.mul_(1.5)
            assert close(fast(x), model(x))
    assert "until torch._dynamo.reset()" in caplog.text


@pytest.mark.parametrize(
    ("prepare", "call", "reason"),
    [
        pytest.param(nn.Module.eval, torch.enable_grad, "asked for gradients", id="gradients"),
        pytest.param(nn.Module.train, torch.no_grad, "is in training mode", id="training"),
        pytest.param(nn.Module.eval, lambda: torch.autocast("cpu", torch.bfloat16), "autocast", id="autocast"),
    ],
)
def test_what_is_no_inference_stays_as_it_is(prepare: Any, call: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = prepare(net()), torch.randn(2, 3, 8, 8)
    if reason == "autocast":
        model.requires_grad_(False)
    fast = compiled(model)
    with call():
        found = fast(x)
    assert reason in caplog.text
    assert not reports()
    assert found.requires_grad == (call is torch.enable_grad)
    if call is torch.enable_grad:
        found.sum().backward()
        assert model[0].weight.grad is not None


def test_a_graph_that_writes_to_its_input_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, norm = nn.Linear(4, 4).eval(), nn.LayerNorm(4)

    def call(x: Tensor) -> Tensor:
        x.add_(1)
        return norm(model(x))

    given, same = torch.zeros(2, 4), torch.zeros(2, 4)
    with torch.no_grad():
        found = torch.compile(call, backend=backend, options=EAGER)(given)
        assert torch.allclose(found, call(same))
    assert torch.equal(given, same)


def test_weights_that_nothing_watches_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        model, x = net(), torch.randn(2, 3, 8, 8)
        fast = compiled(model)
        fast(x)
        model[4].weight.mul_(2)
        assert close(fast(x), model(x))
    assert "was made under inference_mode" in caplog.text


def test_quantized_layers_and_passes_are_options() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval(), torch.randn(32, 64)
    fast = compiled(model, quantize="w8a8,prefer=size", passes=["cleanup"])
    with torch.no_grad():
        expected, found = model(x), fast(x)
    error = float((found - expected).square().mean() / expected.square().mean())
    assert 0 < error < 1e-3
    assert [e.weight_bits for e in reports()[-1].quantization] == [8, 8, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "w4a8"}, "no option 'quantise'; did you mean 'quantize'"),
        ({"then": "inducto"}, "did you mean 'inductor'"),
        ({"quantize": "w4b8"}, "did you mean 'w4a8'"),
        ({"verify": "allways"}, "verify='allways'"),
        ({"passes": ["afine"]}, "did you mean 'affine'"),
    ],
)
def test_a_wrong_option_is_an_error(options: dict[str, Any], message: str) -> None:
    fast = compiled(net(), **options)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        fast(torch.randn(2, 3, 8, 8))


def test_without_a_compiler_the_result_runs_in_pytorch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    model, x = net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert close(torch.compile(model, backend=backend)(x), model(x))
    assert "there is no C++ compiler" in caplog.text
    assert len(reports()) == 1


@pytest.mark.parametrize("kind", ["timm", "bert", "gpt2"])
def test_models_of_libraries(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "timm":
        timm = pytest.importorskip("timm")
        model, calls = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval(), [(torch.randn(2, 3, 64, 64),)]
    else:
        transformers = pytest.importorskip("transformers")
        small = {"vocab_size": 50}
        if kind == "bert":
            config = transformers.BertConfig(
                **small, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
            )
            model = transformers.BertModel(config).eval()
        else:
            model = transformers.GPT2Model(transformers.GPT2Config(**small, n_embd=32, n_layer=2, n_head=2)).eval()
        calls = [(torch.randint(0, 50, (2, n)),) for n in (7, 9, 12)]
    randomise_norms(model)
    fast = compiled(model)
    with torch.no_grad():
        for call in calls:
            expected, found = model(*call), fast(*call)
            pairs = [(found, expected)] if kind == "timm" else [(found.last_hidden_state, expected.last_hidden_state)]
            assert all(close(a, b) for a, b in pairs)
    assert sum(len(r.applied) for r in reports())


@pytest.mark.slow
def test_inductor_compiles_the_result() -> None:
    model = net()
    fast = torch.compile(model, backend=backend, options={"verify": "end"})
    with torch.no_grad():
        for batch in (2, 3, 4):
            x = torch.randn(batch, 3, 8, 8)
            assert close(fast(x), model(x))
    assert len(reports()) == 2
