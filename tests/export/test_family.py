"""The norm family in ONNX files: what is folded is gone from the file, what stays runs in ONNX Runtime."""

import pytest
import torch

import normfuse
from normfuse.export import to_onnx
from normfuse.export.onnx.inspect import norm_counts, op_counts
from tests.zoo_family import FAMILY

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


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
@pytest.mark.parametrize("name", FAMILY)
def test_file(name, target, tmp_path):
    entry = FAMILY[name]
    fast = normfuse.optimize(entry.build(), entry.args)
    to_onnx(fast, tmp_path / "m.onnx", target=target)  # compares the file with the graph in ONNX Runtime
    found = {k: n for k, n in norm_counts(tmp_path / "m.onnx").items() if n}
    assert sum(found.values()) == sum(LEFT.get(name, {}).values()), found


@pytest.mark.parametrize(("name", "arithmetic"), [("unified_vit", {"Add": 5}), ("l1_net", {}), ("repvgg", {})])
def test_nothing_of_a_static_norm_is_left(name, arithmetic, tmp_path):
    entry = FAMILY[name]
    to_onnx(normfuse.optimize(entry.build(), entry.args), tmp_path / "m.onnx", target="portable")
    ops = op_counts(tmp_path / "m.onnx")
    elementwise = {op: n for op, n in ops.items() if op in ("Mul", "Div", "Sub", "Sqrt", "ReduceMean", "Pow", "BatchNormalization")}
    if name == "unified_vit":
        elementwise = {op: n for op, n in elementwise.items() if op not in ("Mul", "Div")}  # of GELU and of attention
    assert not elementwise
    assert all(ops.get(op, 0) >= n for op, n in arithmetic.items())


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
