"""`ShiftQuant` is a value, and a wrong one says what is wrong with it."""

import dataclasses

import pytest

from normfuse.errors import UsageError
from normfuse.quant import ShiftQuant


def test_equal_specifications_are_equal_and_hash_alike() -> None:
    a = ShiftQuant(overrides={"head*": {"weight_bits": 8, "groups": 1}}, keep=["norm"])
    b = ShiftQuant(overrides=[("head*", {"groups": 1, "weight_bits": 8})], keep=("norm",))
    assert a == b
    assert hash(a) == hash(b)
    assert a != ShiftQuant()
    assert eval(repr(a), {"ShiftQuant": ShiftQuant}) == a


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShiftQuant().weight_bits = 8  # type: ignore[misc]


def test_later_overrides_win() -> None:
    spec = ShiftQuant(overrides={"blocks.*": {"weight_bits": 6, "groups": 2}, "*.fc2": {"weight_bits": 8}})
    assert spec.at("blocks.0.fc1") == dataclasses.replace(spec, overrides=(), weight_bits=6, groups=2)
    assert spec.at("blocks.0.fc2").weight_bits == 8
    assert spec.at("blocks.0.fc2").groups == 2
    assert spec.at("head") is spec


def test_keep_is_matched_by_pattern() -> None:
    spec = ShiftQuant(keep="head*")
    assert spec.kept("head.fc") == "head*"
    assert spec.kept("blocks.0.head") is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        pytest.param({"weight_bits": 1}, "weight_bits=1.*from 2 to 8", id="one bit"),
        pytest.param({"weight_bits": 9}, "from 2 to 8", id="nine bits"),
        pytest.param({"weight_bits": 4.0}, "integer", id="a float"),
        pytest.param({"activation_bits": True}, "integer", id="a bool"),
        pytest.param({"groups": 0}, "groups=0", id="no group"),
        pytest.param({"group_size": 0}, "group_size=0", id="empty groups"),
        pytest.param({"activations": "dynamc"}, "did you mean 'dynamic'", id="misspelt"),
        pytest.param({"rounding": "up"}, "nearest", id="unknown rounding"),
        pytest.param({"percentile": float("nan")}, "percentile", id="nan"),
        pytest.param({"percentile": 101}, "at most 100", id="more than all"),
        pytest.param({"size_budget": 0}, "above 0", id="nothing left"),
        pytest.param({"sqnr_budget": -3}, "above 0", id="negative decibels"),
        pytest.param({"migration": 1}, "True or False", id="no bool"),
        pytest.param({"embedding_bits": 16}, "embedding_bits=16", id="wide table"),
        pytest.param({"keep": 3}, "patterns of module paths", id="keep a number"),
        pytest.param({"keep": ("a", 3)}, "patterns of module paths", id="keep among them a number"),
        pytest.param(
            {"overrides": {"head": {"weight_bit": 4}}}, "'weight_bit' cannot be set.*mean 'weight_bits'", id="unknown field"
        ),
        pytest.param({"overrides": {"head": {"weight_bits": 99}}}, r"overrides\['head'\].*from 2 to 8", id="wrong override"),
        pytest.param({"overrides": {"head": 4}}, "pattern: {field: value}", id="override is no mapping"),
        pytest.param({"overrides": 3}, "pattern: {field: value}", id="overrides is a number"),
        pytest.param({"seed": -1}, "seed=-1", id="negative seed"),
    ],
)
def test_wrong_values_say_so(values: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ShiftQuant(**values)
