"""`--dynamic`: how axes are written, where they are, and how far a model lets them go."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.app.dynamic_axes import Axis, free_axes, parse_axes
from normfuse.app.found_axes import found_shapes
from normfuse.errors import UsageError

# -- how they are written ------------------------------------------------------------------------------------------------


def test_axes_are_read() -> None:
    def read(text: str) -> tuple[object, ...]:
        (a,) = parse_axes([text])
        return a.input, a.axis, a.name, a.min, a.max

    assert read("batch") == (None, None, "batch", None, None)
    assert read("seq..512") == (None, None, "seq", None, 512)
    assert read("height:32..512") == (None, None, "height", 32, 512)
    assert read("tokens:1") == ("tokens", 1, "tokens_1", None, None)
    assert read("tokens:1=seq") == ("tokens", 1, "seq", None, None)
    assert read("tokens:1=seq..512") == ("tokens", 1, "seq", None, 512)
    assert read("tokens:1=seq:8..512") == ("tokens", 1, "seq", 8, 512)
    assert read("tokens:1=seq:8..") == ("tokens", 1, "seq", 8, None)
    assert read("tokens:1=8..512") == ("tokens", 1, "tokens_1", 8, 512)
    assert read("x:-1=height2..64") == ("x", -1, "height2", None, 64)
    assert read("images.1:2=h") == ("images.1", 2, "h", None, None)


def test_one_range_holds_for_all_axes_of_a_name() -> None:
    a, b, c = parse_axes(["tokens:1=seq..512,mask:1=seq", "batch"])
    assert (a.max, b.max, c.max) == (512, 512, None)
    assert [x.name for x in (a, b, c)] == ["seq", "seq", "batch"]


def test_what_is_said_twice_counts_once() -> None:
    assert parse_axes(["batch", "batch, height"]) == (Axis("batch", text="batch"), Axis("height", text="height"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("time", "not known; known: batch, seq, height, width; INPUT:AXIS=time", id="unknown name"),
        pytest.param("tokens:1=2seq", "'2seq' cannot be the name", id="no identifier"),
        pytest.param("tokens:1=class", "'class' cannot be the name", id="keyword"),
        pytest.param("tokens:1=a b", "'a b' cannot be the name", id="two words"),
        pytest.param("tokens:one=seq", "names no axis", id="axis in words"),
        pytest.param("tokens:1=seq:8", "no name with a range", id="smallest alone"),
        pytest.param("tokens:1=seq..", "no name with a range", id="empty range"),
        pytest.param("tokens:1=seq..many", "no name with a range", id="no number"),
        pytest.param("tokens:1=", "cannot be the name", id="nothing"),
        pytest.param("tokens:1=seq:9..4", "leaves nothing to vary", id="backwards"),
        pytest.param("seq..1", "leaves nothing to vary", id="one size"),
        pytest.param(f"seq..{10**25}", "no axis is as long", id="huge"),
        pytest.param("x:0=n..4,y:0=n..5", "n has two ranges, x:0=n..4 and y:0=n..5", id="two ranges"),
        pytest.param("x:0=n,x:0=m", "x:0 has two names, n and m", id="two names"),
    ],
)
def test_axes_that_cannot_be_read_are_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_axes([text])
    assert message in str(e.value)


# -- where they are ------------------------------------------------------------------------------------------------------


def places(text: str, *args: object, **kwargs: object) -> dict[str, dict[int, str]]:
    def forward(image: object, ids: object = None, *rest: object, flag: bool = False) -> None: ...

    found = free_axes(parse_axes([text]), forward, args, kwargs)
    return {name: {n: a.name for n, a in axes.items()} for name, axes in found.axes.items()}


IMAGE, IDS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, dtype=torch.int64)


def test_axes_that_inputs_are_known_to_have() -> None:
    found = places("batch,seq,height", IMAGE, ids=IDS, flag=False)
    assert found == {"image": {0: "batch", 2: "height"}, "ids": {0: "batch", 1: "seq"}}


def test_a_named_axis_keeps_its_name_beside_a_known_one() -> None:
    assert places("batch,image:0=n,ids:-1=t", IMAGE, IDS) == {"image": {0: "n"}, "ids": {0: "batch", 1: "t"}}


def test_axes_inside_of_lists_and_of_further_inputs() -> None:
    found = places("image.1:2=h,rest.0:0=n", [IMAGE, IMAGE], None, IDS)
    assert found == {"image.1": {2: "h"}, "rest.0": {0: "n"}}


def test_shapes_have_the_structure_of_the_inputs() -> None:
    def forward(images: object, state: object) -> None: ...

    free = free_axes(parse_axes(["images.1:2=h"]), forward, ([IMAGE, IMAGE], {"a": IDS}), {})
    assert free.shapes(lambda *at: at[2].name) == {"images": [None, {2: "h"}], "state": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("seq", "no input has such an axis; INPUT:AXIS=seq names one (inputs: image (2x3x8x8))", id="no such axis"),
        pytest.param("x:0=n", "x is no input; the inputs are image (2x3x8x8)", id="no such input"),
        pytest.param("flag:0=n", "flag is a bool and no tensor", id="a flag"),
        pytest.param("image:4=n", "image has 4 axes, 2x3x8x8, and none with number 4", id="no such number"),
        pytest.param("image:-5=n", "none with number -5", id="no such number from the end"),
        pytest.param("height..4", "size 8, which is outside of that range", id="example above the range"),
        pytest.param("height:9..12", "size 8, which is outside of that range", id="example below the range"),
        pytest.param("image:1=n,image:2=n", "axes of one name have one size", id="two sizes of one name"),
    ],
)
def test_axes_that_are_not_there_are_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        places(text, IMAGE, flag=True)
    assert message in str(e.value)


def test_example_of_size_one_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UsageError, match="size 1, which would be taken for fixed; give an example"):
        places("batch", torch.zeros(1, 3, 8, 8))


# -- how far they go -----------------------------------------------------------------------------------------------------


class Text(nn.Module):
    """Positions up to 32; the mask has the sizes of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.positions = nn.Parameter(torch.randn(1, 32, 8))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[:, : tokens.shape[1]]
        return torch.mul(self.norm(x), mask[..., None])


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 6:
            raise ValueError("six, please")
        return x.sum(2)


