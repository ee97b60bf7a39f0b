"""AlphaBatchNorm: the live mixture, and plain batch normalization once it is frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.alpha import AlphaBatchNorm


def randomized(layer: AlphaBatchNorm) -> AlphaBatchNorm:
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    return layer.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape) * 3 + 1


def by_hand(layer: AlphaBatchNorm, x: Tensor) -> Tensor:
    a, channels = layer.source_weight, []
    for c in range(x.shape[1]):
        values = x[:, c].double()
        mean = a * layer.running_mean[c] + (1 - a) * values.mean()
        var = a * layer.running_var[c] + (1 - a) * values.var()  # unbiased
        channel = (values - mean) / (var + layer.eps).sqrt()
        channels.append(channel if layer.weight is None else channel * layer.weight[c] + layer.bias[c])
    return torch.stack(channels, 1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("source_weight", [0.0, 0.3, 0.9, 1.0])
def test_mixes_the_statistics_of_source_and_batch(source_weight: float, affine: bool) -> None:
    layer = randomized(AlphaBatchNorm(3, source_weight, affine=affine)).double()
    before = copy.deepcopy(layer.state_dict())
    x = images(4, 3, 5, 2).double()
    torch.testing.assert_close(layer(x), by_hand(layer, x))
    torch.testing.assert_close(layer.state_dict(), before)


def test_zero_source_weight_is_what_batch_norm_with_momentum_one_has_seen() -> None:
    layer, bn = randomized(AlphaBatchNorm(3, 0.0)), nn.BatchNorm2d(3, momentum=1.0)
    x = images(4, 3, 5, 2)
    bn(x)
    bn.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
    torch.testing.assert_close(layer(x), bn.eval()(x))


def test_training_is_that_of_batch_norm() -> None:
    layer, bn = AlphaBatchNorm(3), nn.BatchNorm2d(3)
    x = images(4, 3, 5, 2)
    torch.testing.assert_close(layer(x), bn(x))
    torch.testing.assert_close(layer.state_dict(), bn.state_dict())


@pytest.mark.parametrize("layer", [AlphaBatchNorm(3).freeze(), AlphaBatchNorm(3, source_weight=1.0)])
def test_frozen_is_plain_batch_norm(layer: AlphaBatchNorm) -> None:
    bn = nn.BatchNorm2d(3).eval()
    bn.load_state_dict(randomized(layer).state_dict(), strict=True)
    x = images(4, 3, 5, 2)
    assert torch.equal(layer(x), bn(x))


def test_loads_the_keys_of_batch_norm() -> None:
    state = {
        "weight": torch.rand(3),
        "bias": torch.rand(3),
        "running_mean": torch.rand(3),
        "running_var": torch.rand(3),
        "num_batches_tracked": torch.tensor(5),
    }
    layer = AlphaBatchNorm(3)
    layer.load_state_dict(state, strict=True)
    torch.testing.assert_close(dict(layer.state_dict()), state)


def test_of_shares_the_tensors_of_a_batch_norm() -> None:
    bn = nn.BatchNorm2d(3, eps=1e-3, affine=False).eval()
    layer = AlphaBatchNorm.of(bn, 0.5)
    assert layer.running_var is bn.running_var
    assert (layer.eps, layer.source_weight, layer.training, layer.weight) == (1e-3, 0.5, False, None)
    with pytest.raises(UsageError, match="track_running_stats"):
        AlphaBatchNorm.of(nn.BatchNorm2d(3, track_running_stats=False))


def test_gradients_flow_through_the_statistics_of_the_batch() -> None:
    layer = randomized(AlphaBatchNorm(2, 0.5)).double()
    assert torch.autograd.gradcheck(layer, (images(2, 2, 2, 1).double().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_mixed_in_float32(dtype: torch.dtype) -> None:
    layer = randomized(AlphaBatchNorm(3, 0.5))
    x = (images(4, 3, 5, 2) * 300).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), by_hand(layer, x), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_layout_of_the_input_does_not_matter() -> None:
    layer = randomized(AlphaBatchNorm(3, 0.5))
    x = images(4, 3, 5, 2)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))


def test_empty_batches_and_single_values() -> None:
    live, one, none = randomized(AlphaBatchNorm(3)), images(1, 3, 1, 1), images(0, 3, 2, 2)
    assert live(none).shape == none.shape
    with pytest.raises(UsageError, match="one row has no variance"):
        live(one)
    assert live.freeze()(one).shape == one.shape
    with pytest.raises(UsageError, match="empty"):
        live.train()(none)


def test_wrong_source_weight_is_refused() -> None:
    with pytest.raises(UsageError, match=r"source_weight=1\.2"):
        AlphaBatchNorm(3, 1.2)


# -- compilers ---------------------------------------------------------------------------------------------------------


def network(norm: AlphaBatchNorm) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def test_frozen_folds_into_the_convolution() -> None:
    model, x = network(randomized(AlphaBatchNorm(4)).freeze()), images(2, 3, 5, 5)
    fast = normfuse.optimize(model, (x,))
    targets = [str(n.target) for n in fast.graph.nodes if n.op == "call_function"]
    assert targets == ["aten.conv2d.default", "aten.relu.default", "aten.conv2d.default"]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [pytest.param(True, id="inputs"), pytest.param(False, id="no-inputs")])
def test_live_is_left_as_it_is(given: bool) -> None:
    """The statistics of the batch stay operators of the graph: another batch gives another result for the same sample."""
    model, x = network(randomized(AlphaBatchNorm(4, 0.5))), images(2, 3, 5, 5)
    fast = normfuse.optimize(model, (x,) if given else None)
    assert "aten.var_mean.dim" in [str(n.target) for n in fast.graph.nodes]
    for batch in (x, images(2, 3, 5, 5) * 5, torch.cat((x[:1], images(1, 3, 5, 5) * 9))):
        torch.testing.assert_close(fast(batch), model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_compiles_and_exports(frozen: bool) -> None:
    torch.compiler.reset()
    norm = randomized(AlphaBatchNorm(4, 0.5))
    model, x = network(norm.freeze() if frozen else norm), images(2, 3, 5, 5)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    x = images(3, 3, 5, 5)
    torch.testing.assert_close(program(x), model(x))
