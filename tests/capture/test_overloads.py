"""Arguments go where PyTorch's own parser puts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from normfuse.capture.symbolic.overloads import resolve

aten = torch.ops.aten
X: Any = fx.Graph().placeholder("x")


def bound(name: str, *args: Any, method: bool = False, **kwargs: Any) -> Any:
    return resolve(name, args, kwargs, lambda _: "tensor", method=method)


@pytest.mark.parametrize(
    ("name", "args", "method", "expected"),
    [
        pytest.param(
            "avg_pool2d", (X, 3, 2), False, (aten.avg_pool2d.default, (X, [3, 3], [2, 2]), {}), id="one number for two sizes"
        ),
        pytest.param("avg_pool2d", (X, 3, 2, 1), False, (aten.avg_pool2d.default, (X, [3, 3], [2, 2], [1, 1]), {}), id="three"),
        pytest.param("avg_pool2d", (X, (3, 2)), False, (aten.avg_pool2d.default, (X, [3, 2]), {}), id="a list"),
        pytest.param("roll", (X, 1, 0), True, (aten.roll.default, (X, [1], [0]), {}), id="two lists"),
        pytest.param("permute", (X, 1, 0), True, (aten.permute.default, (X, [1, 0]), {}), id="one by one"),
        pytest.param("view", (X, 6), True, (aten.view.default, (X, [6]), {}), id="one alone"),
        pytest.param("squeeze", (X, 1), True, (aten.squeeze.dim, (X, 1), {}), id="a number is preferred to a list"),
        pytest.param("squeeze", (X, 0, 1), True, (aten.squeeze.dims, (X, [0, 1]), {}), id="squeeze, one by one"),
        pytest.param("sum", (X, 1), True, (aten.sum.dim_IntList, (X, [1]), {}), id="dim"),
        pytest.param("std", (X, -1), True, (aten.std.dim, (X, [-1]), {}), id="std"),
        pytest.param("permute", (X, 1, 0), False, None, id="functions take lists as such"),
        pytest.param("sum", (X, 1, 2), True, None, id="a list that is not all a method takes"),
        pytest.param("max_pool2d", (X, "3"), False, None, id="text"),
    ],
)
def test_arguments(name: str, args: tuple[Any, ...], method: bool, expected: Any) -> None:
    assert bound(name, *args, method=method) == expected


def test_a_number_of_unknown_kind_alone_may_be_a_list() -> None:
    n: Any = fx.Graph().placeholder("n")
    kinds = {X: "tensor", n: None}
    assert resolve("view", (X, n), {}, kinds.__getitem__, method=True) is None
    assert resolve("view", (X, n, n), {}, kinds.__getitem__, method=True) == (aten.view.default, (X, [n, n]), {})
