"""The zoo: rows of small models, what counts as wrong, the page; the zoo itself is run by the benchmark."""

import json
import time
from dataclasses import asdict

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.zoo", reason="the benchmarks are in the repository, not in the package")

from benchmarks import zoo, zoo_models, zoo_page
from benchmarks.zoo_measure import Row, measure, normalized


class Small(zoo_models.Subject):
    """A network that is named like one of a library."""

    def build(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 5), nn.LayerNorm(5)
        )

    def inputs(self, model):
        return False, (torch.randn(2, 3, 8, 8),), {}


SMALL = Small("timm", "small", "small", "small")


def test_a_row_says_what_became_of_a_model():
    row = Row(**measure(SMALL))
    assert (row.status, row.message, row.wrong) == ("whole", "", False)
    assert row.norms_before == {"batch_norm": 1, "layer_norm": 1}
    assert row.norms_after == {"batch_norm": 0, "layer_norm": 1}
    assert row.refused
    assert len(row.native) == 2
    assert 0 < max(row.native) < 1e-5
    assert max(row.double) < 1e-12
    assert row.again == 0


class Unusable(Small):
    def inputs(self, model):
        return False, (torch.randn(2, 7, 8, 8),), {}


class Refused(Small):
    class Net(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    def build(self):
        return Refused.Net()


class Parts(Small):
    class Net(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            x = self.net(x)
            return x if float(x.sum()) > 0 else -x

    def build(self):
        return Parts.Net(super().build())


class Raises(Small):
    def build(self):
        raise ValueError("no such\nsize")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        pytest.param(Unusable, "unusable", id="does-not-run"),
        pytest.param(Raises, "unusable", id="does-not-build"),
        pytest.param(Refused, "refused", id="nothing-captured"),
        pytest.param(Parts, "parts", id="captured-by-parts"),
    ],
)
def test_status_of_what_is_not_captured(kind, status):
    row = Row(**measure(kind("timm", "small", "small", "small")))
    assert row.status == status
    assert not row.wrong


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        pytest.param({}, False, id="rounding"),
        pytest.param({"native": [1e-6, 1e-3]}, True, id="native"),
        pytest.param({"native": [1e-6, 1e-3], "noise": 1e-4}, False, id="as-noisy-as-the-model"),
        pytest.param({"double": [1e-8]}, True, id="float64"),
        pytest.param({"native": [float("nan")]}, True, id="nan"),
    ],
)
def test_wrong(change, wrong):
    assert Row("timm:a", status="whole", **{"native": [1e-7], "double": [1e-15], "noise": 1e-7} | change).wrong is wrong


def test_a_reason_without_the_names_and_numbers_of_one_model():
    assert normalized("blocks.3.norm1 (conv2d) feeds 12 consumers") == "… (conv#d) feeds # consumers"


@pytest.mark.parametrize(("library", "most"), [("timm", 400), ("torchvision", 80), ("transformers", 700)])
def test_subjects_are_the_smallest_of_each_family(library, most):
    pytest.importorskip(library)
    found = zoo_models.subjects(library)
    assert len({(s.family, s.group) for s in found}) == len(found) <= most
    if library != "transformers":
        assert [s.size for s in found] == sorted(s.size for s in found)


@pytest.mark.parametrize("model_type", ["bert", "llama", "vit", "t5", "clip", "wav2vec2"])
def test_tiny_models_of_transformers_run(model_type):
    pytest.importorskip("transformers")
    s = zoo_models.subject(f"transformers:{model_type}")
    model = s.build()
    declared, args, kwargs = s.inputs(model)
    assert declared
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    with torch.no_grad():
        model(*args, **kwargs)


def test_the_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(zoo, "subjects", lambda library: [Small(library, name, name, name) for name in ("one", "two")])
    monkeypatch.setattr(zoo, "run", lambda s, **limits: ran.append(s.name) or {"name": s.name, "status": "whole"})
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps({"name": "timm:one"}) + "\n" + '{"name": "timm:tw', encoding="utf-8")  # stopped while it wrote
    out.write_text(out.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert zoo.main(["--library", "timm", "--out", str(out)]) == 0
    assert ran == ["timm:two"]
    assert {r["name"] for r in zoo.read(out)} == {"timm:one", "timm:two"}
    assert zoo.main(["--library", "timm", "--only", "three", "--out", str(out)]) == 2


def test_the_page_has_counts_bars_and_reasons():
    good = Row(
        "timm:good", "resnet", "resnet", "whole", parameters=10, norms_before={"batch_norm": 3}, norms_after={"batch_norm": 1}
    )
    good.refused, good.again, good.nodes, good.seconds = [("feeds # consumers", "affine_into_producer", 1)], 0, 100, 2.0
    bad = Row("timm:bad", "vgg", "vgg", "refused", "CaptureError: no <way>")
    then = [asdict(good) | {"refused": [["feeds # consumers", "affine_into_producer", 3]]}]
    page = zoo_page.text([asdict(good), asdict(bad), asdict(Row("timm:none", status="unusable"))], then)
    assert "| timm | 2 | 1 | 0 | 1 | 0 | 0 | 3 | 1 | 0 | 2.0 | 2 |" in page
    assert "* **missed**: timm: 100% captured (1 of 2, 50.0%)" in page
    assert "| `affine_into_producer` | feeds # consumers | 3 | 1 | 1 | 1 |" in page
    assert "* `timm:bad` (refused): CaptureError: no &lt;way>" in page
    assert "1 more do not run" in page


def computes_for_ever(subject, told):
    told({"status": "optimizing"})
    while True:
        pass


def waits_for_ever(subject, told):
    time.sleep(3600)


@pytest.mark.parametrize("task", [computes_for_ever, waits_for_ever])
def test_a_model_is_stopped_by_the_time_that_it_used_itself(task, monkeypatch):
    monkeypatch.setattr(zoo, "_PRELOADED", ())
    monkeypatch.setattr(zoo, "_PATIENCE", 1000 if task is computes_for_ever else 1)
    row = zoo.run(Small("timm", "small", "small", "small"), task=task, seconds=1.0, memory=100.0)
    assert (row["status"], row["message"]) == ("timeout", "stopped after 1 s")
