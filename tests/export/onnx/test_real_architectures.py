"""Hugging Face and timm architectures with random weights: captured, optimized, exported, run at other sizes."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.export import to_onnx
from tests.export.models import AUTO, outputs, relative
from tests.zoo_entry import randomise_norms

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _hf(name, **config):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config.pop("config"))(**config))


def _vit():
    vit = pytest.importorskip("timm.models.vision_transformer")
    return vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, init_values=0.1)


def _swin():
    swin = pytest.importorskip("timm.models.swin_transformer")
    return swin.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )


def _beit():
    beit = pytest.importorskip("timm.models.beit")
    return beit.Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, use_rel_pos_bias=True)


def _cnn():
    densenet = pytest.importorskip("timm.models.densenet")
    return densenet.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=5)


def _ids(batch, length):
    return {"input_ids": torch.randint(3, 50, (batch, length))}


def _padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return _ids(batch, length) | {"attention_mask": mask}


def _pairs(batch, length):
    return _ids(batch, length) | {"decoder_input_ids": torch.randint(3, 50, (batch, length + 2))}


def _image(batch, length):
    return {"x": torch.randn(batch, 3, 32, 32)}


def _pixels(batch, length):
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


MODELS = {
    "bert": (lambda: _hf("BertModel", config="BertConfig", **SMALL), _padded, "qkv"),
    "bert without mask": (lambda: _hf("BertModel", config="BertConfig", **SMALL), _ids, "qkv"),
    "gpt2": (
        lambda: _hf("GPT2LMHeadModel", config="GPT2Config", n_layer=2, n_embd=32, n_head=2, vocab_size=50, **TOKENS),
        _ids,
        "qkv",
    ),
    "opt": (
        lambda: _hf("OPTForCausalLM", config="OPTConfig", **SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}, **TOKENS),
        _padded,
        "qkv",
    ),
    "t5": (
        lambda: _hf("T5Model", config="T5Config", num_layers=2, d_model=32, num_heads=2, d_kv=16, d_ff=64, vocab_size=50),
        _pairs,
        "mha",
    ),
    "llama": (lambda: _hf("LlamaForCausalLM", config="LlamaConfig", **SMALL, num_key_value_heads=1, **TOKENS), _ids, "mha"),
    "clip": (
        lambda: _hf(
            "CLIPVisionModel",
            config="CLIPVisionConfig",
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            image_size=32,
            patch_size=8,
        ),
        _pixels,
        "qkv",
    ),
    "vit": (_vit, _image, "qkv"),
    "swin": (_swin, _image, "qkv"),
    "beit": (_beit, _image, "qkv"),
    "densenet": (_cnn, _image, None),
}


def _without_cache(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "use_cache"):
            module.config.use_cache = False
    return model


def _shapes(inputs):
    return {k: dict.fromkeys(range(2 if v.ndim == 2 else 1), AUTO) for k, v in inputs.items()}


@pytest.mark.parametrize("form", ["decomposed", "mha", "qkv"])
@pytest.mark.parametrize("name", MODELS)
def test_optimized_and_exported(tmp_path, name, form):
    build, make, best = MODELS[name]
    model = _without_cache(randomise_norms(build()).eval())
    inputs = make(2, 6)
    fast = normfuse.optimize(model, inputs, dynamic_shapes=_shapes(inputs), verify="off")
    result = to_onnx(fast, tmp_path / "model.onnx", attention=form, threads=1, progress=False)
    assert result.error.max_rel < 1e-4
    if form == "qkv" and best is not None:
        assert best in result.attention_sites
    for batch, length in ((2, 6), (3, 11)):
        inputs = make(batch, length)
        got = outputs(result, **inputs)
        want = model(**inputs)
        first = want if isinstance(want, torch.Tensor) else want[0]
        assert relative(got[result.outputs[0]], first) < 1e-4
    if name in ("densenet", "vit"):
        assert not {"BatchNormalization", "LayerNormalization"} & {k for k in result.norms if name == "vit"}
