"""`with_kernels`: what becomes an operator with a GPU kernel, what stays, and that neither changes the function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normfuse
from normfuse.app.random_norms import randomise_norms
from normfuse.capture.capture import flat_inputs
from normfuse.errors import UsageError
from normfuse.export.kernels import KERNELS, with_kernels
from normfuse.ir.graph import Graph
from normfuse.nn import CRMSNorm, L1LayerNorm
from normfuse.numerics.evaluate import evaluate
from normfuse.reports.record import record

D = 12


def ops_of(gm: fx.GraphModule) -> Counter[str]:
    """How often each operator of `torch.ops.normfuse` is called."""
    targets = [n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return Counter(t._schema.name.removeprefix("normfuse::") for t in targets if t.namespace == "normfuse")


def assert_same(gm: fx.GraphModule, lowered: fx.GraphModule) -> None:
    """Equal in float64, on the example inputs."""
    found = record(gm)
    assert found is not None
    inputs = flat_inputs(gm, found.args, found.kwargs)
    expected, got = (evaluate(Graph.of(m), inputs, exact=True) for m in (gm, lowered))
    assert len(expected) == len(got) > 0
    for a, b in zip(expected, got, strict=True):
        assert b.shape == a.shape
        assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(a.abs().max()))


def optimized(module: nn.Module, *inputs: Tensor, **kwargs: Any) -> fx.GraphModule:
    """In float64 where it is in float32: weights that a rewrite computes are rounded to the dtype of the model."""
    wide = [x.double() if x.dtype is torch.float32 else x for x in inputs]
    module = module.double() if torch.float32 in {x.dtype for x in inputs} else module
    return normfuse.optimize(randomise_norms(module, seed=0).eval(), tuple(wide), **kwargs)


class Block(nn.Module):
    """x + r, which two read, a norm and a linear layer; `after` stands in between or behind."""

    def __init__(self, norm: nn.Module, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.between = nn.Linear(D, D), norm, nn.Linear(D, 8), between

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.first(x)
        y = self.norm(total)
        y = y if self.between is None else self.between(y)
        return self.second(y) + total.sum(-1, keepdim=True)


def test_rms_norm_takes_the_sum_that_others_read() -> None:
    gm = optimized(Block(nn.RMSNorm(D, eps=1e-5), torch.sin), torch.randn(2, 3, D), passes=[])
    lowered = with_kernels(gm, ["rms_norm", "add_rms_norm"])
    assert ops_of(lowered) == {"add_rms_norm": 1}
    assert not [n for n in lowered.graph.nodes if n.target is torch.ops.aten.rms_norm.default]
    assert_same(gm, lowered)


@pytest.mark.parametrize("eps", [pytest.param(None, id="machine"), pytest.param(0.1, id="given")])
def test_rms_norm_without_a_sum_stands_alone(eps: float | None) -> None:
    gm = optimized(nn.Sequential(nn.RMSNorm(D, eps=eps), nn.Tanh()), torch.randn(4, D), passes=[])
    lowered = with_kernels(gm, ["rms_norm"])
    assert ops_of(lowered) == {"rms_norm": 1}
    assert_same(gm, lowered)
    x = torch.randn(4, D, dtype=torch.float64) * 1e-3
    torch.testing.assert_close(lowered(x), gm(x))


def test_a_sum_that_broadcasts_stays_an_addition() -> None:
    class Broadcast(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.rms_norm(x + y, (D,), None, 1e-5)

    gm = optimized(Broadcast(), torch.randn(2, 3, D), torch.randn(3, D), passes=[])
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {"rms_norm": 1}
    assert_same(gm, lowered)


def test_a_norm_takes_the_sum_only_where_that_is_asked_for() -> None:
    gm = optimized(Block(nn.RMSNorm(D), torch.sin), torch.randn(2, D), passes=[])
    assert ops_of(with_kernels(gm, ["rms_norm"])) == {"rms_norm": 1}
    alone = optimized(nn.Sequential(nn.RMSNorm(D), nn.Tanh()), torch.randn(4, D), passes=[])
    assert not ops_of(with_kernels(alone, ["add_rms_norm"]))


def test_rms_norm_over_two_axes_stays() -> None:
    gm = optimized(nn.RMSNorm((3, D)), torch.randn(2, 3, D), passes=[])
    assert not ops_of(with_kernels(gm))


def test_a_second_norm_reads_the_sum_of_the_first() -> None:
    class Parallel(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            total = x + y
            return torch.rms_norm(total, (D,), None, 1e-5).sin() * torch.rms_norm(total, (D,), None, 1e-2).cos()

    gm = optimized(Parallel(), torch.randn(2, D), torch.randn(2, D), passes=[])
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {"add_rms_norm": 1, "rms_norm": 1}
    assert_same(gm, lowered)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="wide"), pytest.param(torch.float16, id="fp16")])
@pytest.mark.parametrize(
    ("norm", "kernel"),
    [
        pytest.param(lambda: CRMSNorm(D, elementwise_affine=True), "add_crms_norm", id="crms"),
        pytest.param(lambda: CRMSNorm(D, eps=0.3), "add_crms_norm", id="crms-bare"),
        pytest.param(lambda: L1LayerNorm(D), "l1_norm", id="l1"),
        pytest.param(lambda: L1LayerNorm(D, eps=0.3, scale_const=1.0, elementwise_affine=False), "l1_norm", id="l1-bare"),
    ],
)
@pytest.mark.parametrize("passes", [pytest.param([], id="as-captured"), pytest.param(None, id="optimized")])
def test_norms_of_normfuse_become_one_operator(
    norm: Callable[[], nn.Module], kernel: str, passes: list[str] | None, dtype: torch.dtype
) -> None:
    gm = optimized(Block(norm(), torch.sin).to(dtype), torch.randn(2, 3, D, dtype=dtype), passes=passes)
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {kernel: 1}
    left = {n.target for n in lowered.graph.nodes} & {torch.ops.aten.sqrt.default, torch.ops.aten.abs.default}
    assert not left
    assert_same(gm, lowered)


def test_gain_and_shift_go_into_the_l1_norm() -> None:
    gm = optimized(Block(L1LayerNorm(D), torch.sin), torch.randn(2, D), passes=[])
    lowered = with_kernels(gm, ["l1_norm"])
    (call,) = [n for n in lowered.graph.nodes if n.target is torch.ops.normfuse.l1_norm.default]
    assert [a.target for a in call.args[1:3]] == ["norm.weight", "norm.bias"]
    assert "norm" in str(call.meta.get("nn_module_stack"))


def test_statistic_of_the_pass_l1_stays() -> None:
    """max(c m, √ε) is another function than c m + ε."""
    torch.manual_seed(0)
    gm = optimized(Block(nn.LayerNorm(D), torch.sin), torch.randn(2, 3, D), passes=["l1"])
    assert [n for n in gm.graph.nodes if n.target is torch.ops.aten.clamp_min.default]
    assert not ops_of(with_kernels(gm))


@pytest.mark.parametrize(
    "almost",
    [
        pytest.param(lambda x: x / ((x.square().sum(-1, True) + x.sum(-1, True)) / 13 + 1e-5).sqrt(), id="sum-not-squared"),
        pytest.param(
            lambda x: x / ((x.square().sum(-1, True) + x.sin().sum(-1, True).square()) / 13 + 1e-5).sqrt(), id="other-sum"
        ),
        pytest.param(lambda x: x / ((x.square().sum(1, True) + x.sum(1, True).square()) / 13 + 1e-5).sqrt(), id="other-axis"),
        pytest.param(lambda x: (x - x.mean(-1, True)) / (x.abs().mean(-1, True) + 1e-5), id="l1-of-what-is-not-centred"),
        pytest.param(lambda x: (x - x.mean(1, True)) / ((x - x.mean(1, True)).abs().mean(-1, True) + 1e-5), id="l1-of-two-axes"),
        pytest.param(lambda x: x.softmax(1), id="softmax-of-another-axis"),
        pytest.param(lambda x: x.softmax(-1, dtype=torch.float32), id="softmax-in-another-dtype"),
    ],
)
def test_what_is_not_exactly_the_pattern_stays(almost: Callable[[Tensor], Tensor]) -> None:
    class Almost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return almost(x)

    gm = optimized(Almost(), torch.randn(2, 3, D), passes=[])
    lowered = with_kernels(gm)
    assert not ops_of(lowered)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    assert torch.equal(lowered(x), gm(x))


@pytest.mark.parametrize("factor", [pytest.param(12.0, id="same-width"), pytest.param(13.0, id="compressed")])
def test_crms_norm_with_another_divisor_has_a_gain(factor: float) -> None:
    class Divided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            power = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
            return (x * torch.rsqrt(power * (1 / factor) + 0.01)).sin()

    gm = optimized(Divided(), torch.randn(3, D), passes=[])
    lowered = with_kernels(gm, ["crms_norm"])
    (call,) = [n for n in lowered.graph.nodes if n.target is torch.ops.normfuse.crms_norm.default]
    assert (call.args[1] is None) == (factor == D + 1)
    assert_same(gm, lowered)


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "epilogue"),
    [
        pytest.param(nn.GELU(), "gelu", id="gelu"),
        pytest.param(nn.GELU(approximate="tanh"), "gelu_tanh", id="gelu-tanh"),
        pytest.param(nn.SiLU(), "silu", id="silu"),
        pytest.param(nn.ReLU(), "relu", id="relu"),
        pytest.param(nn.Tanh(), "none", id="none"),
    ],
)
def test_norm_and_linear_are_one_product(act: nn.Module, epilogue: str) -> None:
    gm = optimized(nn.Sequential(nn.RMSNorm(D, eps=1e-3), nn.Linear(D, 8), act), torch.randn(2, 3, D), passes=[])
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {"rms_norm_linear": 1}
    (call,) = [n for n in lowered.graph.nodes if n.target is torch.ops.normfuse.rms_norm_linear.default]
    assert (call.args[4] if len(call.args) > 4 else "none") == epilogue
    assert_same(gm, lowered)


def test_norm_of_two_readers_is_computed_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.RMSNorm(D), nn.Linear(D, 8), nn.Linear(D, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.a(y) + self.b(y)

    gm = optimized(Two(), torch.randn(2, D), passes=[])
    assert ops_of(with_kernels(gm)) == {"rms_norm": 1}


def test_shared_weight_is_not_stored_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.RMSNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.norm(self.a(x).tanh()))

    gm = optimized(Shared(), torch.randn(2, D), passes=[])
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {"rms_norm": 1}
    assert len(lowered.state_dict()) == len(gm.state_dict())


def test_activation_that_others_bypass_stays_outside() -> None:
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.RMSNorm(D), nn.Linear(D, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(self.norm(x))
            return torch.relu(y) + y

    gm = optimized(Bypassed(), torch.randn(2, D), passes=[])
    lowered = with_kernels(gm)
    assert [n for n in lowered.graph.nodes if n.target is torch.ops.aten.relu.default]
    assert_same(gm, lowered)


# -- softmax -----------------------------------------------------------------------------------------------------------


def test_softmax_over_the_last_axis() -> None:
    gm = optimized(nn.Softmax(dim=2), torch.randn(2, 3, D), passes=[])
    lowered = with_kernels(gm, ["two_pass_softmax"])
    assert ops_of(lowered) == {"two_pass_softmax": 1}
    assert_same(gm, lowered)


def test_softmax_in_float32_between_casts_of_halves() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1, dtype=torch.float32).to(x.dtype)

    x = torch.randn(2, D, dtype=torch.float16)
    gm = optimized(Wide(), x, passes=[])
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {"two_pass_softmax": 1}
    assert lowered(x).dtype is torch.float16
    assert_same(gm, lowered)


# -- real models, the module that comes back, arguments ----------------------------------------------------------------


def _vit(passes: list[str] | None = None) -> fx.GraphModule:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=32, num_classes=5)
    return optimized(model, torch.randn(2, 3, 32, 32), passes=passes)


def test_vision_transformer() -> None:
    gm = _vit()
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {"rms_norm_linear": 5}
    assert_same(gm, lowered)
    norms = with_kernels(gm, ["rms_norm", "add_rms_norm"])
    # the first sum adds positions, which broadcast
    assert ops_of(norms) == {"add_rms_norm": 4, "rms_norm": 1}
    assert_same(gm, norms)


def test_vision_transformer_without_one_coordinate() -> None:
    gm = _vit(["default", "compress"])
    lowered = with_kernels(gm)
    assert sum(ops_of(lowered).values()) == 5
    assert set(ops_of(lowered)) == {"add_crms_norm", "crms_norm"}
    assert_same(gm, lowered)


def test_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=50,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    model = randomise_norms(transformers.LlamaForCausalLM(config), seed=0).eval().double()
    gm = normfuse.optimize(model, {"input_ids": torch.arange(6)[None], "use_cache": False})
    lowered = with_kernels(gm)
    # four norms are read by several products, the last one by the head alone; attention is written out
    assert ops_of(lowered) == {"add_rms_norm": 3, "rms_norm": 1, "rms_norm_linear": 1, "two_pass_softmax": 2}
    assert_same(gm, lowered)


def test_a_batch_that_varies_stays_free() -> None:
    batch = torch.export.Dim("batch", min=2, max=16)
    model = randomise_norms(Block(nn.RMSNorm(D), torch.sin), seed=0).eval()
    gm = normfuse.optimize(model, (torch.randn(3, 4, D),), dynamic_shapes=({0: batch},), passes=[])
    lowered = with_kernels(gm)
    assert ops_of(lowered) == {"add_rms_norm": 1}
    x = torch.randn(7, 4, D)
    torch.testing.assert_close(lowered(x), gm(x))


def test_the_input_is_not_changed_and_the_record_is_kept() -> None:
    gm = optimized(Block(nn.RMSNorm(D)), torch.randn(2, D), passes=[])
    code, state = gm.code, {k: v.clone() for k, v in gm.state_dict().items()}
    lowered = with_kernels(gm)
    assert gm.code == code
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())
    assert record(lowered) is record(gm)
    assert normfuse.report(lowered) is normfuse.report(gm)
    assert not {p.data_ptr() for p in lowered.parameters()} & {p.data_ptr() for p in gm.parameters()}


def test_lowering_twice_changes_nothing() -> None:
    once = with_kernels(_vit())
    assert ops_of(with_kernels(once)) == ops_of(once)


def test_without_shapes_nothing_is_found() -> None:
    gm = normfuse.optimize(nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D)).eval(), passes=[])
    assert not ops_of(with_kernels(gm))


def test_no_kernel_asked_for_changes_nothing() -> None:
    assert not ops_of(with_kernels(_vit(), []))


def test_every_name_is_taken() -> None:
    gm = optimized(nn.Linear(D, D), torch.randn(2, D))
    assert not ops_of(with_kernels(gm, KERNELS))


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        pytest.param(["rmsnorm"], "no kernel 'rmsnorm'.*did you mean 'rms_norm'", id="misspelt"),
        pytest.param(["flash"], "no kernel 'flash': expected rms_norm_linear, add_rms_norm", id="unknown"),
        pytest.param("rms_norm", r"expected a list of names, e.g. \['rms_norm'\]", id="one-string"),
    ],
)
def test_unknown_kernels_are_named(ops: Any, message: str) -> None:
    gm = optimized(nn.Linear(D, D), torch.randn(2, D), passes=[])
    with pytest.raises(UsageError, match=message):
        with_kernels(gm, ops)
