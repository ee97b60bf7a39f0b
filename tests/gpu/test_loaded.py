"""How kernels are kept and started, on a driver without a device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from normfuse.gpu import loaded
from normfuse.gpu.launch import Launch
from normfuse.gpu.loaded import CannotCompile
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.product import plan_product
from normfuse.gpu.run import run
from normfuse.gpu.source import function
from tests.gpu.stand_in import stand_in


def _norm() -> Launch:
    return plan_norm("rms", 64, "fp16", gain="fp16", shift=None, residual=False, eps=1e-5)


def test_a_kernel_is_compiled_once_and_started_with_its_grid() -> None:
    x, gain = torch.randn(70, 64).half(), torch.ones(64).half()
    with stand_in() as device:
        for rows in (70, 3, 70):
            (y,) = run(_norm(), {"x": x[:rows], "gain": gain})
            assert (y.shape, y.dtype) == ((rows, 64), torch.float16)
        assert len(loaded._kept) == 1
    assert device.started == [("normalize", _norm().programs(rows)) for rows in (70, 3, 70)]


def test_addresses_of_another_alignment_are_another_kernel() -> None:
    x, gain = torch.randn(9 * 64).half(), torch.ones(64).half()
    with stand_in():
        run(_norm(), {"x": x[: 8 * 64].view(8, 64), "gain": gain})
        run(_norm(), {"x": x[1 : 8 * 64 + 1].view(8, 64), "gain": gain})
        assert len(loaded._kept) == 2


def test_equal_launches_share_a_kernel() -> None:
    x, gain = torch.randn(8, 64).half(), torch.ones(64).half()
    with stand_in():
        run(_norm(), {"x": x, "gain": gain})
        run(plan_norm.__wrapped__("rms", 64, "fp16", gain="fp16", shift=None, residual=False, eps=1e-5), {"x": x, "gain": gain})
        assert len(loaded._kept) == 1


def test_what_does_not_compile_says_so_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = plan_product(64, 32, "fp16", 4, 2, bias=False, residual=False, epilogue="none", rows_hint=1)
    given = {
        "q": torch.zeros(1, 64, dtype=torch.int8),
        "row_scale": torch.ones(1),
        "planes": torch.zeros(4096, dtype=torch.uint8),
        "shifts": torch.zeros(64, dtype=torch.uint8),
        "scale": torch.ones(32),
    }

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("PassManager::run failed")

    with stand_in():
        with monkeypatch.context() as patched:
            patched.setattr(type(function(launch)), "run", fails)
            with pytest.raises(CannotCompile, match=r"product\.product on cpu: RuntimeError: PassManager::run failed"):
                run(launch, given)
        assert not loaded._kept


@pytest.mark.parametrize(("rows", "n"), [(197, 768), (197, 3072), (1576, 768), (4096, 4096)])
@pytest.mark.parametrize(("bits", "groups"), [(4, 4), (8, 1), (8, 8)])
def test_every_multiprocessor_has_a_program(rows: int, n: int, bits: int, groups: int) -> None:
    launch = plan_product(768, n, "fp16", bits, groups, bias=False, residual=False, epilogue="none", rows_hint=rows)
    assert launch.programs(rows) >= 128
