"""One model gives one file: the same bytes in two processes, whatever the seed of Python's hashes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.checkout
def test_two_exports_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the smallest; `python -m benchmarks.reproducible` is the same for all."""
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "cache"))
    from benchmarks.reproducible import MODELS, differences

    assert len(MODELS) >= 10
    count, refused, differ = differences("mlp", tmp_path, ("float", "w4a8 native"))
    assert (count, refused) == (2, 0)
    assert not differ
