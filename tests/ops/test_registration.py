"""Every operator as torch.compile, torch.export and autograd see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.ops import OPERATORS, Operator
from tests.ops.quantized import convolution, linear
from tests.ops.samples import samples

op = torch.ops.normfuse


SAMPLES_OF = samples()


def _each() -> list[Any]:
    return [pytest.param(name, id=name) for name in SAMPLES_OF]


def test_every_operator_has_a_sample() -> None:
    assert set(SAMPLES_OF) == set(OPERATORS)
    assert {"shiftquant_linear", "rms_norm", "attention"} < set(OPERATORS)


SCHEMAS = {  # those of files that were saved earlier
    "rms_norm": "(Tensor x, Tensor? gain, float eps) -> Tensor",
    "shiftquant_attention": "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal, int bits) -> Tensor",
    "shiftquant_conv2d": "(Tensor x, Tensor weight, Tensor exponents, Tensor scale, Tensor? bias, Tensor? input_scale, int bits, "
    "int activation_bits, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    'str epilogue="none") -> Tensor',
    "quantize_rows": "(Tensor x, int bits) -> (Tensor, Tensor)",
}


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in SCHEMAS])
def test_schemas_do_not_change(name: str) -> None:
    assert str(getattr(op, name).default._schema) == f"normfuse::{name}{SCHEMAS[name]}"


def test_an_annotation_that_no_schema_has_is_refused() -> None:
    def bad(x: Tensor, sizes: dict[str, int]) -> Tensor:
        return x

    with pytest.raises(TypeError, match=r"operator bad: found sizes: dict\[str, int\]; expected"):
        _ = Operator(bad, shapes=bad).schema


@pytest.mark.parametrize("name", _each())
def test_schema_shapes_and_tracing(name: str) -> None:
    torch.library.opcheck(getattr(op, name).default, SAMPLES_OF[name])


@pytest.mark.parametrize("name", _each())
def test_the_meta_device_has_the_shapes(name: str) -> None:
    def meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    real = torch.utils._pytree.tree_leaves(getattr(op, name)(*SAMPLES_OF[name]))
    found = torch.utils._pytree.tree_leaves(getattr(op, name)(*map(meta, SAMPLES_OF[name])))
    assert [(t.shape, t.dtype, t.stride()) for t in found] == [(t.shape, t.dtype, t.stride()) for t in real]


class _Model(nn.Module):
    """Both forms of a block: floats between layers, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(40, 30, seed=1), linear(30, 40, seed=2)
        for name, layer in (("first", self.first), ("second", self.second)):
            for part, tensor in zip(("weight", "exponents", "scale", "bias"), layer.arguments, strict=True):
                self.register_buffer(f"{name}_{part}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        first = (self.first_weight, self.first_exponents, self.first_scale, self.first_bias)
        second = (self.second_weight, self.second_exponents, self.second_scale, self.second_bias)
        q, s, _ = op.norm_quantize(x, None, None, None, "rms", 1e-5, 1.0, 8)
        q, s = op.shiftquant_matmul_quantize(q, s, *first, None, 4, "gelu", 8)
        x = op.shiftquant_matmul(q, s, *second, x, 4, "none")
        return op.shiftquant_linear(op.shiftquant_linear(x, *first, None, 4, 8, "relu"), *second, None, 4, 8)


def test_export_with_a_dynamic_batch() -> None:
    model, x = _Model().eval(), torch.randn(3, 5, 30)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch, 1: tokens}})
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert names.count("normfuse.shiftquant_linear.default") == 2
    for other in (torch.randn(7, 2, 30), torch.randn(2, 9, 30)):
        assert torch.equal(program.module()(other), model(other))


def test_compile_with_a_dynamic_batch() -> None:
    model = _Model().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in (torch.randn(3, 5, 30), torch.randn(6, 2, 30)):
            assert torch.equal(compiled(x), model(x))


def test_export_of_a_convolution_with_a_dynamic_size() -> None:
    conv = convolution(6, 4, (3, 3))

    class Convolution(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op.shiftquant_conv2d(x, *conv.arguments, None, 4, 8, [3, 3], [2, 2], [1, 1], [1, 1], 1)

    x = torch.randn(2, 4, 8, 10)
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    program = torch.export.export(Convolution(), (x,), dynamic_shapes={"x": dims})
    other = torch.randn(3, 4, 9, 7)
    assert torch.equal(program.module()(other), Convolution()(other))


_FLOATS: dict[str, Callable[[Tensor], Tensor]] = {
    "shiftquant_linear": lambda x: op.shiftquant_linear(x, *SAMPLES_OF["shiftquant_linear"][1:]),
    "rms_norm": lambda x: op.rms_norm(x, None, 1e-5),
    "norm_quantize": lambda x: op.norm_quantize(x, x, None, None, "rms", 1e-5, 1.0, 8)[2],
}


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in _FLOATS])
def test_a_gradient_is_refused_where_it_is_asked_for(name: str) -> None:
    x = torch.randn(3, 5, 30, requires_grad=True)
    y = _FLOATS[name](x)  # the forward needs no `no_grad`
    with pytest.raises(UsageError, match=f"normfuse::{name} has no backward.*no_grad"):
        y.sum().backward()
    with torch.no_grad():
        assert not _FLOATS[name](x).requires_grad


def test_compile_of_parameters_that_require_a_gradient() -> None:
    """A bias that is still a parameter must not keep a model from being compiled outside `no_grad`."""
    x, weight, *_ = SAMPLES_OF["shiftquant_linear"]
    arguments = SAMPLES_OF["shiftquant_linear"][2:4]
    bias = nn.Parameter(SAMPLES_OF["shiftquant_linear"][4])

    def layer(x: Tensor) -> Tensor:
        return op.shiftquant_linear(x, weight, *arguments, bias, None, 4, 8)

    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, layer(x))
    with pytest.raises(UsageError, match="no backward"):
        found.sum().backward()
