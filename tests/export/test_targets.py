from typing import get_args

import pytest
import torch
from torch import nn

from normfuse.errors import UsageError
from normfuse.export.targets import TARGETS, TargetName, opset_for, target_named
from tests.export.models import attention, exported


def test_every_target_has_a_default_opset_that_it_takes():
    for target in TARGETS.values():
        assert opset_for(target, None) == target.opset
        assert target.attention_at(target.opset)[0] == "decomposed"


def test_type_checkers_know_every_target():
    assert set(get_args(TargetName)) == set(TARGETS)


def test_a_misspelt_target_names_the_closest():
    with pytest.raises(UsageError, match=r"unknown target 'onnxruntme'; did you mean 'onnxruntime'\?"):
        target_named("onnxruntme")


@pytest.mark.parametrize("opset", [16, 24, True, "20"])
def test_an_opset_that_torch_cannot_write_is_refused(opset):
    with pytest.raises(UsageError, match="expected an integer from 17 to 23"):
        opset_for(TARGETS["portable"], opset)


@pytest.mark.parametrize(
    ("target", "opset", "form", "reason"),
    [
        pytest.param("portable", None, "mha", "does not have", id="contrib"),
        pytest.param("tensorrt", None, "qkv", "does not have", id="tensorrt"),
        pytest.param("onnxruntime", 20, "attention23", "needs opset 23", id="old opset"),
        pytest.param("onnxruntime", None, "flash", "expected auto, decomposed", id="unknown"),
    ],
)
def test_a_form_of_attention_that_does_not_exist_there_is_refused(tmp_path, target, opset, form, reason):
    with pytest.raises(UsageError, match=reason):
        exported(attention(), (torch.randn(2, 5, 32),), tmp_path, target=target, opset=opset, attention=form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", [17, 18, 20, 23])
def test_every_target_and_opset(tmp_path, target, opset):
    model = nn.Sequential(attention(), nn.RMSNorm(32), nn.GELU(), nn.Linear(32, 4)).eval()
    result = exported(model, (torch.randn(2, 5, 32),), tmp_path, target=target, opset=opset)
    assert result.opset == opset
    assert result.error is not None
    assert result.error.max_rel < 1e-5
    assert ("RMSNormalization" in result.ops) == (opset >= 23)
    assert ("Gelu" in result.ops) == (opset >= 20)
    assert target == "onnxruntime" or not any(op.startswith("com.microsoft") for op in result.ops)
