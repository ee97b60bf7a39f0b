"""Images are prepared as the libraries of the models do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.app.data.preprocess import IMAGENET, Preprocess, parse_preprocess
from normfuse.app.data.preprocess_of import preprocess_of
from normfuse.errors import UsageError

Image = pytest.importorskip("PIL.Image")
SIZES = [(300, 200), (97, 260), (64, 64)]


def image(width: int, height: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_tiny.in12k_ft_in1k"])
def test_as_timm_does_it(name: str, size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    model = timm.create_model(name, num_classes=2)
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)(image(*size))
    found = preprocess_of(f"timm:{name}", model)(image(*size), 3, *expected.shape[1:])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1"])
def test_as_torchvision_does_it(name: str, size: tuple[int, int]) -> None:
    models = pytest.importorskip("torchvision.models")
    expected = models.get_model_weights(name).DEFAULT.transforms()(image(*size))
    found = preprocess_of(f"torchvision:{name}", None)(image(*size), 3, *expected.shape[1:])
    # its tensors are resized with another antialiasing in one of the two; images are not
    torch.testing.assert_close(found, expected)


FOLDERS = [
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2},
    {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
        "resample": 3, "do_center_crop": True,
    },
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3},
]  # fmt: skip


@pytest.mark.parametrize("config", FOLDERS, ids=lambda c: c["image_processor_type"])
def test_as_the_processor_of_a_hugging_face_folder_does_it(config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = config | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    given = image(120, 80)
    expected = processor(given, return_tensors="pt")["pixel_values"][0]
    found = preprocess_of(f"hf:{tmp_path}", None)(given, 3, 32, 32)
    assert found.shape == expected.shape
    # tensors and images are not resized by the same code
    assert float((found - expected).abs().mean()) < 0.02


def test_words_change_what_is_written_down() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5,), "crop_pct": 0.8, "interpolation": "bilinear"}

    assert preprocess_of("a.py:net", Net()) == Preprocess((0.1, 0.2, 0.3), (0.5,), 0.8)
    assert preprocess_of("a.py:net", Net(), "crop=1,std=0.2") == Preprocess((0.1, 0.2, 0.3), (0.2,), 1.0)
    assert preprocess_of("a.py:net", Net(), "imagenet") == IMAGENET
    assert parse_preprocess("bytes").scale == 1
    assert "mean 0.5" in str(parse_preprocess("symmetric"))


def test_gray_and_oblong_images() -> None:
    found = IMAGENET(image(50, 80), 1, 20, 30)
    assert found.shape == (1, 20, 30)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "--preprocess imagnet: 'imagnet' is not understood; did you mean 'imagenet'"),
        ("means=1", "did you mean 'mean'"),
        ("mean=a", "mean=a: expected a number"),
        ("crop=2", "a share above 0"),
        ("std=0", "std: expected numbers above 0"),
        ("interpolation=bicubik", "did you mean 'bicubic'"),
        ("timm:resnet8x", "timm has no model"),
        ("torchvision:resnet19", "torchvision has no model"),
        ("hf:nowhere", "there is no nowhere"),
    ],
)
def test_wrong_words_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        preprocess_of("a.py:net", nn.Identity(), text)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_model_that_does_not_say_is_asked_for() -> None:
    with pytest.raises(UsageError, match="does not say how images are prepared for it: pass --preprocess"):
        preprocess_of("a.py:net", nn.Identity())