TEXT = {"tokens": torch.randint(0, 20, (2, 7)), "mask": torch.ones(2, 7)}


def sizes(model: nn.Module, example: Any, text: str) -> list[list[object]]:
    """Names or sizes of the axes of each input, of a model that was optimized with the ranges found."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    shapes = found_shapes(model.eval(), example, free_axes(parse_axes([text]), model.forward, args, kwargs))
    gm = normfuse.optimize(model, example, dynamic_shapes=shapes, passes=["cleanup"], verify="off")
    vals = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    return [
        [getattr((shapes[name] or {}).get(i), "__name__", size) for i, size in enumerate(val.shape)]
        for name, val in zip(shapes, vals, strict=True)
    ]


def test_limits_of_the_model_are_found() -> None:
    free = free_axes(parse_axes(["tokens:1=seq,mask:1=seq,batch"]), Text().forward, (), TEXT)
    shapes = found_shapes(Text().eval(), TEXT, free)
    seq = shapes["tokens"][1]
    assert (seq.__name__, seq.max) == ("seq", 32)
    assert shapes["mask"][1] is seq
    assert sizes(Text(), TEXT, "tokens:1=seq,mask:1=seq,batch") == [["batch", "seq"], ["batch", "seq"]]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(nn.Conv2d(3, 4, 3), id="an unpadded convolution"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2)), id="strides"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3)), id="resizing"),
    ],
)
def test_image_sizes_vary_where_no_plain_range_says_how(model: nn.Module) -> None:
    assert sizes(model, (torch.randn(2, 3, 20, 20),), "batch,height,width") == [["batch", 3, "height", "width"]]


def test_smaller_than_asked_is_an_error_that_says_what_to_write() -> None:
    free = free_axes(parse_axes(["tokens:1=seq..512,mask:1=seq"]), Text().forward, (), TEXT)
    with pytest.raises(UsageError, match=r"2 to 32 there; write --dynamic tokens:1=seq\.\.32"):
        found_shapes(Text().eval(), TEXT, free)


@pytest.mark.parametrize(
    ("model", "example", "text", "words"),
    [
        pytest.param(Fixed(), torch.randn(2, 6, 4), "seq", ("x at 6", "Fixed.forward (test_dynamic_axes.py:"), id="check"),
        pytest.param(nn.Unflatten(0, (2, 3)), torch.randn(6, 4), "input:0=t", ("at 6", "Unflatten.forward (flat"), id="layer"),
    ],
)
def test_an_axis_that_the_model_fixes_is_an_error_that_names_the_line(
    model: nn.Module, example: Tensor, text: str, words: tuple[str, ...]
) -> None:
    free = free_axes(parse_axes([text]), model.forward, (example,), {})
    with pytest.raises(UsageError) as e:
        found_shapes(model.eval(), (example,), free)
    assert all(word in str(e.value) for word in words), str(e.value)
