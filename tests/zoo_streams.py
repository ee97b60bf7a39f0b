"""The residual-stream half of the zoo: transformers of every norm placement, and the sources and readers that break a stream."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_entry import Entry, named, normal

__all__ = ["STREAMS"]

D, HEADS, VOCAB, LENGTH = 16, 4, 23, 10


class Attention(nn.Module):
    """Multi-head attention; reads keys and values from `context` when there is one."""

    def __init__(self, d: int = D, *, causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.causal, self.head = causal, d // HEADS
        self.q, self.k, self.v, self.proj = (nn.Linear(d, d, bias=bias) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            w(y).unflatten(-1, (HEADS, self.head)).transpose(1, 2)  # (B, H, T, D)
            for w, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """Attention as timm and nanoGPT write it: one qkv projection, view by sizes, explicit softmax, mask buffer."""

    def __init__(self, d: int = D, length: int = LENGTH) -> None:
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Dropout(0.1)
        self.register_buffer("mask", torch.ones(length, length).tril() == 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (d // HEADS) ** -0.5) @ k.transpose(-2, -1)
        scores = scores.masked_fill(self.mask[:t, :t], float("-inf"))
        return self.proj((self.drop(scores.softmax(dim=-1)) @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, d: int = D, *, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(d), attention or Attention(d)
        self.norm2, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LayerScaleBlock(Block):
    """Pre-norm block with a gain per channel on both branches, as in DINOv2 and DeiT-III."""

    def __init__(self, d: int = D) -> None:
        super().__init__(d)
        self.gamma1, self.gamma2 = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x)) * self.gamma2


class PrelnVit(nn.Module):
    """Pre-LN ViT: convolution patches, class, register and position tokens, LayerScale; head on token and mean."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, d, 4, 4), nn.ModuleList(LayerScaleBlock(d) for _ in range(2))
        self.cls, self.registers = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 2, d))
        self.pos, self.norm, self.head = nn.Parameter(torch.randn(1, 5, d)), nn.LayerNorm(d, eps=1e-6), nn.Linear(2 * d, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        x = torch.cat([x[:, :1], self.registers.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, 3:].mean(dim=1)], dim=-1))


class PrelnGpt(nn.Module):
    """GPT-2 style: learned positions, causal mask buffer, head tied to the token embedding."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(VOCAB, d), nn.Embedding(LENGTH, d), nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Block(d, attention=FusedAttention(d)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("positions", torch.arange(LENGTH)[None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(self.positions[:, : ids.shape[1]]))
        return self.head(self.norm(self.blocks(x)))


class SinusoidalGpt(nn.Module):
    """Fixed positions from a buffer, embedding multiplied by sqrt(d), scalar residual gain, untied head."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.d, self.embed, self.head = d, nn.Embedding(VOCAB, d, padding_idx=0), nn.Linear(d, VOCAB)
        self.blocks = nn.ModuleList(Block(d, attention=Attention(d, causal=True)) for _ in range(2))
        self.norm = nn.LayerNorm(d, bias=False)
        angle = torch.arange(LENGTH)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        self.register_buffer("pe", torch.cat([angle.sin(), angle.cos()], dim=1)[None])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.d**0.5 + self.pe[:, : ids.size(1)]
        for block in self.blocks:
            x = 0.7 * x + block(x)
        return self.head(self.norm(x))


class ParallelGpt(nn.Module):
    """GPT-J and Phi: attention and MLP read the same norm and are added to the stream together."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.embed, self.norms = nn.Embedding(VOCAB, d), nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.attn = nn.ModuleList(Attention(d, causal=True) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(d, 2 * d), nn.GELU("tanh"), nn.Linear(2 * d, d)) for _ in range(2))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, attn, mlp in zip(self.norms, self.attn, self.mlp, strict=False):
            y = norm(x)
            x = x + attn(y) + mlp(y)
        return self.head(self.norms[-1](x))


class DecoderBlock(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.block, self.norm, self.cross = Block(d, attention=Attention(d, causal=True)), nn.LayerNorm(d), Attention(d)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.cross(self.norm(x), memory)


class EncoderDecoder(nn.Module):
    """Two pre-norm streams; cross-attention reads the encoder through its final norm. Keyword inputs, dictionary out."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.encoder, self.decoder = nn.ModuleList(Block(d) for _ in range(2)), nn.ModuleList(DecoderBlock(d) for _ in range(2))
        self.encoder_norm, self.decoder_norm, self.head = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor, decoder_ids: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        memory, y = self.embed(ids), self.embed(decoder_ids)
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoder_norm(memory)
        for block in self.decoder:
            y = block(y, memory)
        return {"logits": self.head(self.decoder_norm(y)) * scale, "memory": memory}


