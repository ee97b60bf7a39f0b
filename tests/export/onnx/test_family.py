"""The norm family in ONNX files: what is folded is gone from the file, what stays runs in ONNX Runtime."""

import pytest
import torch

import normfuse
from normfuse.export import to_onnx
from normfuse.export.onnx.inspect import norm_counts, op_counts
from tests.zoo_family import FAMILY

pytestmark = pytest.mark.slow

# normalization operators that stay in the file; every other entry has none
LEFT = {
    "power_vit": {"RMSNormalization": 5},
    "lns_vit": {"RMSNormalization": 7},
    "lns_rms_vit": {"RMSNormalization": 7},
    "mixed_vit": {"RMSNormalization": 2, "LayerNormalization": 2},
    "bcn_net": {"GroupNormalization": 2},
    "reparametrized": {"RMSNormalization": 1},
    "hand_written": {"RMSNormalization": 1, "LayerNormalization": 1},
}


@pytest.mark.parametrize("name", FAMILY)
def test_file(name, tmp_path):
    entry = FAMILY[name]
    fast = normfuse.optimize(entry.build(), entry.args)
    to_onnx(fast, tmp_path / "m.onnx", attention="decomposed")  # compares the file with the graph in ONNX Runtime
    found = {k: n for k, n in norm_counts(tmp_path / "m.onnx").items() if n}
    assert found == LEFT.get(name, {})


@pytest.mark.parametrize("name", ["unified_vit", "l1_net", "repvgg"])
def test_nothing_of_a_static_norm_is_left(name, tmp_path):
    entry = FAMILY[name]
    to_onnx(normfuse.optimize(entry.build(), entry.args), tmp_path / "m.onnx", target="portable")
    ops = op_counts(tmp_path / "m.onnx")
    assert not {"Sqrt", "Pow", "Reciprocal", "BatchNormalization", "ReduceSum"} & set(ops)
    if name != "unified_vit":  # which has a residual stream, GELUs, and biases beside products
        assert "Add" not in ops


def test_a_live_statistic_is_exported_as_it_is(tmp_path):
    """Live α-BN depends on its batch; it stays what it is and runs."""
    from normfuse.nn import AlphaBatchNorm

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), AlphaBatchNorm(4, source_weight=0.6)).eval()
    fast = normfuse.optimize(model, (torch.randn(3, 3, 6, 6),))
    to_onnx(fast, tmp_path / "m.onnx")
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(fast(x), model(x))
    assert not torch.allclose(fast(x)[:1], model(x.flip(0) * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1))[:1])
