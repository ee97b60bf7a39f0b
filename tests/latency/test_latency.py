"""No optimized model is slower than its original in the same runtime: the benchmark set in ONNX Runtime.

Noise-aware: a machine that cannot tell is a skip with a reason, and a model counts as slower only when two measurements
with fresh processes say so. `make latency` runs these; the default run leaves them out.
"""

import sys
from pathlib import Path

import pytest

from normfuse.app.engines import bench
from normfuse.benchmark import Comparison, Verdict

models = pytest.importorskip("benchmarks.models", reason="the benchmark set is in the repository, not in the package")
pytestmark = [pytest.mark.latency, pytest.mark.checkout]

_SECONDS = 20.0
_PATIENCE = 3  # an undecided measurement is repeated once, this much longer


@pytest.mark.parametrize("name", list(models.MODELS))
def test_optimized_export_is_not_slower_than_the_original(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.prepare import prepare

    ready = prepare(models.MODELS[name], tmp_path)

    def measured(longer: int) -> Comparison:
        found = bench(ready.original, ready.optimized, seconds=longer * _SECONDS, progress=False)
        with capsys.disabled():
            sys.stderr.write(f"\n{name}: speedup {found.speedup}, against itself {found.itself}: {found.verdict().value}\n")
        return found

    found = measured(1)
    if found.verdict() is not Verdict.HOLDS:
        found = measured(_PATIENCE)
    if found.verdict() is Verdict.UNDECIDED:
        pytest.skip(f"too noisy to tell: speedup {found.speedup}, the original against itself {found.itself}")
    assert found.verdict() is Verdict.HOLDS, f"the optimized {name} is slower than its original:\n{found}"