class PostlnBert(nn.Module):
    """Post-LN encoder with an embedding norm and a pooler: every residual starts at a norm output."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.word, self.position, self.norm = (
            nn.Embedding(VOCAB, d),
            nn.Parameter(torch.randn(1, LENGTH, d)),
            nn.LayerNorm(d, 1e-12),
        )
        self.attn, self.norm1 = nn.ModuleList(Attention(d) for _ in range(2)), nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)) for _ in range(2))
        self.norm2, self.pooler = nn.ModuleList(nn.LayerNorm(d) for _ in range(2)), nn.Linear(d, d)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.word(ids) + self.position[:, : ids.shape[1]])
        for attn, norm1, mlp, norm2 in zip(self.attn, self.norm1, self.mlp, self.norm2, strict=True):
            x = norm1(x + attn(x))
            x = norm2(x + mlp(x))
        return x, torch.tanh(self.pooler(x[:, 0]))


class WindowBlock(Block):
    """Attention inside shifted 2x2 windows of a channel-last image."""

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, d = x.shape
        y = torch.roll(self.norm1(x), (-1, -1), dims=(1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, d)
        y = self.attn(y).view(b, h // 2, w // 2, 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, d)
        x = x + torch.roll(y, (1, 1), dims=(1, 2))
        return x + self.mlp(self.norm2(x))


class SwinLike(nn.Module):
    """Two stages; patch merging concatenates four tokens over features, so its norm sees four streams at once."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.patch, self.stage1, self.stage2 = nn.Conv2d(3, d, 2, 2), WindowBlock(d), WindowBlock(2 * d)
        self.merge_norm, self.merge = nn.LayerNorm(4 * d), nn.Linear(4 * d, 2 * d, bias=False)
        self.norm, self.head = nn.LayerNorm(2 * d), nn.Linear(2 * d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.patch(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        x = self.stage2(self.merge(self.merge_norm(x)))
        return self.head(self.norm(x).mean(dim=(1, 2)))


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, grouped queries (two key heads), SwiGLU, no bias."""

    def __init__(self, d: int, eps: float | None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.head = nn.RMSNorm(d, eps=eps), nn.RMSNorm(d, eps=eps), d // HEADS
        self.q, self.o, self.k, self.v = (nn.Linear(d, n, bias=False) for n in (d, d, d // 2, d // 2))
        self.gate, self.up, self.down = (nn.Linear(i, o, bias=False) for i, o in ((d, 2 * d), (d, 2 * d), (2 * d, d)))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (w(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = (z * cos + torch.cat([-z[..., self.head // 2 :], z[..., : self.head // 2]], dim=-1) * sin for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LlamaRms(nn.Module):
    def __init__(self, d: int = D, eps: float | None = 1e-5) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCAB, d), nn.ModuleList(LlamaBlock(d, eps) for _ in range(2))
        self.norm, self.head, half = nn.RMSNorm(d, eps=eps), nn.Linear(d, VOCAB, bias=False), d // HEADS // 2
        angle = torch.arange(LENGTH)[:, None] / 10000 ** (torch.arange(half) / half).repeat(2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.head(self.norm(x))


class RmsEpsNone(LlamaRms):
    """`eps=None` means the machine epsilon of the dtype, not 1e-5 and not zero."""

    def __init__(self) -> None:
        super().__init__(eps=None)


class LnPre(nn.Module):
    """CLIP's ViT: a norm between the embeddings and the first block, so the stream starts at its beta."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.patch, self.cls, self.pos = (
            nn.Conv2d(3, d, 4, 4, bias=False),
            nn.Parameter(torch.randn(d)),
            nn.Parameter(torch.randn(5, d)),
        )
        self.ln_pre, self.blocks, self.ln_post = nn.LayerNorm(d), nn.Sequential(Block(d), Block(d)), nn.LayerNorm(d)
        self.proj = nn.Parameter(torch.randn(d, 6) * d**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        x = torch.cat([self.cls.view(1, 1, -1).expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        x = self.blocks(self.ln_pre(x))
        return self.ln_post(x[:, 0, :]) @ self.proj


class EmbeddingNorm(nn.Module):
    """BLOOM: a norm right behind the embedding, then a pre-norm stream."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.embed, self.embed_norm = nn.Embedding(VOCAB, d), nn.LayerNorm(d)
        self.blocks, self.norm = nn.Sequential(Block(d), Block(d)), nn.LayerNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embed_norm(self.embed(ids)))), self.embed.weight)


class GeluStem(nn.Module):
    """Whisper's encoder: the stream starts at a GELU, whose mean no weight can remove."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(6, d, 3, padding=1), nn.Conv1d(d, d, 3, stride=2, padding=1)
        self.register_buffer("pos", torch.randn(LENGTH, d))
        self.blocks, self.norm = nn.Sequential(Block(d), Block(d)), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)))).permute(0, 2, 1)
        return self.norm(self.blocks(x + self.pos))


