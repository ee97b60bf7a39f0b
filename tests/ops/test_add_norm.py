"""A residual addition and its norm as one operator, in PyTorch and in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse import native, ops
from normfuse.errors import UsageError

op = torch.ops.normfuse
EPS = 1e-5
KINDS = [pytest.param(k, id=k) for k in ("rms", "crms")]
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, gain = (torch.randn(*shape).to(dtype) for shape in ((3, 2, 37), (3, 2, 37), (37,)))
    return 3 * x, residual, gain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_addition_and_then_a_norm(kind: str, dtype: torch.dtype) -> None:
    x, residual, gain = _inputs(dtype)
    norm, fused = getattr(op, f"{kind}_norm"), getattr(op, f"add_{kind}_norm")
    for function in (fused, getattr(ops, f"add_{kind}_norm")):
        for g in (gain, None):
            y, total = function(x, residual, g, EPS)
            assert torch.equal(total, x + residual)  # the rounded sum, and the norm of just that
            expected = norm((x + residual).double(), g, EPS)
            tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps * 0.51)
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-6)
            assert y.dtype is total.dtype is dtype


@pytest.mark.parametrize("kind", KINDS)
def test_odd_strides(kind: str) -> None:
    x, residual = torch.randn(6, 5).T, torch.randn(10, 6)[::2]
    y, total = getattr(op, f"add_{kind}_norm")(x, residual, None, EPS)
    assert y.is_contiguous()
    assert total.is_contiguous()
    assert torch.equal(total, x + residual)


def test_worked_example() -> None:
    y, total = op.add_crms_norm(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0]), None, 0.0)
    # 2, 1 and minus their sum: √((4 + 1 + 9) / 3)
    torch.testing.assert_close(total, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(y, torch.tensor([2.0, 1.0]) / (14 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("residual", "said"),
    [
        pytest.param(torch.ones(4), r"residual \(4,\) of torch.float32; expected \(2, 4\)", id="shape"),
        pytest.param(torch.ones(2, 4).half(), "of torch.float16; expected", id="dtype"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_of_another_kind_is_refused(kind: str, residual: Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        getattr(op, f"add_{kind}_norm")(torch.ones(2, 4), residual, None, EPS)


class _Norms(nn.Module):
    """Both norms; the sum read, an output, and not read at all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.randn(37))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        a, total = op.add_rms_norm(x, residual, self.gain, EPS)
        b, _ = op.add_crms_norm(total, a, None, EPS)
        c, last = op.add_crms_norm(a, b, self.gain, EPS)
        return b, c, last


FORMS: list[Any] = [
    pytest.param("native", True, id="kernels", marks=pytest.mark.skipif(not native.available(), reason="not built")),
    pytest.param("native", False, id="functions"),
    pytest.param("integer", False, id="standard"),
]


@pytest.mark.parametrize(("form", "kernels"), FORMS)
def test_in_a_file(form: str, kernels: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from normfuse.export.onnx.runtime import session
    from tests.export.quantized_models import Translated

    found = Translated(_Norms(), _inputs(torch.float32)[:2])
    file = found.written(tmp_path / "model.onnx", form)
    types = [(n.domain, n.op_type) for n in onnx.load(file).graph.node]
    if form == "native":
        assert types == [("normfuse", "RmsNorm_1"), ("normfuse", "CrmsNorm_1"), ("normfuse", "CrmsNorm_1")]
    else:
        assert {domain for domain, _ in types} == {""}
    x, residual, _ = _inputs(torch.float32)
    for got, want in zip(found.run(session(file, threads=1, kernels=kernels), x, residual), found.model(x, residual), strict=True):
        torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)
