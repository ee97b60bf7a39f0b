"""Train a vision transformer whose norms cost nothing at inference: digits of scikit-learn, UnifiedNorm, then ONNX.

    pip install 'normfuse[onnx,examples]'
    python examples/train_with_unified_norm.py        # about a minute on two cores

UnifiedNorm divides by statistics that are constants at inference, so `normfuse.optimize` multiplies them into the weights
of the linear layers behind it. The exported file holds no normalization at all.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.export import Dim

import normfuse
from normfuse.export import to_onnx
from normfuse.export.onnx.runtime import run, session
from normfuse.nn import UnifiedNorm

HELD_OUT = 500
BATCH = 64
WIDTH, DEPTH, HEADS = 64, 4, 4


class Block(nn.Module):
    """Pre-norm transformer block: the only difference to the usual one is the class of the norms."""

    def __init__(self, warm_up: int) -> None:
        super().__init__()
        self.norm1 = UnifiedNorm(WIDTH, warmup_iters=warm_up, outlier_filtration=True)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = UnifiedNorm(WIDTH, warmup_iters=warm_up, outlier_filtration=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Images (B, 1, 8, 8) in [0, 1] to logits (B, 10)."""

    def __init__(self, warm_up: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(warm_up) for _ in range(DEPTH)))
        self.norm = UnifiedNorm(WIDTH, warmup_iters=warm_up, outlier_filtration=True)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, 16, C)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        # before the selection of the class token, so that the statistics are those of all tokens
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def train(model: nn.Module, images: Tensor, labels: Tensor, *, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()  # from here on the norms are constants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to keep the ONNX file; by default it is thrown away")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(targets, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, training = order[:HELD_OUT], order[HELD_OUT:]

    # The official warm-up of 4000 steps is meant for long trainings: here it is a tenth of the steps. The gradients are
    # smoothed and the windows used only after it.
    model = ViT(warm_up=max(4, options.steps // 10))
    start = time.perf_counter()
    train(model, images[training], labels[training], steps=options.steps)
    with torch.no_grad():
        logits = model(images[test])
    right = (logits.argmax(1) == labels[test]).double().mean().item()
    print(f"trained in {time.perf_counter() - start:.0f} s: {right:.3f} of {HELD_OUT} held-out digits right")

    fast = normfuse.optimize(model, (images[:8],), dynamic_shapes=({0: Dim("batch")},))
    exact = normfuse.report(fast).exact
    assert exact is not None
    print(f"optimized: error {exact.max_rel:.0e} in {exact.dtype}")

    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "digits.onnx"
        exported = to_onnx(fast, path, force=True)
        got = run(session(path), {exported.inputs[0]: images[test]})[exported.outputs[0]]
    same = int((got.argmax(1) == logits.argmax(1)).sum())
    means = sum(count for op, count in exported.ops.items() if op.startswith("Reduce"))
    print(f"exported: {sum(exported.norms.values())} normalizations, {means} means, {sum(exported.ops.values())} nodes")
    print(f"the file and the trained model agree on {same} of {HELD_OUT} held-out digits")
    assert not exported.norms
    assert not means
    assert same == HELD_OUT


if __name__ == "__main__":
    main()
