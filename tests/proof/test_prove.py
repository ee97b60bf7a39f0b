"""A wrong rewrite is found, taken back and named; the rest stands."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.api import DEFAULT
from normfuse.ir.views import Linear, Relu
from normfuse.passes import PASSES
from normfuse.reports.model import PassReport
from tests.zoo import ZOO


class Saboteur:
    """Scales the weights of chosen linears: a rule with a bug."""

    name = "saboteur"

    def __init__(self, factor, *paths):
        self.factor, self.paths = factor, paths

    def __call__(self, graph):
        applied = []
        for node in graph:
            op = graph.view(node, 2)
            if isinstance(op, Linear) and graph.path(node) in self.paths and graph.permit("scale", graph.path(node)):
                graph.replace(node, Linear(op.x, op.W * self.factor, op.b))
                applied.append(graph.site("scale", node))
        return PassReport(self.name, tuple(applied))


class Crash:
    name = "crash"

    def __call__(self, graph):
        for node in graph:
            if isinstance(graph.view(node, 1), Relu):
                graph.fx.erase_node(node)  # raises: the node has users
        raise AssertionError("not reached")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (
        torch.randn(5, 4),
    )


@pytest.mark.parametrize("verify", ["end", "each"])
@pytest.mark.parametrize("wrong", [("0",), ("3",), ("0", "5"), ("0", "3", "5")], ids=len)
def test_wrong_sites_are_taken_back_one_by_one_and_named(verify, wrong):
    model, example = mlp()
    fast = normfuse.optimize(model, example, passes=["expose", "affine", Saboteur(1.001, *wrong), "cleanup"], verify=verify)
    report = normfuse.report(fast)
    assert {site.path for site in report.undone} == set(wrong)
    assert {site.rule for site in report.undone} == {"scale"}
    assert report.norms_after["batch_norm"] == 0  # the sound fold stands
    assert report.exact.max_rel <= 1e-9
    torch.testing.assert_close(fast(*example), model(*example))


def test_an_error_at_the_limit_is_seen():
    model, example = mlp()
    fast = normfuse.optimize(model, example, passes=[Saboteur(1 + 1e-7, "3")])
    assert [site.path for site in normfuse.report(fast).undone] == ["3"]


def test_without_verification_the_wrong_rewrite_stands():
    model, example = mlp()
    fast = normfuse.optimize(model, example, passes=[Saboteur(2.0, "3")], verify="off")
    report = normfuse.report(fast)
    assert report.exact is None
    assert not report.undone
    assert not torch.allclose(fast(*example), model(*example))


def test_a_pass_that_crashes_is_left_out_and_the_others_go_on():
    model, example = mlp()
    report = normfuse.report(normfuse.optimize(model, example, passes=["expose", Crash(), "affine"]))
    assert report.norms_after["batch_norm"] == 0
    assert "the pass failed" in report.undone[0].note


def test_each_reports_the_errors_of_every_pass():
    entry = ZOO["preln_vit"]
    report = normfuse.report(normfuse.optimize(entry.build(), entry.args, verify="each"))
    assert all(p.exact.max_rel <= 1e-9 and p.drift.max_rel < 1e-4 for p in report.passes)
    assert max(p.drift.max_rel for p in report.passes) > 0


def test_random_inputs_find_what_the_example_hides():
    """On an all-zero example any scale of the first weight looks right."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()).eval()
    fast = normfuse.optimize(model, (torch.zeros(2, 4),), passes=[Saboteur(3.0, "0")])
    assert normfuse.report(fast).undone


def test_the_default_pipeline_passes_are_all_registered():
    assert set(DEFAULT) <= set(PASSES)
    assert " ".join(DEFAULT) == (
        "bake cleanup recognise huge_eps select expose affine select bake mean_free affine select bake affine "
        "key_bias realise recognise cleanup"
    )
    assert [name for name, p in PASSES.items() if name in DEFAULT and p.changes] == ["huge_eps"]


class Louder:
    """Scales the weights of chosen linears, and says so."""

    name = "louder"
    changes = "scales chosen weights"

    def __init__(self, factor, *paths):
        self.saboteur = Saboteur(factor, *paths)

    def __call__(self, graph):
        return self.saboteur(graph)


def test_a_change_by_intention_stands_and_what_follows_is_proven_against_it():
    model, example = mlp()
    passes = ["cleanup", Louder(1.01, "3"), "expose", "affine", Saboteur(1.001, "5"), "realise"]
    fast = normfuse.optimize(model, example, passes=passes)
    report = normfuse.report(fast)
    assert [site.path for site in report.undone] == ["5"]  # the wrong rewrite after the change is found all the same
    (louder,) = [p for p in report.passes if p.sqnr is not None]
    assert [site.path for site in louder.applied] == ["3"]
    with torch.no_grad():
        expected = model(*example)
        model[3].weight *= 1.01
        torch.testing.assert_close(fast(*example), model(*example))
        noise = (model(*example) - expected).double()
    assert louder.sqnr == pytest.approx(
        20 * torch.log10(expected.double().norm() / noise.norm()).item(), abs=12
    )  # random inputs too
    assert any("louder scales chosen weights; SQNR" in note for note in report.notes)
    assert report.exact.max_rel <= 1e-9
    assert "dB" in str(report)
    assert normfuse.Report.from_json(report.to_json()) == report


def test_a_change_that_found_nothing_leaves_the_proof_against_the_original():
    model, example = mlp()
    fast = normfuse.optimize(model, example, passes=[Louder(1.01), Saboteur(1.001, "3")])
    report = normfuse.report(fast)
    assert [site.path for site in report.undone] == ["3"]
    assert all(p.sqnr is None for p in report.passes)
    torch.testing.assert_close(fast(*example), model(*example))


def test_default_stands_for_its_passes():
    model, example = mlp()
    named = normfuse.report(normfuse.optimize(model, example, passes=["default", Louder(1.0, "5")]))
    plain = normfuse.report(normfuse.optimize(model, example))
    assert [p.name for p in named.passes][: len(plain.passes)] == [p.name for p in plain.passes]
    assert named.norms_after == plain.norms_after == {"batch_norm": 0}
