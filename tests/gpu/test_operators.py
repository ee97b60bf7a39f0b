"""Which implementation of an operator a CUDA tensor meets; see `test_norm_kernels` for what the kernels compute."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normfuse
from normfuse.gpu import run as launching
from normfuse.gpu.loaded import CannotCompile
from normfuse.ops import OPERATORS, Operator, operator

ON_GPU = [name for name, stated in OPERATORS.items() if stated.gpu is not None]


def test_norms_softmax_and_products_have_gpu_kernels() -> None:
    assert {"add_rms_norm", "rms_norm", "rms_norm_linear", "shiftquant_linear", "two_pass_softmax"} < set(ON_GPU)


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in ON_GPU])
def test_the_kernel_is_registered_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normfuse::{name}", "CUDA")


@pytest.mark.parametrize(
    ("dtype", "works", "runs"),
    [
        pytest.param(torch.float16, True, "kernel", id="float16"),
        pytest.param(torch.float64, True, "definition", id="float64"),
        pytest.param(torch.float16, False, "definition", id="without-triton"),
    ],
)
def test_who_runs(dtype: torch.dtype, works: bool, runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> Any:
        def function(x: Tensor, eps: float) -> str:
            assert eps == 1.0
            return name

        return function

    monkeypatch.setattr(operator, "available", lambda device: works)
    stated = Operator(named("definition"), shapes=named("shapes"), gpu=named("kernel"))
    assert stated.on_gpu(torch.ones(2, dtype=dtype), 1.0) == runs


def test_a_kernel_that_cannot_be_compiled_leaves_the_definition(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(x: Tensor) -> Tensor:
        raise CannotCompile("product.product on cuda:0: PTXASError: no such instruction")

    monkeypatch.setattr(operator, "available", lambda device: True)
    kernel = Operator(torch.neg, shapes=torch.empty_like, gpu=fails).on_gpu
    assert [float(kernel(torch.ones(()))) for _ in range(2)] == [-1.0, -1.0]
    assert caplog.text.count("no such instruction") == 1


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_device_may_be_too_old(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launching._new_enough.cache_clear()
    monkeypatch.setattr(launching, "_triton_works", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert [launching.available(torch.device("cuda", 0)) for _ in range(2)] == [runs, runs]
    assert caplog.text.count("compute capability 7.5, kernels need 8.0") == (not runs)
    launching._new_enough.cache_clear()


@pytest.fixture
def _asked_again() -> Iterator[None]:
    launching._triton_works.cache_clear()
    yield
    launching._triton_works.cache_clear()


@pytest.mark.usefixtures("_asked_again")
def test_without_triton_nothing_is_available(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not launching.available()
    assert "pip install 'normfuse[gpu]'" in caplog.text


@pytest.mark.usefixtures("_asked_again")
def test_a_triton_that_does_not_work_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton", reason="asks what happens where it is installed")

    def fail() -> None:
        raise RuntimeError("0 active drivers ([])")

    monkeypatch.setattr(launching, "toolchain", fail)
    assert not launching.available()
    assert not launching.available()
    assert caplog.text.count("0 active drivers") == 1


def test_kernels_are_imported_by_name_alone() -> None:
    """Whoever imports one of them at the top of a file imports triton with normfuse."""
    root = Path(normfuse.__file__).parent
    for path in (*root.glob("gpu/*.py"), *root.glob("ops/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.startswith(("normfuse.gpu.kernels", "triton"))], path


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, id=str(d)) for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
)
def test_operators_on_a_gpu(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="without it these are the definitions themselves")
    op = torch.ops.normfuse
    x, residual, gain = (torch.randn(*shape).to(dtype).cuda() for shape in ((37, 768), (37, 768), (768,)))
    calls: tuple[tuple[Any, ...], ...] = (
        (op.rms_norm, x, gain, 1e-5), (op.crms_norm, x, None, 1e-5), (op.l1_norm, x, gain, gain, 1e-5, 1.25),
        (op.add_rms_norm, x, residual, gain, 1e-5), (op.add_crms_norm, x, residual, None, 1e-5), (op.two_pass_softmax, x),
        (op.quantize_rows, x, 8), (op.rms_norm, x[:0], gain, 1e-5), (op.rms_norm, x.T, None, 1e-5),
    )  # fmt: skip
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-6}.get(dtype, 1.01 * torch.finfo(dtype).eps)
    for function, *args in calls:
        found, expected = (torch.utils._pytree.tree_leaves(function(*a)) for a in (args, [_cpu64(v) for v in args]))
        if function is op.quantize_rows:
            expected = torch.utils._pytree.tree_leaves(function(x.cpu(), 8))
            assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
            continue
        for a, b in zip(found, expected, strict=True):
            assert a.dtype is dtype
            torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance)
    compiled = torch.compile(lambda x, r: op.add_rms_norm(x, r, gain, 1e-5)[0] * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x, residual), op.add_rms_norm(x, residual, gain, 1e-5)[0] * 2)


def _cpu64(value: Any) -> Any:
    return value.cpu().double() if isinstance(value, Tensor) else value
