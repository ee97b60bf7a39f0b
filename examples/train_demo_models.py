"""Train the two models of `normfuse demo` on scikit-learn's digits and write them to normfuse/assets/.

    pip install 'normfuse[examples]'
    python examples/train_demo_models.py          # about two minutes on two cores

1797 images of 8x8 pixels, 1297 to train on and 500 held out, drawn with a fixed seed. The held-out images are written
beside the weights, so that the demo measures accuracy without scikit-learn.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from normfuse.app.demo_models import DigitsCNN, DigitsViT
from normfuse.files import atomic

HELD_OUT = 500
BATCH = 64


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to one pixel in either direction, zeros coming in."""
    padded = F.pad(images, (1, 1, 1, 1))
    out = torch.empty_like(images)
    for i, (y, x) in enumerate(torch.randint(0, 3, (len(images), 2)).tolist()):
        out[i] = padded[i, :, y : y + 8, x : x + 8]
    return out


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, rate: float) -> None:
    """AdamW with warm-up and cosine decay, label smoothing, random shifts."""
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(shifted(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "normfuse" / "assets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 8, 8)  # 0 to 16
    labels = torch.tensor(targets, dtype=torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    test, training = order[:HELD_OUT], order[HELD_OUT:]

    def inputs(index: Tensor) -> tuple[Tensor, Tensor]:
        return images[index].float().unsqueeze(1) / 16, labels[index].long()

    for name, build, epochs, rate in (("cnn", DigitsCNN, 40, 5e-3), ("vit", DigitsViT, 80, 2e-3)):
        start = time.perf_counter()
        torch.manual_seed(options.seed)
        model = build()
        train(model, *inputs(training), epochs=epochs, rate=rate)
        values = sum(p.numel() for p in model.parameters())
        took = time.perf_counter() - start
        print(
            f"{name}: {values:,} parameters, {accuracy(model, *inputs(test)):.3f} of {HELD_OUT} held-out digits right, {took:.0f} s"
        )
        with atomic(options.out / f"digits_{name}.safetensors", force=True) as path:
            save_file(model.state_dict(), path)
    with atomic(options.out / "digits_test.safetensors", force=True) as path:
        save_file({"images": images[test].contiguous(), "labels": labels[test].contiguous()}, path)


if __name__ == "__main__":
    main()
