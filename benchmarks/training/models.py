"""The three models, written plainly: each takes the factory of its norms as an argument."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CNN", "GPT", "Norm", "ViT"]

#: Makes a norm from its number of features and its block, counted from 1; block 0 is the norm before the head.
Norm = Callable[[int, int], nn.Module]


class Attention(nn.Module):
    """Self-attention from a stream of `width` features and back; the heads together have `dim` features."""

    def __init__(self, width: int, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * dim)
        self.proj = nn.Linear(dim, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(mixed)
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, dim: int, heads: int, norm: Norm, index: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = norm(width, index)
        self.attention = Attention(width, dim, heads, causal=causal)
        self.norm2 = norm(width, index)
        self.fc1 = nn.Linear(width, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        wide: Tensor = self.fc1(self.norm2(x))  # (B, T, 4D)
        narrow: Tensor = self.fc2(F.gelu(wide))
        return x + narrow


class ViT(nn.Module):
    """Pre-norm vision transformer for images (B, 1, size, size): 16 patches and a class token, 10 classes.

    Args:
        norm: factory of the norms.
        width: features of the stream.
        dim: features of all heads together; a quarter of the hidden features of the MLP.
        depth: number of blocks.
        heads: number of heads.
        size: height and width of an image; a multiple of 4.
    """

    def __init__(self, norm: Norm, *, width: int = 64, dim: int = 64, depth: int = 4, heads: int = 4, size: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, size // 4, size // 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, dim, heads, norm, i + 1, causal=False) for i in range(depth))
        self.norm = norm(width, 0)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, 16, C)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])  # the last norm sees all tokens, so that its statistics do
        return logits


class GPT(nn.Module):
    """Pre-norm decoder over characters (B, T), T at most `context`; logits (B, T, symbols). Head and embedding are not tied.

    Args:
        norm: factory of the norms.
        symbols: size of the alphabet.
        width: features of the stream.
        dim: features of all heads together; a quarter of the hidden features of the MLP.
        depth: number of blocks.
        heads: number of heads.
        context: longest text.
    """

    def __init__(
        self, norm: Norm, symbols: int, *, width: int = 64, dim: int = 64, depth: int = 4, heads: int = 4, context: int = 64
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, dim, heads, norm, i + 1, causal=True) for i in range(depth))
        self.norm = norm(width, 0)
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class CNN(nn.Module):
    """Four 3x3 convolutions for images (B, 1, 8, 8), 10 classes.

    Args:
        conv: makes a 3x3 convolution with padding 1 and without bias from its channels in, channels out and stride.
        norm: makes a norm with its activation from its number of channels.
        width: channels of the first two convolutions; the others have twice as many.
    """

    def __init__(self, conv: Callable[[int, int, int], nn.Module], norm: Callable[[int], nn.Module], *, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, width, 1), norm(width))
        self.conv1 = nn.Sequential(conv(width, width, 1), norm(width))
        self.conv2 = nn.Sequential(conv(width, 2 * width, 2), norm(2 * width))
        self.conv3 = nn.Sequential(conv(2 * width, 2 * width, 1), norm(2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(self.stem(image))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
