"""The forms of attention on the graph: each operator means what stood there, lies where projections left it, or says why not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.export import to_onnx
from normfuse.export.lowering.attention.floats import FloatAttention
from normfuse.export.lowering.attention.forms import AttentionForms, KernelAttention, forms_in
from normfuse.export.lowering.lowering import Lowered, lowered
from normfuse.export.onnx.program import program
from normfuse.passes.attention.eager import EagerAttention
from tests.export.models import AUTO, attention, relative

FORMS = ("attention23", "mha", "qkv", "native")


def _formed(model: nn.Module, inputs: tuple[Tensor, ...], form: str, opset: int = 23, dynamic: bool = True) -> Lowered:
    shapes = tuple({0: AUTO, 1: AUTO} for _ in inputs) if dynamic else None
    return lowered(program(model, inputs, shapes).exported, (EagerAttention(), AttentionForms(form, opset)))


def _got(found: Lowered) -> list[str]:
    return [form for _, form in forms_in(found.exported.graph.nodes)]


def _targets(found: Lowered) -> list[str]:
    return [str(n.target) for n in found.exported.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("style", ["packed", "separate", "interleaved", "eager"])
def test_an_operator_of_a_form_is_the_same_function(style: str, form: str) -> None:
    """At other sizes, too; and with heads where projections left them nothing is moved."""
    model = attention(style)
    found = _formed(model, (torch.randn(2, 5, 32),), form)
    assert _got(found) == [form]
    for size in ((2, 5), (3, 9)):
        x = torch.randn(*size, 32)
        assert relative(found.exported.module()(x)[0], model(x)) < 1e-5
    if form != "attention23" and style != "interleaved":
        assert not [t for t in _targets(found) if "permute" in t or "transpose" in t]


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_causal_attention(form: str) -> None:
    x, blind = torch.randn(2, 5, 32), torch.rand(2, 1, 5, 5) > 0.4
    blind[1, :, 2] = False  # a query that sees nothing
    for model, inputs in ((attention(), (x, blind)), (attention(is_causal=True, scale=0.7), (x,))):
        found = _formed(model, inputs, form, dynamic=False)
        assert _got(found) == [form]
        assert relative(found.exported.module()(*inputs)[0], model(*inputs)) < 1e-5


class Cross(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)  # type: ignore[arg-type]


REFUSED = [
    pytest.param("qkv", (4, 3, 8), (4, 7, 8), 8, {}, 23, "not as many keys", "mha", id="two sequences"),
    pytest.param("qkv", (4, 3, 8), (4, 3, 8), 8, {}, 23, "not columns of linear layers", "mha", id="no projections"),
    pytest.param("mha", (4, 3, 8), (2, 7, 8), 8, {"enable_gqa": True}, 23, "heads and the batch", "decomposed", id="shared keys"),
    pytest.param("mha", (4, 3, 8), (4, 7, 8), 8, {"is_causal": True}, 23, "is causal", "decomposed", id="causal, two sequences"),
    pytest.param("attention23", (4, 3, 8), (4, 7, 8), 6, {}, 23, "6 wide and keys 8", "decomposed", id="widths"),
    pytest.param("native", (4, 3, 8), (4, 7, 8), 6, {}, 23, "6 wide and keys 8", "mha", id="widths, native"),
]


@pytest.mark.parametrize(("form", "q", "k", "width", "options", "opset", "why", "instead"), REFUSED)
def test_a_site_that_a_form_refuses_says_why(
    form: str, q: tuple[int, ...], k: tuple[int, ...], width: int, options: dict[str, bool], opset: int, why: str, instead: str
) -> None:
    inputs = (torch.randn(2, *q), torch.randn(2, *k), torch.randn(2, *k[:2], width))
    found = _formed(Cross(**options).eval(), inputs, form, opset, dynamic=False)
    assert _got(found) == [instead]
    assert why in found.passes[-1].refused[0].note
    torch.testing.assert_close(found.exported.module()(*inputs)[0], Cross(**options)(*inputs))


def test_masks_before_opset_22_are_refused_with_a_remedy() -> None:
    found = _formed(attention(), (torch.randn(2, 5, 32), torch.rand(2, 1, 5, 5) > 0.1), "qkv", 20, dynamic=False)
    assert _got(found) == ["decomposed"]
    assert {(s.rule, s.remedy) for s in found.passes[-1].refused} == {("qkv", "opset 22 or newer"), ("mha", "opset 22 or newer")}


def test_one_split_serves_queries_keys_and_values() -> None:
    found = _formed(attention("packed"), (torch.randn(2, 5, 32),), "mha")
    assert sum("split_with_sizes" in t for t in _targets(found)) == 1


def test_a_result_that_is_read_with_heads_first_stays_so() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
            return y.transpose(1, 2).flatten(2), y.sum(1)

    model, x = Apart().eval(), torch.randn(2, 5, 32)
    found = _formed(model, (x,), "qkv")
    assert _got(found) == ["qkv"]
    for got, want in zip(found.exported.module()(x), model(x), strict=True):
        assert relative(got, want) < 1e-5


class Quantized(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ops.normfuse.shiftquant_attention(q, k, k, None, 0.3, self.causal, 8)  # type: ignore[no-any-return]


def test_attention_of_codes_reads_what_projections_left() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            y: Tensor = torch.ops.normfuse.shiftquant_attention(q, k, v, None, 0.3, False, 8)
            return y.transpose(1, 2).flatten(2)

    model, x = Model().eval(), torch.randn(2, 5, 32)
    found = lowered(program(model, (x,)).exported, (KernelAttention(),))
    assert not [t for t in _targets(found) if "permute" in t or "transpose" in t]
    torch.testing.assert_close(found.exported.module()(x)[0], model(x))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_codes_in_float(causal: bool) -> None:
    """PyTorch aligns a causal mask at the first key and the operator at the last: where that differs it stays."""
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 7, 8)
    found = lowered(program(Quantized(causal).eval(), (q, k)).exported, (FloatAttention(),))
    assert _got(found) == ([] if causal else ["decomposed"])
    assert bool(found.passes[0].refused) == causal


def test_the_report_names_every_attention(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Two in one module, of which one has a mask that this opset does not take; and one that is read in between."""

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, m: Tensor) -> tuple[Tensor, ...]:
            p = (q @ k.mT).softmax(-1)
            return F.scaled_dot_product_attention(q, k, k, m), F.scaled_dot_product_attention(q, k, q), p @ k, p

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, q: Tensor, k: Tensor, m: Tensor) -> tuple[Tensor, ...]:
            return self.inner(q, k, m)  # type: ignore[no-any-return]

    inputs = (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), torch.rand(2, 1, 5, 5) > 0.3)
    fast = normfuse.optimize(Outer().eval(), inputs)
    file = to_onnx(fast, tmp_path / "model.onnx", opset=20, attention="mha")
    told = [(f.kind, f.path, f.form, bool(f.why)) for f in file.forms]
    assert told == [
        ("attention", "inner", "decomposed", True),
        ("attention", "inner", "mha", False),
        ("attention", "inner", "arithmetic", True),
    ]
    assert file.attention_sites == {"decomposed": 1, "mha": 1}
