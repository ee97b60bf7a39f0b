"""Example inputs that models declare by themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.declared_inputs import declared_inputs


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
        pytest.param(_bert, {"input_ids"}, id="encoder"),
        pytest.param(_gpt2, {"input_ids", "use_cache"}, id="decoder"),
        pytest.param(_t5, {"input_ids", "decoder_input_ids", "use_cache"}, id="encoder-decoder"),
        pytest.param(_vit, {"pixel_values"}, id="images"),
        pytest.param(_clip, {"input_ids", "pixel_values"}, id="text and images"),
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
