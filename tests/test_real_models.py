"""The loaders reproduce what the models are known to do on real inputs."""

import numpy as np
import pytest
import torch
from torch import nn

from tests import real_models as real


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


@torch.no_grad()
def test_efficientnet_lite0_names_18_of_20_photos() -> None:
    images, labels = real.labelled_photos()
    model = real.efficientnet_lite0()
    logits = model(real.lite_input(images))
    assert (real.top_k(logits, labels), real.top_k(logits, labels, 5)) == (18, 19)
    assert count(model, nn.BatchNorm2d) == 49


@torch.no_grad()
def test_mobilenet_v2_finds_the_mirrored_photo() -> None:
    model = real.mobilenet_v2()
    x = real.imagenet_input([real.photo(name) for name in real.PHOTOS])
    embeddings = model(torch.cat([x, x.flip(-1)]))
    nearest = real.cosine_ranks(embeddings)[:, 0]
    assert nearest.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert count(model, nn.BatchNorm2d) == 52


@torch.no_grad()
def test_saliency_agrees_with_the_onnx_file_it_came_from() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = real.saliency()
    x = real.imagenet_input([real.photo(name) for name in real.PHOTOS])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(real.saliency_onnx(), options, providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(np.concatenate([session.run(None, {"input_image": row[None].numpy()})[0] for row in x]))
    actual = model(x)
    # sigmoid outputs in [0, 1] of two runtimes in float32, 12 layers: measured 5e-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)
    assert real.iou(actual, expected) == 1.0
    assert 0.01 < (actual > 0.5).float().mean() < 0.99
    assert (count(model, nn.LayerNorm), count(model, nn.BatchNorm2d)) == (25, 3)


def test_minilm_puts_related_sentences_together() -> None:
    model, tokenizer = real.minilm()
    ranks = real.cosine_ranks(real.embed(model, tokenizer))
    assert ranks[0, 0] == 1
    assert ranks[1, 0] == 0
    assert count(model, nn.LayerNorm) == 13


@torch.no_grad()
def test_crepe_hears_the_pitch() -> None:
    hertz = torch.tensor([82.4, 110.0, 220.0, 440.0, 880.0], dtype=torch.float64)
    model = real.crepe_tiny()
    heard = real.crepe_pitch(model(real.crepe_frames(hertz.tolist())))
    cents = 1200 * torch.log2(heard / hertz)
    assert cents.abs().max() < 25  # bins are 20 cents apart
    assert count(model, nn.BatchNorm2d) == 6
