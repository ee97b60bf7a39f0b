"""Example inputs that models declare by themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.given.declared_inputs import declared_inputs


def test_module_of_nobody_declares_nothing() -> None:
    assert declared_inputs(nn.Linear(2, 2)) is None


def test_declared_inputs_repeat_and_leave_the_generator_alone() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, depth=1).eval().double()
    state = torch.get_rng_state()
    (a,), _ = declared_inputs(model)  # type: ignore[misc]
    (b,), _ = declared_inputs(model)  # type: ignore[misc]
    assert a.shape == (2, 1, 32, 32)  # as built: neither 224 pixels nor three channels
    assert a.dtype is torch.float64
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    model(a)


def _bert(t: Any) -> nn.Module:
    return t.BertModel(
        t.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    )


def _gpt2(t: Any) -> nn.Module:
    return t.GPT2LMHeadModel(
        t.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=12, bos_token_id=0, eos_token_id=0)
    )


def _distilbert(t: Any) -> nn.Module:
    return t.DistilBertModel(t.DistilBertConfig(n_layers=1, dim=16, hidden_dim=16, n_heads=2, vocab_size=40))


def _whisper(t: Any) -> nn.Module:
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 12, "num_mel_bins": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return t.WhisperModel(t.WhisperConfig(vocab_size=40, d_model=16, **layers, **heads, **ids))


def _t5(t: Any) -> nn.Module:
    return t.T5Model(t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _vit(t: Any) -> nn.Module:
    return t.ViTModel(t.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32))


def _clip(t: Any) -> nn.Module:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}))


def _wav2vec2(t: Any) -> nn.Module:
    return t.Wav2Vec2Model(
        t.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(16,) * 7, vocab_size=40,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "names"),
    [
        pytest.param(_bert, {"input_ids", "attention_mask", "token_type_ids"}, id="encoder"),
        pytest.param(_distilbert, {"input_ids", "attention_mask"}, id="encoder of one sentence"),
        pytest.param(_gpt2, {"input_ids", "attention_mask", "use_cache"}, id="decoder"),
        pytest.param(_t5, {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}, id="encoder-decoder"),
        pytest.param(_vit, {"pixel_values"}, id="images"),
        pytest.param(_clip, {"input_ids", "attention_mask", "pixel_values"}, id="text and images"),
        pytest.param(_whisper, {"input_features", "decoder_input_ids", "use_cache"}, id="spectrograms"),
        pytest.param(_wav2vec2, {"input_values"}, id="audio"),
    ],
)
def test_hugging_face_models_run_on_what_they_declare(build: Callable[[Any], nn.Module], names: set[str]) -> None:
    model = build(pytest.importorskip("transformers")).eval()
    args, kwargs = declared_inputs(model)  # type: ignore[misc]
    assert args == ()
    assert kwargs.keys() == names
    assert all(v.shape[0] == 2 for v in kwargs.values() if isinstance(v, torch.Tensor))
    with torch.no_grad():
        found = model(**kwargs)
    assert "past_key_values" not in found


def test_tokens_fit_the_positions_of_the_model() -> None:
    model = _gpt2(pytest.importorskip("transformers"))
    kwargs = declared_inputs(model, tokens=100)[1]  # type: ignore[index]
    assert kwargs["input_ids"].shape == (2, 10)


def test_masks_hold_padding_and_sentences_differ() -> None:
    kwargs = declared_inputs(_bert(pytest.importorskip("transformers")), batch=3, tokens=8)[1]  # type: ignore[index]
    assert kwargs["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8, [1] * 6 + [0] * 2]
    assert kwargs["token_type_ids"][0].tolist() == [0] * 4 + [1] * 4


def test_a_mask_changes_what_the_model_says() -> None:
    model = _bert(pytest.importorskip("transformers")).eval()
    kwargs = declared_inputs(model, batch=1)[1]  # type: ignore[index]
    with torch.no_grad():
        masked, whole = (model(**kwargs | {"attention_mask": m})[0] for m in (kwargs["attention_mask"], torch.ones(1, 16).long()))
    assert not torch.allclose(masked, whole)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        pytest.param({"model_input_names": ["input_ids", "attention_mask"]}, {"input_ids", "attention_mask"}, id="stated"),
        pytest.param({"tokenizer_class": "RobertaTokenizer"}, {"input_ids", "attention_mask"}, id="of the class"),
        pytest.param({"tokenizer_class": "pipeline"}, {"input_ids", "attention_mask", "token_type_ids"}, id="no class"),
        pytest.param({"model_input_names": ["input_ids", "unknown"]}, {"input_ids"}, id="unknown to the model"),
        pytest.param([], {"input_ids", "attention_mask", "token_type_ids"}, id="damaged"),
    ],
)
def test_the_tokenizer_of_the_folder_says_what_it_gives(tmp_path: Path, settings: Any, names: set[str]) -> None:
    model = _bert(pytest.importorskip("transformers"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model.config._name_or_path = str(tmp_path)
    assert declared_inputs(model)[1].keys() == names  # type: ignore[index]


def test_detectors_take_a_list_of_images() -> None:
    tv = pytest.importorskip("torchvision")
    model = tv.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    (images,), _ = declared_inputs(model)  # type: ignore[misc]
    assert [tuple(image.shape) for image in images] == [(3, 320, 320)] * 2
