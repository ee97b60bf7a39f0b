"""Sizes that an engine is made for: what is stated, what is made up, what is refused."""

from typing import Any

import pytest

from normfuse.errors import UsageError
from normfuse.export.tensorrt.profiles import InputSize, Profile, complete, parse_shapes

IMAGE = InputSize("x", ("batch", 3, 224, 224), (2, 3, 224, 224), {"batch": (1, 64)})


def test_three_shapes() -> None:
    found = parse_shapes(["x=1x3x224x224:8x3x224x224:64x3x224x224"])
    assert found == {"x": Profile((1, 3, 224, 224), (8, 3, 224, 224), (64, 3, 224, 224))}
    assert str(found["x"]) == "1x3x224x224:8x3x224x224:64x3x224x224"


def test_one_shape_is_all_three() -> None:
    assert parse_shapes(["a=4x8,b=2"]) == {"a": Profile((4, 8), (4, 8), (4, 8)), "b": Profile((2,), (2,), (2,))}


def test_a_name_with_an_equals_sign_and_dots() -> None:
    assert list(parse_shapes(["past.0=k=1x2:1x4:1x8"])) == ["past.0=k"]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"x": ((1, 8), (4, 8), (16, 8))}, id="tuples"),
        pytest.param({"x": "1x8:4x8:16x8"}, id="text"),
        pytest.param({"x": [[1, 8], [4, 8], [16, 8]]}, id="lists"),
        pytest.param({"x": Profile((1, 8), (4, 8), (16, 8))}, id="profile"),
    ],
)
def test_mappings(given: dict[str, Any]) -> None:
    assert parse_shapes(given) == {"x": Profile((1, 8), (4, 8), (16, 8))}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("1x8:4x8:16x8", "NAME=MIN:OPT:MAX", id="no-name"),
        pytest.param("x=1x8:4x8", "smallest, usual and largest", id="two"),
        pytest.param("x=4x8:1x8:16x8", "axis 0: expected min <= opt <= max, got 4, 1, 16", id="order"),
        pytest.param("x=1x8:4x8:16", "2, 2 and 1 axes", id="ranks"),
        pytest.param("x=1xq:4x8:16x8", "'1xq' is no shape", id="letters"),
        pytest.param("x=-1x8", "is no shape", id="negative"),
        pytest.param("x=1x8,x=2x8", "given twice", id="twice"),
    ],
)
def test_what_does_not_read(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_shapes([text])


def test_default_is_the_captured_range() -> None:
    assert complete([IMAGE], {}) == {"x": Profile((1, 3, 224, 224), (2, 3, 224, 224), (64, 3, 224, 224))}


def test_default_without_an_upper_bound() -> None:
    size = InputSize("ids", ("batch", "seq"), (2, 128), {"batch": (1, None), "seq": (1, 512)})
    assert complete([size], {}) == {"ids": Profile((1, 1), (2, 128), (16, 512))}


def test_fixed_inputs_need_no_profile() -> None:
    assert complete([InputSize("x", (4, 8), (4, 8))], {}) == {}
    assert complete([InputSize("x", (4, 8))], parse_shapes(["x=4x8"])) == {}


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        pytest.param("y=1x3x224x224", r"no input 'y'; its inputs are x \[batch, 3, 224, 224\]", id="name"),
        pytest.param("x=1x3x224", "has 4 axes, and .* has 3", id="rank"),
        pytest.param("x=1x3x192x224:2x3x224x224:4x3x224x224", "axis 2 .* is fixed at 224, got 192:224:224", id="fixed"),
        pytest.param("x=1x3x224x224:2x3x224x224:65x3x224x224", "captured for 1 to 64, got 1:2:65", id="range"),
    ],
)
def test_what_does_not_fit(stated: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        complete([IMAGE], parse_shapes([stated]))


def test_nothing_says_how_large() -> None:
    with pytest.raises(UsageError, match=r"no sizes for input x \[batch, 8\]: pass --shapes x=MIN:OPT:MAX, three shapes like 1x8"):
        complete([InputSize("x", ("batch", 8))], {})
