"""Every pass on every model of the zoo: the result is the same function, and what remains is explained."""

import inspect

import pytest
import torch

import normfuse
from tests.tolerances import IDENTITY, TOLERANCES
from tests.zoo import ZOO

# norms left by the default pipeline, by kind; a model that is not listed keeps none of its BatchNorms and LayerNorms
LEFT = {
    "bn_last": {"batch_norm": 1},
    "no_running_stats": {"batch_norm": 2},
    "forked_conv": {"batch_norm": 2},
    "preact_resnet": {"batch_norm": 3},
    "densenet": {"batch_norm": 3},
    "negative_scale": {"batch_norm": 1},
    "dropout_everywhere": {"batch_norm": 1},
    "crepe_like": {"batch_norm": 2},
    "gamma_zero": {"batch_norm": 1},
    "postln_bert": {"layer_norm": 5},
    "embedding_norm": {"layer_norm": 1},
    "ln_pre": {"layer_norm": 1},
    "stream_as_output": {"layer_norm": 5},
    "swin_like": {"layer_norm": 3},
    "hand_written_norms": {"layer_norm": 1},
    "hand_written": {"layer_norm": 1},
    "mixed_vit": {"layer_norm": 2},
}


def inputs(name):
    entry, model = ZOO[name], ZOO[name].build()
    if not entry.kwargs:
        return model, entry.args
    return model, dict(inspect.signature(model.forward).bind(*entry.args, **entry.kwargs).arguments)


@pytest.mark.parametrize("name", ZOO)
def test_default_pipeline(name):
    """One result and all that is asked of it: an identity that leaves what is expected, shares nothing and is final."""
    model, example = inputs(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    fast = normfuse.optimize(model, example)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    _is_expected(name, normfuse.report(fast))
    _changes_no_more(fast)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _is_expected(name, report):
    assert report.exact.max_rel <= IDENTITY
    assert report.drift.max_rel <= TOLERANCES[torch.float32].rtol
    assert not report.undone
    left = {k: n for k, n in report.norms_after.items() if n and k in ("batch_norm", "layer_norm")}
    assert left == LEFT.get(name, {})
    explained = {site.path for site in report.refused}
    assert len(explained) >= sum(left.values())


def _changes_no_more(once):
    twice = normfuse.optimize(once)
    assert not normfuse.report(twice).applied
    assert [str(n.target) for n in twice.graph.nodes] == [str(n.target) for n in once.graph.nodes]
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_passes_in_another_order_are_identities(name):
    """Each order starts from the same capture, which is the model as well."""
    model, example = inputs(name)
    captured = normfuse.optimize(model, example, passes=[])
    assert normfuse.report(captured).exact.max_rel <= IDENTITY
    for chosen in (["expose", "affine"], ["mean_free", "expose", "affine"]):
        report = normfuse.report(normfuse.optimize(captured, passes=chosen))
        assert report.exact.max_rel <= IDENTITY, chosen
        assert not report.undone, chosen


def test_affine_finds_nothing_that_was_not_exposed():
    model, example = inputs("preln_vit")
    report = normfuse.report(normfuse.optimize(model, example, passes=["affine"]))
    assert not report.applied
    assert not report.undone


def test_a_write_that_a_view_may_show_is_refused_without_shapes():
    with pytest.raises(normfuse.CaptureError, match="writes in place"):
        normfuse.optimize(ZOO["in_place"].build())


@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if e.traceable and n != "in_place"])
def test_without_example_inputs_the_result_is_the_same_function(name):
    entry, model = ZOO[name], ZOO[name].build()
    fast = normfuse.optimize(model)
    with torch.no_grad():
        expected, found = model(*entry.args, **entry.kwargs), fast(*entry.args, **entry.kwargs)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found), strict=True):
        torch.testing.assert_close(
            b, a, rtol=TOLERANCES[torch.float32].rtol, atol=TOLERANCES[torch.float32].rtol * float(a.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["cnn_bn", "preln_gpt", "llama_rms", "preln_vit"])
def test_half_precision_weights_are_folded_in_float64_and_cast_once(name, dtype):
    model, example = inputs(name)
    model = model.to(dtype)
    example = torch.utils._pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, example)
    fast = normfuse.optimize(model, example)
    report = normfuse.report(fast)
    assert report.exact.max_rel <= IDENTITY
    assert report.drift.dtype == str(dtype).removeprefix("torch.")
    assert report.drift.max_rel <= TOLERANCES[dtype].rtol
    assert {p.dtype for p in fast.parameters()} == {dtype}
