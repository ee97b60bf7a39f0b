"""Pieces of chains by themselves: functions that a step takes, what a code is worth, weights in pairs, units of codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normfuse
from normfuse import native
from normfuse.capture.capture import capture
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Conv
from normfuse.passes.quantize.layers.conv2d import Conv2d, read_conv2d
from normfuse.passes.quantize.reach import Reach, reaches
from normfuse.passes.quantize.shiftquant.chains import weights
from normfuse.passes.quantize.shiftquant.chains.functions import Bounds, bounds, is_function
from normfuse.passes.quantize.shiftquant.chains.ranges import Extent, Range, extents
from normfuse.passes.quantize.shiftquant.chains.weights import Integers, floats

aten = torch.ops.aten


# -- functions ---------------------------------------------------------------------------------------------------------


def _call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """The operator on an input; "size" stands for a number that is known when the model runs."""
    graph = fx.Graph()
    x, size = graph.placeholder("x"), graph.placeholder("size")
    return graph.call_function(target, (x, *(size if a == "size" else a for a in args)), kwargs)


@pytest.mark.parametrize(
    ("node", "found"),
    [
        (_call(aten.relu.default), Bounds(0.0, None)),
        (_call(aten.relu6.default), Bounds(0.0, 6.0)),
        (_call(aten.hardtanh.default), Bounds(-1.0, 1.0)),
        (_call(aten.hardtanh.default, 0, max_val=6), Bounds(0.0, 6.0)),
        (_call(aten.clamp.default, 0.5), Bounds(0.5, None)),
        (_call(aten.clamp.default, max=2), Bounds(None, 2.0)),
        (_call(aten.clamp.default, None, 3.0), Bounds(None, 3.0)),
        (_call(aten.clamp.default, "size"), None),
        (_call(aten.sigmoid.default), None),
    ],
)
def test_bounds(node: fx.Node, found: Bounds | None) -> None:
    assert bounds(node) == found


def test_one_bound_is_a_bound() -> None:
    assert Bounds().none
    assert not Bounds(0.0).none
    assert not Bounds(high=6.0).none


def test_functions_of_one_value() -> None:
    assert is_function(_call(aten.leaky_relu.default, 0.1))
    assert not is_function(_call(aten.leaky_relu.default, "size"))
    assert not is_function(_call(aten.exp.default))


# -- ranges ------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.log()


def _two() -> tuple[Graph, list[fx.Node]]:
    graph = Graph.of(capture(Two().eval(), (torch.rand(3, 4),), None).gm)
    return graph, list(graph.fx.find_nodes(op="call_function", target=aten.mul.Tensor)) + list(
        graph.fx.find_nodes(op="call_function", target=aten.log.default)
    )


def test_how_far_values_reach() -> None:
    graph, (twice, log) = _two()
    inf = float("inf")
    some, more, none = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]]), torch.zeros(0, 4)
    found = reaches(graph, [[some], [more], [none]], [twice, log])
    assert found[twice] == Reach(-4.0, 6.0)
    assert not found[log].finite  # of −2
    assert not found[log].known
    assert reaches(graph, [[none]], [twice])[twice] == Reach(inf, -inf)
    assert not reaches(graph, [[none]], [twice])[twice].known
    assert reaches(graph, [[torch.tensor([[0.0, 1.0]])]], [log])[log].finite is False  # −Inf is its least
    assert reaches(graph, [[torch.tensor([[inf, 1.0]])]], [log])[log].finite is False  # Inf its largest
    assert reaches(graph, [], [twice]) == {}


def test_ranges_need_data_that_are_numbers() -> None:
    graph, nodes = _two()
    with pytest.raises(Refuse, match="need calibration data"):
        extents(graph, [], nodes)
    with pytest.raises(Refuse, match="NaN or Inf"):
        extents(graph, [[-torch.ones(1, 4)]], nodes)
    found = extents(graph, [[torch.zeros(0, 4)]], nodes[:1])[nodes[0]]
    assert (found.low, found.high, int(found.counts.sum())) == (0.0, 0.0, 0)


def test_merged_ranges_keep_what_they_counted() -> None:
    counts = torch.zeros(2048, dtype=torch.float64)
    one = Extent(0.0, 1.0, counts.index_fill(0, torch.tensor([0, 2047]), 3.0))
    wide = Extent(-1.0, 1.0, counts.index_fill(0, torch.tensor([5]), 2.0))
    both = one.merged(wide)
    assert (both.low, both.high) == (-1.0, 1.0)
    assert {int(i): float(both.counts[i]) for i in both.counts.nonzero()} == {5: 2.0, 1024: 3.0, 2047: 3.0}
    assert torch.equal(one.merged(Extent(0.0, 1.0, counts)).counts, one.counts)
    constant = Extent(2.0, 2.0, counts)
    assert torch.equal(constant.merged(constant).counts, counts)


# -- weights -----------------------------------------------------------------------------------------------------------


def _layer(inputs: int, outputs: int, kernel: Any, **options: Any) -> Conv2d:
    model = nn.Conv2d(inputs, outputs, kernel, **options).eval()
    graph = Graph.of(capture(model, (torch.randn(1, inputs, 9, 9),), None).gm)
    (node,) = graph.fx.find_nodes(op="call_function", target=aten.conv2d.default)
    op = graph.view(node, 2)
    assert isinstance(op, Conv)
    return read_conv2d(node, op, "", normfuse.ShiftQuant(activations="static", weight_bits=8))


@pytest.mark.parametrize(
    ("layer", "pairs"),
    [
        # rows are numbered by (row, column, channel); 0 stands beside the last of an odd number
        (lambda: _layer(3, 2, (1, 2)), [(1, 2), (3, 4), (5, 6)]),  # the whole row of a kernel
        (lambda: _layer(3, 2, (1, 2), dilation=(1, 2)), [(1, 2), (3, 0), (4, 5), (6, 0)]),  # whose columns lie apart
        (lambda: _layer(9, 2, (1, 1)), [(1, 2), (3, 4), (5, 6), (7, 8), (9, 0)]),
        (lambda: _layer(9, 2, (1, 2))
            , [(1, 2), (3, 4), (5, 6), (7, 8), (9, 0), (10, 11), (12, 13), (14, 15), (16, 17), (18, 0)]),  # too many channels
        (lambda: _layer(6, 2, (1, 2), groups=2), [(1, 2), (3, 0), (4, 5), (6, 0)]),
        (lambda: _layer(2, 2, (3, 2), groups=2), [(1, 3), (5, 0), (2, 4), (6, 0)]),  # depthwise: the rows of a column
        (lambda: _layer(1, 2, (3, 1)), [(1, 0), (2, 0), (3, 0)]),  # one channel, which all read
        (lambda: _layer(2, 4, (3, 1), groups=2), [(1, 0), (2, 0), (3, 0)]),  # two outputs a channel
    ],
)  # fmt: skip
def test_which_weights_are_multiplied_in_pairs(layer: Any, pairs: list[tuple[int, int]]) -> None:
    found = layer()
    columns = found.taps * found.channels
    rows = torch.arange(1, 1 + columns, dtype=torch.float64).expand(found.outputs, -1)
    assert [tuple(map(int, p)) for p in weights._pairs(found, rows)[0]] == pairs


@pytest.mark.parametrize(
    ("prefer", "there", "isa", "needed"),
    [
        ("speed", True, "avx2", True),
        ("size", True, "avx2", False),
        ("speed", False, "avx2", False),
        ("speed", True, "avx512", False),
    ],
)
def test_who_needs_pairs(prefer: Any, there: bool, isa: str, needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: there)
    monkeypatch.setattr(native, "isa", lambda: isa)
    assert weights._in_pairs(normfuse.ShiftQuant(prefer=prefer)) is needed


@pytest.mark.parametrize("bits", [4, 7])
def test_narrow_weights_are_within_pairs_anyway(bits: int) -> None:
    layer = _layer(8, 4, 3)
    codes = torch.full((4, 72), (1 << (bits - 1)) - 1, dtype=torch.int8)
    given = Integers(codes, torch.zeros(8, dtype=torch.uint8), torch.ones(4, dtype=torch.float64), bits)
    assert weights._paired(given, layer) is given


@pytest.mark.parametrize(
    ("bias", "reads"), [(torch.tensor([2e6, 0.0]), Range(1.0, 0, 255)), (None, Range(3e38, 0, 255))], ids=["bias", "scale"]
)
def test_what_does_not_fit_into_units_of_codes_is_refused(bias: Tensor | None, reads: Range) -> None:
    given = Integers(torch.ones(2, 4, dtype=torch.int8), torch.zeros(4), torch.full((2,), 10.0, dtype=torch.float64), 8)
    with pytest.raises(Refuse, match="a million times larger"):
        floats(given, bias, reads, Range(1.0, 0, 255), None)
    scale, offset, by = floats(given, None, Range(0.5, 3, 255), Range(2.0, 7, 255), Range(4.0, 1, 255))
    assert (scale.tolist(), offset.tolist(), by) == ([2.5, 2.5], [5.0, 5.0], 2.0)
