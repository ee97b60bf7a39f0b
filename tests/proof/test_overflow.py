"""What float64 says where a model's own dtype had no number."""

from __future__ import annotations

import torch

from normfuse.proof.overflow import in_range

NAN, INF = float("nan"), float("inf")


def test_only_where_the_result_has_a_number_and_the_model_has_none() -> None:
    model = torch.tensor([1.0, NAN, INF, NAN, -INF], dtype=torch.float16)
    result = torch.tensor([9.0, 2.0, NAN, 3.0, 4.0], dtype=torch.float16)
    exact = torch.tensor([1.0, 2.5, 5.0, NAN, 7e9], dtype=torch.float64)
    (got,) = in_range([model], [result], [exact])
    torch.testing.assert_close(got, torch.tensor([1.0, 2.5, INF, NAN, INF], dtype=torch.float16), equal_nan=True)


def test_what_is_not_alike_stays() -> None:
    whole, half = torch.tensor([1, 2]), torch.tensor([INF])
    for expected, found, exact in (
        ([whole], [whole], [whole]),
        ([half], [half[:0]], [half.double()]),
        ([half], [], []),
        ([torch.ones(2)], [torch.zeros(2)], [torch.full((2,), 3.0)]),
    ):
        assert all(a is b for a, b in zip(expected, in_range(expected, found, exact), strict=True))
