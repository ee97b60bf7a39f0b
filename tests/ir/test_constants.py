"""Constants are exact, lazy and cast once."""

import torch

from normfuse.ir.constants import Constant


def test_an_original_tensor_comes_back_bit_for_bit():
    weight = torch.randn(3, 3).to(torch.bfloat16)
    assert Constant.of(weight, "w").native.data_ptr() == weight.data_ptr()


def test_arithmetic_is_float64_and_rounds_once():
    torch.manual_seed(0)
    weight, scale = torch.randn(300, 300).to(torch.float16), torch.rand(300).to(torch.float16)
    found = (Constant.of(weight, "w") * Constant.of(scale, "s")[:, None] / 3.0).native
    expected = (weight.double() * scale.double()[:, None] / 3.0).to(torch.float16)
    assert torch.equal(found, expected)


def test_large_constants_wait_until_they_are_asked_for():
    calls = []

    def count(value):
        calls.append(value.device.type)
        return value * 2

    large = Constant.apply(count, Constant.of(torch.ones(512, 512), "w"))
    assert large.shape == (512, 512)
    assert "cpu" not in calls  # the shape is known without data
    assert torch.equal(large.value, torch.full((512, 512), 2.0, dtype=torch.float64))


def test_a_vector_made_from_a_large_weight_is_kept():
    bias = Constant.of(torch.ones(512, 512), "layer.weight") @ Constant.of(torch.ones(512), "t")
    assert bias.value is bias.value
    assert bias.name == "layer.weight"


def test_functions_and_integers_keep_their_kind():
    assert torch.equal(Constant.of(torch.tensor([4.0])).rsqrt().value, torch.tensor([0.5], dtype=torch.float64))
    index = Constant.of(torch.arange(4))
    assert (index + 1).value.dtype == torch.int64