class ConvWriter(nn.Module):
    """The MLP is two Conv1d in channel-first layout: writers whose output features are axis 1."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, d), nn.LayerNorm(d)
        self.norms, self.up = (
            nn.ModuleList(nn.LayerNorm(d) for _ in range(2)),
            nn.ModuleList(nn.Conv1d(d, 2 * d, 1) for _ in range(2)),
        )
        self.down = nn.ModuleList(nn.Conv1d(2 * d, d, 3, padding=1) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.relu(up(norm(x).transpose(1, 2)))).transpose(1, 2)
        return self.norm(x)


class StreamAsOutput(PrelnGpt):
    """Every hidden state is an output, mean and all: the stream may not be centered unseen."""

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.wte(ids)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return self.head(self.norm(x)), tuple(states)


class LookalikeLayerNorm(nn.Module):
    """Named like a layer norm and none: unbiased deviation, eps outside the root (the Annotated Transformer's)."""

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias


LookalikeLayerNorm.__name__ = LookalikeLayerNorm.__qualname__ = "LayerNorm"


class Lookalike(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = nn.Embedding(VOCAB, d), nn.Sequential(Block(d), Block(d)), LookalikeLayerNorm(d)
        for block in self.blocks:
            block.norm1, block.norm2 = LookalikeLayerNorm(d), LookalikeLayerNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(ids)))


class HandWrittenNorms(nn.Module):
    """LayerNorm, then RMSNorm, spelled out in arithmetic: the same functions as the fused calls."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.embed, self.fc, self.out = nn.Embedding(VOCAB, d), nn.Linear(d, d), nn.Linear(d, d)
        self.gamma1, self.beta1, self.gamma2 = (nn.Parameter(torch.randn(d)) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        c = x - x.mean(-1, keepdim=True)
        x = x + self.fc(c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gamma1 + self.beta1)
        return x + self.out(self.gamma2 * (x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6)))


class ShapeBranch(PrelnGpt):
    """Python code that looks at a shape: only `torch.export` can follow it."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[-1] > LENGTH:
            raise ValueError(f"at most {LENGTH} tokens, got {ids.shape[-1]}")
        return super().forward(ids)


_IDS = (torch.randint(1, VOCAB, (2, LENGTH - 2), generator=torch.Generator().manual_seed(0)),)
_IMAGE = (normal(2, 3, 8, 8),)
_TEXT = (PrelnGpt, SinusoidalGpt, ParallelGpt, PostlnBert, LlamaRms, RmsEpsNone, EmbeddingNorm, ConvWriter)
STREAMS: dict[str, Entry] = named(
    *((make, _IDS) for make in (*_TEXT, StreamAsOutput, Lookalike, HandWrittenNorms, ShapeBranch, EncoderDecoder)),
    *((make, _IMAGE) for make in (PrelnVit, SwinLike, LnPre)),
    (GeluStem, (normal(2, 6, 2 * LENGTH),)),
)
STREAMS["shape_branch"] = dataclasses.replace(STREAMS["shape_branch"], traceable=False)
STREAMS["encoder_decoder"] = dataclasses.replace(STREAMS["encoder_decoder"], kwargs={"decoder_ids": _IDS[0][:, :6].flip(1)})
