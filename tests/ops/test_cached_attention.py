"""`cached_attention`: its kernel against its definition in float64, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.ops import OPERATORS

ATTEND = getattr(torch.ops.normfuse, OPERATORS["cached_attention"].name)


@dataclass(frozen=True)
class Case:
    """Sizes of a call, and how it is made; `pads`: of each row, zeros in front of its mask, or as many behind it if negative."""

    heads: int = 4
    kv: int = 2
    width: int = 8
    past: int = 5
    new: int = 3
    room: int = 0  # of a shared buffer; 0: as long as the past
    pads: tuple[int, ...] = (0,)
    pairs: int = 0
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """What `cached_attention` takes, in float32."""
        g = torch.Generator().manual_seed(seed)
        rows, total = len(self.pads), self.past + self.new
        mask = torch.ones(rows, total, dtype=torch.int64)
        for row, pad in zip(mask, self.pads, strict=True):
            row[slice(0, pad) if pad >= 0 else slice(total + pad, total)] = 0
        size = rows, self.kv, max(self.room, self.past), self.width
        x = [torch.randn(rows, self.new, n * self.width, generator=g) for n in (self.heads, self.kv, self.kv)]
        pasts = [torch.randn(size, generator=g) for _ in range(2)]
        angle = torch.rand(max(total, 1), self.pairs, generator=g)
        turn = (angle.cos(), angle.sin()) if self.pairs else (None, None)
        return (*x, *pasts, mask, *turn, 0.4, self.window, self.softcap, self.interleaved)


SAMPLES = {"cached_attention": Case(past=3, new=2, pads=(0, 1), pairs=3, window=4, softcap=5.0).arguments()}

CASES = [
    pytest.param(Case(), id="grouped"),
    pytest.param(Case(past=0, new=7), id="prompt"),
    pytest.param(Case(past=0, new=40, heads=6, kv=2, width=16, pads=(0, 3, -4), pairs=8), id="padded prompts"),
    pytest.param(Case(past=0, new=40, heads=6, kv=2, width=16, pads=(5, 5), window=9, softcap=2.0), id="window and cap, prompt"),
    pytest.param(Case(new=1, pads=(0, 2, 6, -1), room=9), id="one token, a shared buffer"),
    pytest.param(Case(past=1400, new=1, heads=9, kv=3, width=64, pads=(0, 700), pairs=32, room=1500), id="long"),
    pytest.param(Case(past=700, new=2, heads=3, kv=1, width=33, pads=(0, 100), window=90), id="long, within a window"),
    pytest.param(Case(past=30, new=1, heads=7, kv=1, width=24, pairs=9, softcap=3.0), id="seven share, partly turned"),
    pytest.param(
        Case(past=90, new=30, heads=2, kv=2, width=32, pads=(0, 7), pairs=16, interleaved=True), id="chunk, pairs together"
    ),
    pytest.param(Case(heads=1, kv=1, width=1, past=0, new=1), id="smallest"),
    pytest.param(Case(heads=40, kv=2, width=16, past=20, new=1), id="twenty share"),
]


def _wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_the_definition(case: Case) -> None:
    given = case.arguments()
    for found, wanted in zip(ATTEND(*given), ATTEND(*_wide(given)), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_rows_may_be_hidden_in_the_middle() -> None:
    """Of a batch padded on the left a later chunk may be padded too."""
    for new in (1, 30):
        given = list(Case(past=40, new=new, pads=(3, 0), width=16).arguments())
        given[5][0, 20:24] = 0
        for found, wanted in zip(ATTEND(*given), ATTEND(*_wide(tuple(given))), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_without_padding_it_is_attention() -> None:
    given = Case(past=0, new=9, width=16).arguments()
    heads = [x.unflatten(2, (-1, 16)).transpose(1, 2) for x in given[:3]]
    wanted = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True, scale=0.4).transpose(1, 2).flatten(2)
    y, key, value = ATTEND(*given)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(key, heads[1])
    assert torch.equal(value, heads[2])


@pytest.mark.parametrize("room", [pytest.param(0, id="growing"), pytest.param(40, id="one buffer")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_what_each_is_alone(room: int, side: str) -> None:
    """Prompts of 3, 9 and 6 tokens, then four steps: ragged batches."""
    case, lengths, steps = Case(past=0, new=9, width=16, pairs=8, room=room, pads=(0, 0, 0)), (3, 9, 6), 4
    prompt, angle = case.arguments(), torch.rand(40, 8, generator=torch.Generator().manual_seed(1))
    angle = torch.arange(40)[:, None] * angle[:1]  # by relative positions
    more = [replace(case, new=1).arguments(7 + i)[:3] for i in range(steps)]
    rest = (angle.cos(), angle.sin(), 0.4, 0, 0.0, False)

    def run(x: tuple[Tensor, ...], mask: Tensor, rows: slice) -> list[Tensor]:
        pasts = [p[rows] for p in prompt[3:5]]
        out, *pasts = ATTEND(*x, *pasts, mask, *rest)
        found = [out]
        for step in more:
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.int64)], 1)
            out, *pasts = ATTEND(*(s[rows] for s in step), *pasts, mask, *rest)
            found.append(out)
        return found

    places = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
    mask = torch.zeros(3, 9, dtype=torch.int64)
    for row, place in zip(mask, places, strict=True):
        row[place] = 1
    together = run(prompt[:3], mask, slice(None))
    for i, (place, n) in enumerate(zip(places, lengths, strict=True)):
        own = tuple(x[i : i + 1, place] for x in prompt[:3])
        first, *then = run(own, torch.ones(1, n, dtype=torch.int64), slice(i, i + 1))
        torch.testing.assert_close(together[0][i : i + 1, place], first, rtol=1e-4, atol=1e-5)
        for a, b in zip(together[1:], then, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-5)


def test_what_nobody_sees_is_not_read() -> None:
    given = Case(past=5, new=1, room=20, pads=(2,)).arguments()
    given[3][:, :, 6:], given[4][:, :, 6:] = torch.nan, torch.nan
    given[3][:, :, :2], given[4][:, :, :2] = torch.nan, torch.nan
    assert ATTEND(*given)[0].isfinite().all()


def test_a_token_that_sees_nothing_gives_zero() -> None:
    for new in (4, 40):
        given = Case(past=0, new=new, pads=(2,)).arguments()
        y = ATTEND(*given)[0]
        assert not y[:, :2].any()
        assert y[:, 2:].any(-1).all()
        assert torch.equal(ATTEND(*_wide(given))[0][:, :2], y[:, :2].double())


def test_nan_reaches_who_sees_it() -> None:
    given = Case(past=300, new=1, heads=2, kv=2).arguments()
    given[3][0, 0, 100, 0] = torch.nan
    y = ATTEND(*given)[0].unflatten(2, (2, 8))
    assert y[0, 0, 0].isnan().all()
    assert y[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_keep_their_dtype(dtype: torch.dtype) -> None:
    given = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in Case(pairs=4).arguments())
    for found, wanted in zip(ATTEND(*given), ATTEND(*_wide(given)), strict=True):
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("place", "wrong", "word"),
    [
        pytest.param(0, torch.randn(1, 3, 24), "query", id="heads"),
        pytest.param(1, torch.randn(1, 2, 16), "key", id="tokens"),
        pytest.param(4, torch.randn(1, 2, 6, 8), "past_value", id="values"),
        pytest.param(5, torch.ones(2, 8, dtype=torch.int64), "attention_mask", id="rows"),
        pytest.param(5, torch.ones(1, 8), "int64", id="mask of floats"),
        pytest.param(6, torch.randn(8, 4), "without the other", id="one table"),
        pytest.param(9, -1, "window=-1", id="window"),
        pytest.param(10, -1.0, "softcap=-1.0", id="cap"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(place: int, wrong: Any, word: str) -> None:
    given = list(Case().arguments())
    given[place] = wrong
    with pytest.raises(UsageError, match=word):
        ATTEND(*given)


def test_a_mask_or_tables_that_are_too_short_are_refused() -> None:
    given = list(Case(pairs=4).arguments())
    with pytest.raises(Exception, match="positions"):
        ATTEND(*given[:6], *(t[:7] for t in given[6:8]), *given[8:])
    with pytest.raises(Exception, match="fewer slots"):
        ATTEND(*given[:5], given[5][:, :2], *given[6:])
