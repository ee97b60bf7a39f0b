"""What a tokenizer or an image processor gives feeds the file that was exported from the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli_runner import runner
from tests.zoo_entry import randomise_norms

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a norm is folded into the weights that stand beside it",
    "padding at the end of a text must not change what the model says",
    "tokens, masks and types: three rows of numbers",
] * 8
TEXTS = ["the fox folds a norm", "the quick brown fox jumps over the lazy dog and the weights that stand beside it", "a dog"]


def word_pieces(folder: Path, cls: str) -> Any:
    made = tokenizers.BertWordPieceTokenizer()
    made.train_from_iterator(CORPUS, vocab_size=120, min_frequency=1, show_progress=False)
    made.save_model(str(folder))
    return getattr(transformers, cls)(vocab=str(folder / "vocab.txt"))


def byte_pairs(folder: Path, cls: str, special: list[str]) -> Any:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(CORPUS, vocab_size=320, min_frequency=1, special_tokens=special, show_progress=False)
    made.save_model(str(folder))
    return getattr(transformers, cls)(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def unigrams(folder: Path) -> Any:
    model = tokenizers.SentencePieceUnigramTokenizer()
    model.train_from_iterator(
        CORPUS, vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    ending = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model._tokenizer.post_processor = ending
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


def bert(folder: Path) -> tuple[Any, Any]:
    return word_pieces(folder, "BertTokenizer"), transformers.BertModel(transformers.BertConfig(vocab_size=200, **SMALL))


def distilbert(folder: Path) -> tuple[Any, Any]:
    config = transformers.DistilBertConfig(vocab_size=200, dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=64)
    return word_pieces(folder, "DistilBertTokenizer"), transformers.DistilBertModel(config)


def electra(folder: Path) -> tuple[Any, Any]:
    config = transformers.ElectraConfig(vocab_size=200, embedding_size=16, **SMALL)
    return word_pieces(folder, "ElectraTokenizer"), transformers.ElectraModel(config)


def roberta(folder: Path) -> tuple[Any, Any]:
    tokenizer = byte_pairs(folder, "RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer, transformers.RobertaModel(transformers.RobertaConfig(vocab_size=320, **SMALL))


def clip_text(folder: Path) -> tuple[Any, Any]:
    tokenizer = byte_pairs(folder, "CLIPTokenizer", ["<|startoftext|>", "<|endoftext|>"])
    config = transformers.CLIPTextConfig(vocab_size=320, bos_token_id=0, eos_token_id=1, pad_token_id=1, **SMALL)
    return tokenizer, transformers.CLIPTextModel(config)


def t5_encoder(folder: Path) -> tuple[Any, Any]:
    config = transformers.T5Config(vocab_size=120, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return unigrams(folder), transformers.T5EncoderModel(config)


def lively(model: Any) -> Any:
    """Weights large enough that attention, and its mask, matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=0.25)
    return randomise_norms(model).eval()


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Exports the folder `model` with the given free axes; returns the file."""
    with runner("nothing", "", tmp_path, monkeypatch, capsys) as command:

        def exported(axes: str) -> Path:
            code, _, told = command("export", "hf:model", "-o", "model.onnx", "--dynamic", axes, "--target", "portable", "-q")
            assert code == 0, told
            return tmp_path / "model.onnx"

        yield exported


def run(file: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    opened = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in opened.get_outputs()], opened.run(None, feeds), strict=True))


@pytest.mark.parametrize(
    "build", [pytest.param(f, id=f.__name__) for f in (bert, distilbert, electra, roberta, clip_text, t5_encoder)]
)
def test_a_tokenizer_feeds_the_file(build: Any, tmp_path: Path, export: Any) -> None:
    tokenizer, model = build(tmp_path)
    folder = tmp_path / "model"
    lively(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = export("batch,seq")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXTS, padding=True, return_tensors="np")
    assert 0 in given["attention_mask"]
    feeds = {k: v.astype(np.int64) for k, v in given.items()}
    have = run(file, feeds)
    with torch.no_grad():
        want = model(**{k: torch.from_numpy(v) for k, v in feeds.items()})
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
    # the mask is read: without it the padded rows say something else
    bare = run(file, feeds | {"attention_mask": np.ones_like(feeds["attention_mask"])})
    assert build is clip_text or not np.allclose(bare["last_hidden_state"], have["last_hidden_state"], atol=1e-3)


def check_images(model: Any, processor: Any, sizes: tuple[int, int], folder: Path, export: Any) -> None:
    """What the processor of a folder makes of three images feeds the file, and gives what the model gives."""
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    file = export("batch")
    images = list(np.random.default_rng(0).integers(0, 256, (3, *sizes, 3), dtype=np.uint8))
    given = transformers.AutoImageProcessor.from_pretrained(folder / "model")(images=images, return_tensors="np")
    have = run(file, dict(given))
    with torch.no_grad():
        want = model(pixel_values=torch.from_numpy(given["pixel_values"]))
    np.testing.assert_allclose(have["last_hidden_state"], want.last_hidden_state.numpy(), rtol=1e-4, atol=1e-4)


def test_an_image_processor_feeds_the_file(tmp_path: Path, export: Any) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    check_images(lively(transformers.ViTModel(config)), processor, (48, 40), tmp_path, export)


def test_the_processor_says_how_large_images_are(tmp_path: Path, export: Any) -> None:
    """A convolutional network has no size of its own; its processor has."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=1.0)
    check_images(lively(transformers.ResNetModel(config)), processor, (64, 64), tmp_path, export)
