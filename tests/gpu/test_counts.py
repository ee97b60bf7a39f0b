"""What compiling must show of the integer products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")
if not (Path(__file__).parents[2] / "benchmarks" / "gpu").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)

from benchmarks.gpu.counts import MOST_SPILLED, _product, _sample, count, wave_bytes
from normfuse.gpu import source
from normfuse.gpu.compile import CAPABILITIES, compiled
from normfuse.gpu.tile import FLOATS


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 4)])
def test_one_row_keeps_memory_busy(bits: int, groups: int) -> None:
    found = count(_product(4096, 4096, "fp16", bits, groups, 1), 90, 1)
    assert found.in_flight >= 20 << 10
    assert found.spilled <= MOST_SPILLED


def test_bytes_go_into_the_tensor_cores_as_they_are() -> None:
    found = count(_product(4096, 4096, "fp16", 8, 1, 4096), 80, 4096)
    assert found.per_128 is not None
    assert found.per_128 <= 160
    assert found.spilled <= MOST_SPILLED


@pytest.mark.skipif(source._version(source.toolchain()) < (3, 8), reason="this triton keeps sums of int8 in registers")
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 4)])
def test_sums_stay_in_tensor_memory(bits: int, groups: int) -> None:
    """Read once behind the loop each, and nowhere in it."""
    launch = _product(4096, 4096, "fp16", bits, groups, 4096)
    assert compiled(launch, 100).ptx.count("tcgen05.ld") == launch.constants["TURNS"] == 2


@pytest.mark.parametrize("outputs", [4096, 11008])
def test_a_wave_reads_less_when_rows_are_taken_together(outputs: int) -> None:
    launch = _product(4096, outputs, "fp16", 8, 1, 4096)
    alone = dataclasses.replace(launch, constants={**launch.constants, "TOGETHER": 1})
    assert wave_bytes(launch, 4096) < 0.75 * wave_bytes(alone, 4096)


def _names() -> Iterator[tuple[str, str, int]]:
    for kernel, what, _, capability in _sample(CAPABILITIES):
        yield kernel, what.split()[0], capability


def test_the_sample_has_every_kernel_type_and_width_for_every_architecture() -> None:
    products = {f"product W{bits}" for bits in range(2, 9)}
    others = {"norm + linear", "layer norm", "rms norm", "crms norm", "l1 norm", "softmax", "quantize rows"}
    assert set(_names()) == {(k, d, c) for k in products | others for d in FLOATS for c in CAPABILITIES}
