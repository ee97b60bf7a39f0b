"""A quantization in words: what `quantize=` and `--quantize` take, and one clear line a mistake."""

import typing

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant
from normfuse.errors import UsageError
from normfuse.quant.words import Widths, parse_quantize, scheme_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("w4a8", ShiftQuant(), id="widths"),
        pytest.param("w6", ShiftQuant(weight_bits=6), id="weights"),
        pytest.param("w8a8,static,groups=1", ShiftQuant(weight_bits=8, activations="static", groups=1), id="words and numbers"),
        pytest.param(
            " w4a8 , gptq, percentile=99.5 ,migration=off",
            ShiftQuant(rounding="gptq", percentile=99.5, migration=False),
            id="blanks",
        ),
        pytest.param("w4a8,embedding_bits=none,size_budget=0.2", ShiftQuant(embedding_bits=None, size_budget=0.2), id="none"),
        pytest.param("prefer=size", ShiftQuant(prefer="size"), id="no widths"),
    ],
)
def test_specification(text: str, expected: ShiftQuant) -> None:
    assert parse_quantize(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("w9a8", r"weight_bits=9.*from 2 to 8", id="too wide"),
        pytest.param("int8", r"'int8' is not understood.*e\.g\. w4a8", id="another notation"),
        pytest.param("w4a8,sttic", r"did you mean 'static'", id="misspelt word"),
        pytest.param("w4a8,group=2", r"has no 'group'.*did you mean 'groups'", id="misspelt name"),
        pytest.param("w4a8,groups=two", r"groups=two: expected a number", id="no number"),
        pytest.param("w4a8,migration=maybe", r"expected true or false", id="no bool"),
        pytest.param("w4a8,keep=head", r"set it with keep= of", id="keep"),
        pytest.param("w4a8,observer=best", r"expected one of 'minmax'", id="no such value"),
    ],
)
def test_specifications_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_quantize(text)


@pytest.mark.parametrize("text", ["w4a8,prefer=size", "w8a8,prefer=size"])
def test_words_in_python_are_the_specification(text: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(32, 64)
    worded, specified = (normfuse.optimize(model, (x,), quantize=q) for q in (text, parse_quantize(text)))
    assert [(e.path, e.weight_bits) for e in normfuse.report(worded).quantization] == [
        (e.path, e.weight_bits) for e in normfuse.report(specified).quantization
    ]
    with torch.no_grad():
        assert torch.equal(worded(x), specified(x))


def test_typed_words_are_understood() -> None:
    for text in typing.get_args(Widths):
        spec = scheme_of(text)
        assert isinstance(spec, ShiftQuant)
        assert (f"w{spec.weight_bits}a{spec.activation_bits}", spec.activations == "static") == (text[:4], text.endswith("static"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("w4b8", r"quantize='w4b8'.*did you mean 'w4a8'"),
        ("int4", r"did you mean w4a8"),
        ("w44", r"weight_bits=44.*2 to 8"),
        ("", r"'' is not understood"),
        (ShiftQuant, r"ShiftQuant without \(\)"),
        (4, r"quantize=4: expected a normfuse\.ShiftQuant.*or its words"),
    ],
)
def test_what_is_no_quantization_is_one_line(given: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        normfuse.optimize(nn.Linear(4, 4), (torch.ones(1, 4),), quantize=given)
    assert "\n" not in str(e.value)


def test_words_are_typed_as_the_passes_are() -> None:
    assert set(typing.get_args(normfuse.passes.PassName)) == {"default", *normfuse.passes.PASSES}
