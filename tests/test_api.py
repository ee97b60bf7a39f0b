"""The public call: what it takes, what it gives back, what it says when something is wrong."""

import logging

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import CaptureError, UsageError
from normfuse.reports.report import Report
from tests.zoo import ZOO, randomise_norms


def conv_bn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    randomise_norms(model)
    return model, torch.randn(2, 3, 8, 8)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x, *, scale=None, mask=None):
        y = self.norm(self.linear(x))
        y = y if scale is None else y * scale
        y = y if mask is None else y.masked_fill(mask, 0.0)
        return {"y": y, "pair": (y.sum(), mask)}


def test_an_exported_program_and_a_graph_module_are_taken():
    model, x = conv_bn()
    program = torch.export.export(model, (x,))
    for source in (program, program.module(), torch.fx.symbolic_trace(model)):
        fast = normfuse.optimize(source, (x,))
        assert normfuse.report(fast).norms_after["batch_norm"] == 0
        torch.testing.assert_close(fast(x), model(x))
    assert normfuse.report(normfuse.optimize(program)).exact is not None


def test_keyword_inputs_and_nested_outputs_come_back():
    model = Named().eval()
    example = {"x": torch.randn(3, 4), "scale": torch.randn(4), "mask": torch.rand(3, 4) > 0.5}
    fast = normfuse.optimize(model, example)
    found, expected = fast(**example), model(**example)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["y"], expected["y"])
    assert torch.equal(found["pair"][1], expected["pair"][1])


def test_a_training_model_is_optimized_as_in_eval_with_a_warning(caplog):
    model, x = conv_bn()
    expected = model(x)
    model.train()
    with caplog.at_level(logging.WARNING, logger="normfuse"):
        fast = normfuse.optimize(model, (x,))
    assert "training mode" in caplog.text
    assert any("training mode" in note for note in normfuse.report(fast).notes)
    assert model.training
    assert not fast.training
    torch.testing.assert_close(fast(x), expected)


def test_batch_and_sequence_length_stay_free():
    entry = ZOO["preln_gpt"]
    model = entry.build()
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    fast = normfuse.optimize(model, entry.args, dynamic_shapes=(dims,))
    assert normfuse.report(fast).norms_after == {"layer_norm": 0, "rms_norm": 5}
    for shape in ((1, 3), (4, 7)):
        ids = torch.randint(0, 5, shape)
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_tied_weights_are_neither_doubled_nor_corrupted():
    entry = ZOO["preln_gpt"]
    report = normfuse.report(normfuse.optimize(entry.build(), entry.args))
    assert report.parameters_after <= report.parameters_before * 1.05


def test_names_of_weights_are_kept():
    model, x = conv_bn()
    fast = normfuse.optimize(model, (x,))
    assert set(fast.state_dict()) == {"0.weight", "0.bias"}


def test_report_round_trips_through_json():
    model, x = conv_bn()
    report = normfuse.report(normfuse.optimize(model, (x,)))
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"passes": ["afine"]}, "did you mean 'affine'", id="misspelt pass"),
        pytest.param({"passes": "affine"}, "a list of names", id="string of passes"),
        pytest.param({"passes": [3]}, "neither a name nor a pass", id="not a pass"),
        pytest.param({"verify": "always"}, "expected one of 'end', 'each', 'off'", id="verify"),
        pytest.param({"example_inputs": 3}, "a tuple of inputs or a dictionary", id="example inputs"),
        pytest.param({"quantize": 4}, "expected a normfuse.ShiftQuant", id="quantize"),
        pytest.param({"calibration": torch.zeros(1)}, "iterable of batches", id="calibration-tensor"),
        pytest.param({"calibration": []}, "no batch", id="calibration-empty"),
        pytest.param({"calibration": [torch.zeros(1, 1)]}, "batch 0 .* does not run", id="calibration-shape"),
    ],
)
def test_wrong_arguments_are_one_clear_error(arguments, message):
    model, _ = conv_bn()
    with pytest.raises(UsageError, match=message):
        normfuse.optimize(model, **arguments)


def test_what_is_no_model_is_refused():
    with pytest.raises(UsageError, match=r"expected a torch\.nn\.Module"):
        normfuse.optimize(lambda x: x, (torch.ones(1),))


@pytest.mark.parametrize(
    "example", [(torch.randn(2, 4, 8, 8),), (), (torch.randn(2, 3, 8, 8), torch.ones(1))], ids=["channels", "none", "too many"]
)
def test_inputs_that_do_not_fit_are_a_capture_error_that_shows_them(example):
    model, _ = conv_bn()
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        normfuse.optimize(model, example)


def test_a_module_without_a_report_is_told_apart():
    with pytest.raises(UsageError, match="no report"):
        normfuse.report(nn.Linear(1, 1))


def test_a_model_that_writes_a_buffer_is_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    with pytest.raises(CaptureError, match="buffer"):
        normfuse.optimize(Counter(), (torch.ones(4),))


def test_half_of_the_result_leaves_the_original_alone():
    model, x = conv_bn()
    normfuse.optimize(model, (x,)).half()
    assert model[0].weight.dtype == torch.float32


def test_a_hugging_face_model_declares_its_inputs_and_keeps_its_signature():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    fast = normfuse.optimize(model)
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert any("past_key_values" in note for note in report.notes)
    assert model.config.use_cache
    ids, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    torch.testing.assert_close(fast(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_lost_cache_is_told_where_the_call_returned_one(kind, asked):
    transformers = pytest.importorskip("transformers")
    if kind == "decoder":
        model = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16))
    else:
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
        model = transformers.BertModel(transformers.BertConfig(**sizes, use_cache=True))
    example = {"input_ids": torch.randint(0, 40, (2, 7))} | ({} if asked or kind == "encoder" else {"use_cache": False})
    report = normfuse.report(normfuse.optimize(model.eval(), example, passes=["cleanup"]))
    assert any("past_key_values" in note for note in report.notes) == (kind == "decoder" and asked)
    assert model.config.use_cache


def test_a_timm_model_declares_its_inputs_for_any_batch():
    timm = pytest.importorskip("timm")
    model = randomise_norms(timm.create_model("resnet10t", num_classes=5).eval())
    fast = normfuse.optimize(model)
    assert normfuse.report(fast).exact.max_rel <= 1e-9
    x = torch.randn(3, 3, 176, 176)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "passes", [["realise", "expose", "affine"], ["expose", "realise", "mean_free", "cleanup"], ["expose"]], ids="-".join
)
def test_no_order_of_passes_leaves_an_affine_behind(passes):
    entry = ZOO["preln_gpt"]
    fast = normfuse.optimize(entry.build(), entry.args, passes=passes)
    assert all(n.op != "call_function" or "affine" not in str(n.target) for n in fast.graph.nodes)
    assert normfuse.report(fast).exact.max_rel <= 1e-9
