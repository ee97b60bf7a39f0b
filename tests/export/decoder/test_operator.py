"""The cached attention as it is defined: slots, padding, windows, rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normfuse.export.decoder.operator import cached_attention, newest, positions, rotated


def _attend(
    x: list[Tensor], pasts: list[Tensor], mask: Tensor, *, window: int = 0, cap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    return cached_attention(*x, *pasts, mask, None, None, 0.3, window, cap, False)  # type: ignore[no-any-return]


def _heads(rows: int, new: int) -> list[Tensor]:
    return [torch.randn(rows, heads, new, 8, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("room", [0, 12])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_attends_as_it_does_alone(window: int, room: int, side: str) -> None:
    prompt, step = _heads(1, 4), _heads(1, 1)
    empty = [torch.zeros(1, 2, 0, 8, dtype=torch.float64)] * 2
    first = _attend(prompt, empty, torch.ones(1, 4, dtype=torch.int64), window=window)
    then = _attend(step, list(first[1:]), torch.ones(1, 5, dtype=torch.int64), window=window)
    at = slice(2, 6) if side == "left" else slice(0, 4)
    mask = torch.zeros(2, 6, dtype=torch.int64)
    mask[0], mask[1, at] = 1, 1
    wide = _heads(2, 6)
    for x, own in zip(wide, prompt, strict=True):
        x[1:, :, at] = own
    pasts = [torch.zeros(2, 2, room, 8, dtype=torch.float64)] * 2
    out, *pasts = _attend(wide, pasts, mask, window=window)
    assert torch.allclose(out[1:, at], first[0])
    one = [torch.cat([torch.randn_like(own), own]) for own in step]
    out, *_ = _attend(one, pasts, torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1), window=window)
    assert torch.allclose(out[1:], then[0])


def test_soft_caps_bound_the_scores() -> None:
    x = [10 * t for t in _heads(1, 3)]
    empty, mask = [torch.zeros(1, 2, 0, 8, dtype=torch.float64)] * 2, torch.ones(1, 3, dtype=torch.int64)
    scores = x[0] @ x[1].repeat_interleave(2, 1).mT * 0.3
    weights = (5 * torch.tanh(scores / 5)).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
    wanted = (weights @ x[2].repeat_interleave(2, 1)).transpose(1, 2)
    assert torch.allclose(_attend(x, empty, mask, cap=5.0)[0], wanted)
    assert not torch.allclose(_attend(x, empty, mask)[0], wanted)


def test_positions_and_the_newest_token() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = torch.zeros(3, 5, dtype=torch.int64)
    assert positions(mask, ids).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert positions(mask, ids[:, :2]).tolist() == [[3, 4], [1, 2], [2, 2]]
    hidden = torch.arange(5.0).expand(3, 5)[..., None]
    assert newest(hidden, mask)[:, 0, 0].tolist() == [4, 4, 2]
    assert newest(hidden[:, 3:], mask)[:, 0, 0].tolist() == [4, 4, 3]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_turn_pairs(interleaved: bool) -> None:
    angle = torch.rand(5, 3, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    out = rotated(x, angle.cos(), angle.sin(), interleaved)
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
    turned = torch.complex(x[:, first], x[:, second]) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(out[:, first], turned.real)
    assert torch.allclose(out[:, second], turned.imag)
    assert torch.equal(out[:, 6:], x[:, 6:])


def test_the_operators_hold_what_pytorch_asks_of_operators() -> None:
    mask, ids = torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    x, pasts = [t.float() for t in _heads(2, 2)], [torch.randn(2, 2, 3, 8)] * 2
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(positions._opoverload, (mask, ids), test_utils=checks)
    torch.library.opcheck(newest._opoverload, (torch.randn(2, 2, 4), mask), test_utils=checks)
    torch.library.opcheck(cached_attention._opoverload, (*x, *pasts, mask, None, None, 0.3, 0, 0.0, False), test_utils=checks)
