"""The two small classifiers of `normfuse demo`, trained on scikit-learn's digits by examples/train_demo_models.py."""

from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["DigitsCNN", "DigitsViT", "digits", "load"]


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.full((width,), 0.5))
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.proj(mixed)
        wide: Tensor = self.fc1(self.norm2(x))  # (B, T, 4C)
        narrow: Tensor = self.fc2(F.gelu(wide))
        return x + self.scale2 * narrow


class DigitsViT(nn.Module):
    """Vision transformer for images (B, 1, 8, 8) in [0, 1]: 16 patches and a class token, 4 blocks of width 64."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, 16, C)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class Residual(nn.Module):
    """Depthwise and pointwise convolution beside a skip; the sum is normalized, so its BatchNorm has readers only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.expand(self.norm(x))))
        y = F.relu(self.norm2(self.depthwise(y)))
        branch: Tensor = self.norm3(self.project(y))
        return x + branch


class DigitsCNN(nn.Module):
    """Convolutional classifier for images (B, 1, 8, 8) in [0, 1]; BatchNorm on the input, before and after convolutions."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(1)
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(self.norm0(image))))
        x = F.relu(self.norm2(self.down(self.blocks(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def load(name: str) -> nn.Module:
    """The trained model `vit` or `cnn`, in eval mode."""
    model: nn.Module = {"vit": DigitsViT, "cnn": DigitsCNN}[name]()
    model.load_state_dict(_asset(f"digits_{name}"))
    return model.eval()


def digits() -> tuple[Tensor, Tensor]:
    """The 500 held-out digits: images (500, 1, 8, 8) in [0, 1] and labels (500,)."""
    data = _asset("digits_test")
    return data["images"].float().unsqueeze(1) / 16, data["labels"].long()


def _asset(name: str) -> dict[str, Tensor]:
    with as_file(files("normfuse.assets") / f"{name}.safetensors") as path:
        return load_file(path)
