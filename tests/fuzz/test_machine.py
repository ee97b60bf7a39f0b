"""The machine that looks for faults: models are the same each time, wrong results are seen, and shrinking keeps the failure."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import CaptureError
from tests.fuzz.compare import aliases, deviation, form
from tests.fuzz.emit import BLOCKS, Emitter, Invalid, build, emitted
from tests.fuzz.generate import generate
from tests.fuzz.oracle import arguments, judge
from tests.fuzz.run import by_kind, done, run
from tests.fuzz.shrink import script, shrink
from tests.fuzz.spec import Input, Mode, Spec, Step

RESIDUAL = Spec(
    7, "float32", (Input("x", "tokens", (2, 3, 4)),),
    (
        Step("v0", "layer_norm", ("x",), 1),
        Step("v1", "same_linear", ("v0",), 2),
        Step("v2", "add", ("x", "v1"), 3),
        Step("v3", "activation", ("v2",), 4),
    ),
    ("v3",), "tensor", Mode(),
)  # fmt: skip


class Wrapped(nn.Module):
    """What a broken optimizer would return."""

    def __init__(self, fast, after):
        super().__init__()
        self.fast, self.after, self.graph, self.meta = fast, after, fast.graph, fast.meta

    def forward(self, *args):
        return self.after(self.fast(*args), *args)


def broken(monkeypatch, after):
    optimize = normfuse.optimize

    def wrong(model, *args, **kwargs):
        return Wrapped(optimize(model, *args, **kwargs), after)

    monkeypatch.setattr(normfuse, "optimize", wrong)
    monkeypatch.setattr(normfuse, "report", lambda _: normfuse.Report())


def kinds(spec):
    return [f.kind for f in judge(spec).failures]


def test_there_are_blocks_of_every_kind():
    assert len(BLOCKS) >= 100
    assert {b.reads[0] for b in BLOCKS.values()} == {"float", "image", "tokens", "sequence", "table", "volume", "ids"}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_seed_is_a_model(seed):
    spec = generate(seed)
    assert spec == generate(seed)
    first, second = build(spec), build(spec)
    assert first.source == second.source == emitted(spec)
    for a, b in zip(first.module.state_dict().values(), second.module.state_dict().values(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_right_result_passes():
    outcome = judge(RESIDUAL)
    assert (outcome.state, outcome.failures) == ("ok", [])
    assert outcome.blocks == ("layer_norm", "same_linear", "add", "activation")


@pytest.mark.parametrize(
    ("after", "kind"),
    [
        (lambda y, x: y * 1.001, "wrong value"),
        (lambda y, x: torch.where(y == y.amax(), torch.nan, y), "NaN or Inf elsewhere"),
        (lambda y, x: y.double(), "wrong dtype"),
        (lambda y, x: y[:1], "wrong shape"),
        (lambda y, x: (y,), "wrong structure"),
        (lambda y, x: x.copy_(y), "memory: nobody became an input"),
        (lambda y, x: {}["y"], "the result raises KeyError: 'y'"),
    ],
)
def test_a_wrong_result_is_seen(monkeypatch, after, kind):
    broken(monkeypatch, after)
    assert kind in kinds(RESIDUAL)


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (lambda model, x: model.get_parameter("norm1.weight").mul_(2), "the original's parameters or buffers changed"),
        (lambda model, x: model.train(), "the original's modules, mode or hooks changed"),
        (lambda model, x: x.add_(1), "the example inputs changed"),
        (lambda model, x: torch.rand(1), "the random state changed"),
        (lambda model, x: {}["y"], "optimize raises KeyError: 'y'"),
    ],
)
def test_harm_to_the_original_is_seen(monkeypatch, harm, kind):
    optimize = normfuse.optimize

    def harmful(model, example, **kwargs):
        fast = optimize(model, example, **kwargs)
        harm(model, example[0])
        return fast

    monkeypatch.setattr(normfuse, "optimize", harmful)
    assert kind in kinds(RESIDUAL)


def test_a_refusal_is_right_only_where_torch_refuses(monkeypatch):
    def refuse(*args, **kwargs):
        raise CaptureError("cannot be captured")

    monkeypatch.setattr(normfuse, "optimize", refuse)
    assert kinds(RESIDUAL) == ["refused what torch.export takes: cannot be captured"]
    without = judge(replace(RESIDUAL, mode=Mode(with_inputs=False)))
    assert (without.state, without.note, without.failures) == ("refused", "cannot be captured", [])


def test_another_size_is_asked_for():
    emitter = Emitter("float32", RESIDUAL.inputs, 0)
    assert emitter.values["x"].shape == (2, 3, 4)
    assert arguments(RESIDUAL, grow=(1, 2))[0][0].shape == (3, 5, 4)
    free = replace(RESIDUAL, mode=Mode(dynamic="batch and size"))
    assert judge(free).state == "ok"


def test_shrinking_leaves_what_fails():
    def fails(spec):
        return "layer_norm" in [s.block for s in spec.steps]

    small = shrink(replace(RESIDUAL, dtype="float64", mode=Mode("end", keywords=True)), fails)
    assert [s.block for s in small.steps] == ["layer_norm"]
    assert (small.dtype, small.mode, small.outputs) == ("float32", Mode(), ("v0",))


def test_the_script_runs(capsys):
    exec(compile(script(RESIDUAL, "said"), "script", "exec"), {"__name__": "script"})
    assert capsys.readouterr().out.count("tensor(") == 2


def test_a_step_that_does_not_fit_leaves_nothing():
    emitter = Emitter("float32", RESIDUAL.inputs, 0)
    before = emitter.source(("x",), "tensor")
    with pytest.raises(Invalid, match="does not read"):
        emitter.apply(Step("v0", "conv2d", ("x",), 0))
    with pytest.raises(Invalid, match="is not there"):
        emitter.apply(Step("v0", "layer_norm", ("y",), 0))
    assert emitter.source(("x",), "tensor") == before


def test_comparison():
    a = torch.tensor([1.0, torch.nan, torch.inf])
    assert deviation([a], [a.clone()]) == 0
    assert deviation([a], [torch.tensor([1.0, torch.inf, torch.nan])]) == float("inf")
    assert deviation([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == 1
    assert deviation([torch.ones(2)], [torch.full((2,), 1.5)]) == pytest.approx(0.5, rel=1e-5)
    assert form({"a": a}, {"b": a}).kind == "structure"
    assert form((a, None), (a, None)) is None
    layer = nn.Linear(2, 2)
    x = torch.ones(2)
    assert aliases(layer, [x], (x.view(2, 1), layer.weight, x + 1, x)) == ["an input", "a weight", "nobody", "an input"]


def test_results_are_kept_and_counted(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(
        '{"seed": 3, "failures": [{"kind": "a"}]}\n{"seed": 1, "failures": [{"kind": "a"}, {"kind": "b"}]}\n{"seed": 2, "fai'
    )
    assert [r["seed"] for r in done(path)] == [3, 1]
    assert by_kind(done(path)) == {"a": [1, 3], "b": [1]}


@pytest.mark.slow
def test_a_case_that_takes_too_long_costs_its_case_alone():
    from tests.fuzz.generate import Options

    (found,) = run([1], Options(), limit=0.0)
    assert (found["seed"], found["state"], found["failures"][0]["kind"]) == (1, "failed", "takes too long")
