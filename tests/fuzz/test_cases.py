"""Three hundred random models, always the same ones; `make fuzz` tries ten thousand."""

import pytest

from tests.fuzz.generate import Options
from tests.fuzz.run import case, summary

CHUNKS = 12  # so that workers finish together
CASES = 25
OPTIONS = Options(export_share=0.01)  # files have tests of their own and take longest


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_models(chunk):
    results = [case(seed, OPTIONS) for seed in range(chunk * CASES, (chunk + 1) * CASES)]
    failed = [r for r in results if r["state"] == "failed"]
    assert not failed, f"{summary(failed)}\nnext: python -m tests.fuzz --export-share 0.01 --seed {failed[0]['seed']}"
    assert sum(r["state"] == "ok" for r in results) > CASES // 2
    assert sum(r["applied"] for r in results) >= 5
