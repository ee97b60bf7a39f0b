"""ShiftQuant(attention=True): the scores of attention become integers; what the operator does not take stays float and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import ShiftQuant
from normfuse.errors import UsageError
from tests.passes.quantize.quantized import draw, entries, made, operators, sqnr

SPEC = ShiftQuant(weight_bits=8, attention=True, prefer="size")
OPERATOR = "shiftquant_attention"


class Attend(nn.Module):
    """Self-attention of `heads` queries on `kv` keys; `features` of a value; the rest goes to PyTorch."""

    def __init__(self, heads: int = 4, kv: int = 4, features: int = 8, **how: Any) -> None:
        super().__init__()
        self.heads, self.kv, self.how = heads, kv, how
        self.q, self.k, self.v = nn.Linear(16, heads * 8), nn.Linear(16, kv * 8), nn.Linear(16, kv * features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (n, -1)).transpose(1, 2) for f, n in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
        )
        y: Tensor = F.scaled_dot_product_attention(q, k, v, mask, **self.how, enable_gqa=self.heads != self.kv)
        return y


def _quantized(model: nn.Module, *inputs: Tensor, spec: ShiftQuant = SPEC) -> Any:
    return normfuse.optimize(model, inputs, quantize=spec)


MADE = [
    pytest.param({}, id="plain"),
    pytest.param({"kv": 2}, id="grouped"),
    pytest.param({"is_causal": True}, id="causal"),
    pytest.param({"scale": 0.1}, id="scale"),
]


@pytest.mark.parametrize("how", MADE)
@torch.no_grad()
def test_scores_become_integers(how: dict[str, Any]) -> None:
    model, x = made(Attend, **how), draw(2, 7, 16)
    fast = _quantized(model, x)
    (entry,) = entries(normfuse.report(fast), kind="attention")
    assert entry.activation_bits == 8
    assert not entry.kept
    assert any(OPERATOR in name for name in operators(fast))
    assert not any("scaled_dot_product" in name for name in operators(fast))
    assert sqnr(model(x), fast(x)) > 25


@pytest.mark.parametrize("kind", ["bool", "float"])
@torch.no_grad()
def test_a_query_that_sees_nothing_stays_zero(kind: str) -> None:
    model, x = made(Attend), draw(2, 6, 16)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    seen[0, :, 2], seen[1, :, :, 4:] = False, False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    fast = _quantized(model, x, mask)
    y = fast(x, mask)
    assert any(OPERATOR in name for name in operators(fast))
    assert not y[0, :, 2].any()
    assert sqnr(model(x, mask), y) > 25


@torch.no_grad()
def test_without_the_field_it_stays() -> None:
    fast = _quantized(made(Attend), draw(2, 7, 16), spec=ShiftQuant(weight_bits=8, prefer="size"))
    assert not any(OPERATOR in name for name in operators(fast))


class Broadcast(nn.Module):
    """One batch of keys for all queries, which PyTorch broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.register_buffer("keys", draw(1, 2, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, self.keys * q.mean(), self.keys * q.amax())


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q[:, :, :3], q, q, is_causal=True)


REFUSED = [
    pytest.param(lambda: made(Attend, features=5), SPEC, "values have 5 features", id="features"),
    pytest.param(lambda: made(Broadcast), SPEC, "the kernel takes one batch", id="broadcast"),
    pytest.param(lambda: made(Cross), SPEC, "conventions differ", id="causal"),
]


def test_attention_may_be_kept_with_all_else() -> None:
    spec = ShiftQuant(weight_bits=8, attention=True, prefer="size", keep=("*",))
    with pytest.raises(UsageError, match=r"none of 4 layers: 4 because kept in float by keep='\*'"):
        _quantized(made(Attend), draw(2, 7, 16), spec=spec)


@pytest.mark.parametrize(("build", "spec", "word"), REFUSED)
@torch.no_grad()
def test_what_the_operator_does_not_take_stays_and_says_why(build: Any, spec: ShiftQuant, word: str) -> None:
    model, x = build(), draw(2, 7, 16)
    fast = _quantized(model, x, spec=spec)
    (entry,) = entries(normfuse.report(fast), kind="attention")
    assert word in entry.kept
    assert not any(OPERATOR in name for name in operators(fast))
    assert sqnr(model(x), fast(x)) > 25
