"""What works on a copy: hooks, compilation, training, saving, and the libraries that people put on top."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import normfuse
from normfuse.app.random_norms import randomise_norms
from tests.folding.models import IMAGE, PreNorm, classes, folded, reasons
from tests.tolerances import TOLERANCES


def test_hooks_compile_pruning_and_pickle():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    made = folded(model)
    seen.clear()
    made(IMAGE)
    assert seen == ["Identity"]  # who listened to the norm hears the same values
    torch.testing.assert_close(torch.compile(made, backend="aot_eager")(IMAGE), made(IMAGE))
    model[1]._forward_hooks.clear()
    made = folded(model)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert normfuse.report(again) == normfuse.report(made)
    prune.l1_unstructured(made[0], "weight", 0.5)
    assert made(IMAGE).shape == model(IMAGE).shape


def test_it_trains_and_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4), nn.LayerNorm(4))
    model[3].requires_grad_(False)
    made = folded(model).train()
    assert {n for n, p in made.named_parameters() if not p.requires_grad} == {"3.weight", "3.bias"}
    step = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(3):
        loss = (made(IMAGE) - 1).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_torchao_quantizes_it():
    quantization = pytest.importorskip("torchao.quantization")
    model = PreNorm(64)
    x = torch.randn(4, 5, 8)
    made = folded(model, (x,))
    quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=0.1 * float(model(x).abs().max()))
    assert type(made.mlp.weight) is not nn.Parameter


def test_adapters_fit():
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 5, 8)
    made = folded(PreNorm(), (x,))
    adapted = peft.get_peft_model(copy.deepcopy(made), peft.LoraConfig(target_modules=["mlp"], r=2))
    torch.testing.assert_close(adapted(x), made(x))


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 101}


@pytest.mark.parametrize(
    ("config", "options", "converted"),
    [
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101, "tie_word_embeddings": False}, 4),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101}, 0),  # its embedding is its head
        ("GPTNeoXConfig", TINY, 4),
        ("LlamaConfig", TINY, 0),
        ("GemmaConfig", {**TINY, "head_dim": 16, "num_key_value_heads": 1}, 0),
    ],
)
def test_what_from_pretrained_makes_of_it_gives_the_same_tokens(config, options, converted, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (1, 7))
    config = getattr(transformers, config)(**options, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = randomise_norms(transformers.AutoModelForCausalLM.from_config(config), seed=0).eval()
    made = normfuse.fold(model, {"input_ids": ids})
    assert type(made) is type(model)
    assert normfuse.report(made).norms_after.get("rms_norm", 0) - normfuse.report(made).norms_before.get("rms_norm", 0) == converted
    assert set(made.state_dict()) == set(model.state_dict())
    made.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, made, again)]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert made.config.use_cache is model.config.use_cache


def test_batch_norm_that_a_configuration_brings_back_stays():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = randomise_norms(transformers.ResNetModel(config), seed=0).eval()
    made = normfuse.fold(model, {"pixel_values": torch.randn(1, 3, 32, 32)})
    assert classes(made) == classes(model)
    assert "is rebuilt from its configuration" in reasons(made)


def test_state_dict_of_the_model_does_not_pass_for_that_of_the_copy():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**{k: v for k, v in TINY.items() if k != "vocab_size"}, image_size=16, patch_size=8)
    model = randomise_norms(transformers.ViTModel(config), seed=0).eval()
    made = normfuse.fold(model, {"pixel_values": torch.randn(2, 3, 16, 16)})
    assert normfuse.report(made).norms_after["layer_norm"] == 1  # the last one is an output
    made.load_state_dict(made.state_dict())
    with pytest.raises(RuntimeError, match="is folded and takes no gain and shift"):
        made.load_state_dict(model.state_dict())


def test_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit")
    made = folded(model, (torch.randn(2, 3, 160, 160),))
    kinds = classes(made)
    assert "LayerNorm" not in kinds
    assert kinds.count("RMSNorm") == 13
    larger = torch.rand(1, 3, 192, 192)
    with torch.no_grad():
        torch.testing.assert_close(made(larger), model(larger), rtol=0, atol=TOLERANCES[torch.float32].rtol)


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}, {}], ids=["no-bias", "no-affine", "affine"])
def test_norms_are_saved_with_what_they_had(options):
    """As in MPT, whose LayerNorms have no bias."""

    class Saved(nn.Sequential):
        def save_pretrained(self, path):
            raise NotImplementedError

    def make():
        return Saved(nn.Linear(8, 8), nn.LayerNorm(8, **options), nn.Linear(8, 4)).half()

    model = randomise_norms(make(), seed=0).eval()
    x = torch.randn(4, 8).half()
    made = normfuse.fold(model, (x,))
    assert type(made[1]) is nn.RMSNorm
    assert {k: (v.dtype, v.shape) for k, v in made.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }
    again = make().eval()
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=2e-2)
