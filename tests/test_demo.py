"""The demo does the main job and notices when it does not."""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from normfuse import api
from normfuse.app import demo, demo_models
from normfuse.app.demo import Outcome
from normfuse.errors import CheckFailed
from normfuse.reports.model import Error
from tests.tolerances import IDENTITY, TOLERANCES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran() -> tuple[tuple[Outcome, ...], str]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = io.StringIO()
    return demo.run(Console(file=out, width=80), seconds=0.2), out.getvalue()


@torch.no_grad()
@pytest.mark.parametrize(("name", "least"), [pytest.param("vit", 0.97, id="vit"), pytest.param("cnn", 0.99, id="cnn")])
def test_shipped_models_are_trained(name: str, least: float) -> None:
    images, labels = demo_models.digits()
    assert images.shape == (500, 1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    assert labels.unique().tolist() == list(range(10))
    assert (demo_models.load(name)(images).argmax(1) == labels).double().mean() >= least


def test_demo_removes_every_norm_and_changes_no_answer(ran: tuple[tuple[Outcome, ...], str]) -> None:
    vit, cnn = ran[0]
    assert (vit.report.norms_before["layer_norm"], vit.report.norms_after) == (9, {"layer_norm": 0, "rms_norm": 9})
    assert (cnn.report.norms_before["batch_norm"], cnn.report.norms_after) == (15, {"batch_norm": 0})
    for o in (vit, cnn):
        assert o.failures() == []
        assert o.report.exact is not None
        assert o.report.exact.max_rel < IDENTITY
        assert o.difference < TOLERANCES[torch.float32].rtol
        assert len(set(o.right.values())) == 1
        assert not {"LayerNormalization", "BatchNormalization"} & set(o.exported.ops)


def test_demo_prints_at_most_80_columns_and_a_last_line(ran: tuple[tuple[Outcome, ...], str]) -> None:
    lines = ran[1].splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("demo: 24 norms -> 9 (RMSNorm), 0 of 1000 predictions changed, ")
    assert not [line for line in lines if line != line.rstrip() and "─" in line]


def test_demo_would_notice_a_wrong_result(ran: tuple[tuple[Outcome, ...], str]) -> None:
    good = ran[0][0]
    wrong = dataclasses.replace(
        good,
        same=499,
        report=dataclasses.replace(good.report, norms_after={"layer_norm": 1}, exact=Error(1.0, float("nan"), "float64")),
    )
    assert [f.partition(":")[2].split()[0] for f in wrong.failures()] == ["norms", "the", "1"]


def test_demo_fails_when_a_rewrite_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that exchanges the classes goes unnoticed by its own proof, but not by the digits."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    right = api.optimize

    def wrong(model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.fx.GraphModule:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter("head.weight").copy_(model.get_parameter("head.weight").roll(1, 0))
        return right(other, *args, **kwargs)

    monkeypatch.setattr(api, "optimize", wrong)
    monkeypatch.delitem(demo._MODELS, "vit")
    out = io.StringIO()
    with pytest.raises(CheckFailed, match=r"cnn: \d+ of 500 predictions changed"):
        demo.run(Console(file=out, width=80), seconds=0.1)
    assert "demo: " not in out.getvalue()


def test_assets_are_small_and_hold_no_code() -> None:
    from importlib.resources import files

    folder = files("normfuse.assets")
    sizes = {
        entry.name: len(entry.read_bytes()) for entry in folder.iterdir() if entry.is_file() and not entry.name.endswith(".py")
    }
    assert set(sizes) == {"digits_vit.safetensors", "digits_cnn.safetensors", "digits_test.safetensors"}
    assert sum(sizes.values()) < 2_000_000
    for name in sizes:
        assert load_file(str(folder / name))
