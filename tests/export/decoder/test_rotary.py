"""Rotations are recognised by what they compute, in every spelling; what only looks like one stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import normfuse
from normfuse.export.decoder.call import longest
from normfuse.export.decoder.capture import CausalModel, cached
from normfuse.export.decoder.operator import cached_attention, positions, rotated
from normfuse.export.decoder.rotary import rotate_in_attention
from tests.export.decoder.models import tiny

_WIDTH, _ROWS = 8, 40


class _Layer(nn.Module):
    """A cached attention behind a rotation that `turn` writes."""

    def __init__(self, turn: Any) -> None:
        super().__init__()
        self.turn = turn
        self.frequencies = nn.Buffer(0.7 ** torch.arange(_WIDTH // 2))

    def forward(self, x: Tensor, input_ids: Tensor, attention_mask: Tensor, past: Tensor) -> Tensor:
        angle = positions(attention_mask, input_ids)[:, None, :, None] * self.frequencies
        query = x.reshape(*input_ids.shape, 2, _WIDTH).transpose(1, 2)
        value = query.sum(1, keepdim=True)
        out: Tensor = cached_attention(
            self.turn(query, angle), self.turn(value, angle), value, past, past, attention_mask, None, None, 0.3, 0, 0.0, False
        )[0]
        return out


def _halves(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    a, b = x[..., : _WIDTH // 2], x[..., _WIDTH // 2 :]
    return x * cos + torch.cat([-b, a], -1) * sin


def _pairs(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = (t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin()))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


def _part(x: Tensor, angle: Tensor) -> Tensor:
    return rotated(x, angle[..., :2].cos(), angle[..., :2].sin(), False)


def _scaled(x: Tensor, angle: Tensor) -> Tensor:
    return 1.2 * _halves(x, angle / 3)


def _none(x: Tensor, angle: Tensor) -> Tensor:
    return x


def _mirrored(x: Tensor, angle: Tensor) -> Tensor:
    """A reflection: relative positions do not survive it."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() + b * angle.sin(), a * angle.sin() - b * angle.cos()], -1)


def _absolute(x: Tensor, angle: Tensor) -> Tensor:
    """Angles that are no multiples of the position."""
    return _halves(x, angle * angle)


def _captured(turn: Any) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    mask = torch.ones(2, 7, dtype=torch.int64)
    inputs = (torch.randn(2, 3, 2 * _WIDTH), torch.zeros(2, 3, dtype=torch.int64), mask, torch.randn(2, 1, 4, _WIDTH))
    dim = torch.export.Dim
    batch, new, past, total = dim("batch"), dim("new"), dim("past"), dim("total")
    shapes = ({0: batch, 1: new}, {0: batch, 1: new}, {0: batch, 1: total}, {0: batch, 2: past})
    exported = torch.export.export(_Layer(turn), inputs, dynamic_shapes=shapes)
    return exported.module(), inputs  # type: ignore[return-value]


@pytest.mark.parametrize("turn", [_halves, _pairs, _part, _scaled])
def test_spellings(turn: Any) -> None:
    gm, (x, ids, mask, _) = _captured(turn)
    empty = torch.zeros(2, 1, 0, _WIDTH)
    wanted = gm(x, ids, mask[:, :3], empty)
    assert rotate_in_attention(gm, _ROWS) == 1
    assert not any(node.target is positions._opoverload for node in gm.graph.nodes)
    assert torch.allclose(gm(x, ids, mask[:, :3], empty), wanted, atol=1e-5)


@pytest.mark.parametrize("turn", [_none, _mirrored, _absolute])
def test_what_is_no_rotation_by_relative_positions_stays(turn: Any) -> None:
    gm, inputs = _captured(turn)
    wanted = gm(*inputs)
    assert rotate_in_attention(gm, _ROWS) == 0
    assert torch.equal(gm(*inputs), wanted)


def test_a_form_that_cannot_rotate_is_asked() -> None:
    gm, _ = _captured(_part)
    assert rotate_in_attention(gm, _ROWS, lambda pairs, width: pairs * 2 == width) == 0


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
])  # fmt: skip
def test_scaled_frequencies(scaling: dict[str, Any]) -> None:
    model = tiny("llama", num_hidden_layers=1, rope_parameters={"rope_theta": 10000.0, **scaling})
    flat = cached(model)
    gm = normfuse.optimize(flat, flat.example(), dynamic_shapes=flat.dynamic_shapes(), verify="off")
    assert rotate_in_attention(gm, longest(model)) == 1
    _same(flat, gm)


def _same(flat: CausalModel, gm: fx.GraphModule) -> None:
    ids = torch.randint(3, 320, (1, 50))
    pasts = [torch.zeros(1, site.kv_heads, 0, site.width) for site in flat.sites for _ in range(2)]
    with torch.no_grad():
        found, wanted = (m(ids, torch.ones_like(ids), pasts)[0] for m in (gm, flat))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    model = tiny("llama", num_hidden_layers=1, rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0})
    flat = cached(model)
    with pytest.raises(normfuse.NormfuseError):
        normfuse.optimize(flat, flat.example(), dynamic_shapes=flat.dynamic_shapes(), verify="off")
    assert isinstance(model, transformers.PreTrainedModel)
