"""The benchmark of `fold` on small models of timm: what it measures, and what it calls short."""

import pytest

pytest.importorskip("benchmarks.fold", reason="the benchmarks are in the repository, not in the package")
pytest.importorskip("timm")

from benchmarks.fold import measure, problems, summary
from benchmarks.zoo_models import subject


@pytest.fixture(scope="module")
def row():
    return measure(subject("timm:test_efficientnet"))


def test_a_small_model_is_measured(row):
    assert row["status"] == "folded"
    assert row["norms_after"] == {"batch_norm": 0}
    assert row["classes"] == {"BatchNormAct2d -> Sequential": 9, "BatchNormAct2d -> Identity": 4}
    assert problems(row) == []
    assert "| BatchNorms removed, of those that `optimize` removes | 13 of 13 |" in summary([row])


def test_what_falls_short_is_named(row):
    row = row | {"norms_after": {"batch_norm": 3}, "double": 1e-8, "state": False, "classes": {"Conv2d -> Linear": 1}}
    assert problems(row) == [
        "float64 error 1.0e-08", "does not load its own state dict", "class changed: Conv2d -> Linear",
        "10 of the 13 BatchNorms that `optimize` removes",
    ]  # fmt: skip
    assert "* timm:test_efficientnet: float64 error 1.0e-08" in summary([row])
    assert problems(row | {"status": "raised", "message": "ValueError"}) == ["raised: ValueError"]
