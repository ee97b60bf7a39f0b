"""What every layer of `normfuse.nn` does alike, as checks that its tests call."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from tests.tolerances import IDENTITY

__all__ = ["compiles", "exports", "operators", "optimized", "randomised", "reads_any_layout", "unshaped", "wide_statistics"]


def randomised(model: Any, seed: int = 0) -> Any:
    """Every parameter and running statistic is drawn anew; scales and the constants of companders stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or name.endswith((".a", ".b")):
                continue
            drawn = torch.rand(value.shape, generator=generator) + 0.5
            if "scale" not in name:
                drawn = torch.randn(value.shape, generator=generator) * 0.6
            value.copy_(drawn)
    return model


def optimized(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """The operators that `normfuse.optimize` leaves, after it has proved to be exact and left the model alone."""
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(*inputs)
    fast = normfuse.optimize(model, inputs)
    exact = normfuse.report(fast).exact
    assert exact is not None
    assert exact.max_rel <= IDENTITY
    torch.testing.assert_close(fast(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return operators(fast)


def unshaped(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """The operators that `normfuse.optimize` leaves where it is given no inputs, after they have been run on some."""
    model.eval()
    fast = normfuse.optimize(model)
    torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    return operators(fast)


def operators(gm: torch.fx.GraphModule) -> list[str]:
    """Names of the ATen operators of a graph, in order."""
    return [str(n.target).removeprefix("aten.").split(".")[0] for n in gm.graph.nodes if n.op == "call_function"]


def exports(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """`torch.export` takes the eval form, for any batch size."""
    model.eval()
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))
    larger = tuple(torch.cat([t, t]) for t in inputs)
    torch.testing.assert_close(program.module()(*larger), model(*larger))


def compiles(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """`torch.compile` takes both modes without a break in the graph, gradients and statistics included."""
    for training in (True, False):
        plain, twin = copy.deepcopy(model).train(training), copy.deepcopy(model).train(training)
        fast = torch.compile(twin, backend="eager", fullgraph=True)
        a, b = (tuple(t.clone().requires_grad_(t.is_floating_point()) for t in inputs) for _ in range(2))
        expected, found = plain(*a), fast(*b)
        torch.testing.assert_close(found, expected)
        weights = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
        torch.testing.assert_close(b[0].grad, a[0].grad)
        for (name, p), q in zip(plain.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=name)
        for (name, p), q in zip(plain.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(q, p, msg=name)
    torch._dynamo.reset()


def wide_statistics(layer: nn.Module, x: Tensor, *rest: Tensor, rtol: float = 2e-2) -> None:
    """Half-precision inputs, with half-precision parameters or under autocast, give what float32 gives, in their own dtype.

    `x` should hold values whose sums of squares overflow float16.
    """
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        expected = layer(half.float(), *rest)
        halved = copy.deepcopy(layer).to(dtype)
        found = halved(half, *(t.to(dtype) for t in rest))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), copy.deepcopy(halved).float()(half.float(), *rest), rtol=rtol, atol=rtol)
        with torch.autocast("cpu", dtype):
            found = layer(half, *rest)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=rtol)


def reads_any_layout(layer: nn.Module, x: Tensor, *rest: Tensor) -> None:
    """A strided input, float64, and no batch at all."""
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided, *rest), layer(x, *rest))
    exact = copy.deepcopy(layer).double()(x.double(), *(t.double() for t in rest))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), layer(x, *rest), rtol=1e-4, atol=1e-5)
    empty = layer(x[:0].clone().requires_grad_(), *(t[:0] for t in rest))
    assert empty.shape == x[:0].shape
    layer.zero_grad()
    empty.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    layer.zero_grad()
