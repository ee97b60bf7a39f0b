"""Each operator in a file: by the kernel of the library, where there is one, and by the standard ops of its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import native
from normfuse.export.ops import DOMAIN, OP_OF, OPS
from normfuse.export.tensorrt.plugins import plugin
from normfuse.export.tensorrt.plugins.plans import PLANS
from normfuse.ops import OPERATORS
from tests.ops.samples import CONSTANTS, samples

ort = pytest.importorskip("onnxruntime")
SAMPLES = samples()


class _Call(nn.Module):
    """One call of an operator: its weights are those of the module, what else is a tensor is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.operator = getattr(torch.ops.normfuse, name)
        self.arguments: list[Any] = [None] * len(SAMPLES[name])
        self.given: list[int] = []
        names = [a.name for a in self.operator.default._schema.arguments]
        for i, (argument, value) in enumerate(zip(names, SAMPLES[name], strict=False)):
            if isinstance(value, Tensor) and argument in CONSTANTS:
                self.register_buffer(argument, value)
                self.arguments[i] = argument
            elif isinstance(value, Tensor):
                self.given.append(i)
        self.name = name

    def forward(self, *tensors: Tensor) -> Any:
        feed = iter(tensors)
        values = []
        for i, value in enumerate(SAMPLES[self.name]):
            if i in self.given:
                values.append(next(feed))
            else:
                values.append(value if self.arguments[i] is None else getattr(self, self.arguments[i]))
        return self.operator(*values)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(SAMPLES[self.name][i] for i in self.given)


def test_every_operator_has_a_body() -> None:
    assert set(OP_OF) == set(OPERATORS)
    assert {op.name for op in OP_OF.values()} == set(OPS)


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
def test_every_op_with_a_kernel_is_registered_in_the_library() -> None:
    known = set(native.operators())
    kernels = {OP_OF[name].name for name, operator in OPERATORS.items() if operator.functions}
    assert kernels <= known
    assert {name for name in known if "_" not in name} <= set(OPS)


def test_plugins_are_ops_with_a_gpu_kernel() -> None:
    planned = {op for domain, op in PLANS if domain == DOMAIN}
    assert planned <= {OP_OF[name].name for name, operator in OPERATORS.items() if operator.gpu}
    assert set(plugin.OPS) <= planned


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in SAMPLES])
def test_the_file_computes_what_the_operator_does(name: str, tmp_path: Path) -> None:
    model = _Call(name).eval()
    path = tmp_path / "model.onnx"
    normfuse.export.to_onnx(normfuse.optimize(model, model.inputs, passes=[]), path, form="native")
    expected = torch.utils._pytree.tree_leaves(model(*model.inputs))
    for kernels in {False, native.available()}:  # the body, and the kernel
        options = ort.SessionOptions()
        if kernels:
            options.register_custom_ops_library(str(native.path()))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), model.inputs, strict=True)}
        for found, y in zip(session.run(None, feeds), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), y, rtol=2e-5, atol=2e-6)
