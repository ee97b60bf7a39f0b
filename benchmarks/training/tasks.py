"""What is trained: the tasks with their recipes, and the tables of norms. Every hyperparameter of the proof stands here.

UnifiedNorm and PowerNorm warm up for a number of steps (4000 and 10 000 in the official code, of trainings of 10^5 steps
and more). These runs are hundreds of steps long, so `warm_up` is a fraction of the steps. The official UnifiedNorm corrects
gradients by a ratio r only after 1000 steps, whatever the warm-up is: in these runs r stays 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.training import models
from benchmarks.training.data import Images, Text, digits, mnist, pydoc
from benchmarks.training.train import Recipe
from normfuse.nn.batch_channel import BatchChannelNorm
from normfuse.nn.crms import CRMSNorm
from normfuse.nn.dynamic import DynamicTanh
from normfuse.nn.evonorm import EvoNorm
from normfuse.nn.l1 import L1LayerNorm
from normfuse.nn.power import PowerNorm
from normfuse.nn.scaled import ScaledNorm, lns_init_
from normfuse.nn.unified import UnifiedNorm
from normfuse.nn.weight_standardization import WeightStandardizedConv2d

__all__ = ["CONVOLUTIONAL", "TASKS", "TRANSFORMER", "Task", "Variant"]

HEADS = 4


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the batch and the tokens of (B, T, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Variant:
    """One way to normalize a transformer or a CNN.

    Attributes:
        title: name in tables.
        norm: makes a norm: of a transformer from (features, block, steps of the run, **options), of a CNN, with its
            activation, from (channels, **options).
        conv: of a CNN: makes a 3x3 convolution from (channels in, channels out, stride).
        options: hyperparameters of the norm.
        plain: the norm that costs as little at inference: the optimized models must have the same nodes. `none` says that
            no statistics of the input are needed at inference, so that nothing of the norm may be left.
        narrower: features by which the stream is narrower: CRMSNorm leaves one out.
        note: what a reader of the table must know.
    """

    title: str
    norm: Callable[..., nn.Module]
    conv: Callable[[int, int, int], nn.Module] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    plain: str | None = None
    narrower: int = 0
    note: str = ""


def _ln(features: int, block: int, steps: int) -> nn.Module:
    return nn.LayerNorm(features)


def _bn(features: int, block: int, steps: int) -> nn.Module:
    return TokenBatchNorm(features)


def _power(features: int, block: int, steps: int, *, warm_up: float, **options: Any) -> nn.Module:
    return PowerNorm(features, warmup_iters=round(warm_up * steps), **options)


def _unified(features: int, block: int, steps: int, *, window_size: int, warm_up: float, **options: Any) -> nn.Module:
    # the window must be full before its geometric mean is used
    return UnifiedNorm(features, window_size, max(window_size, round(warm_up * steps)), **options)


def _l1(features: int, block: int, steps: int) -> nn.Module:
    return L1LayerNorm(features)


def _rms(features: int, block: int, steps: int) -> nn.Module:
    return nn.RMSNorm(features, eps=1e-5)


def _crms(features: int, block: int, steps: int) -> nn.Module:
    return CRMSNorm(features)


def _dyt(features: int, block: int, steps: int) -> nn.Module:
    return DynamicTanh(features)


def _scaled(features: int, block: int, steps: int) -> nn.Module:
    norm = nn.LayerNorm(features)
    return ScaledNorm(norm, block) if block else norm  # the norm before the head is not scaled


def _none(features: int, block: int, steps: int) -> nn.Module:
    return nn.Identity()


_CRMS_NOTE = (
    "is trained here in its own d - 1 features: the functions of RMSNorm in other coordinates, whose metric I + 11ᵀ has the "
    "condition number d, which AdamW does not level out. Train with RMSNorm and apply the pass `compress` afterwards."
)
_UNIFIED = {"window_size": 4, "outlier_filtration": True, "momentum": 0.9, "warm_up": 0.1}

TRANSFORMER = {
    "ln": Variant("LayerNorm", _ln),
    "bn": Variant("BatchNorm over tokens", _bn, plain="none"),
    "pn": Variant("PowerNorm", _power, options={"group_num": HEADS, "warm_up": 0.1}),
    "un": Variant("UnifiedNorm", _unified, options=_UNIFIED, plain="none"),
    # the official advice: outlier filtration for images, none for text
    "un_text": Variant("UnifiedNorm", _unified, options={**_UNIFIED, "outlier_filtration": False}, plain="none"),
    "l1": Variant("L1LayerNorm", _l1),
    "rms": Variant("RMSNorm", _rms),
    "crms": Variant("CRMSNorm", _crms, narrower=1, note=_CRMS_NOTE),
    "dyt": Variant("DynamicTanh", _dyt),
    "lns": Variant("LayerNorm Scaling", _scaled, plain="ln"),
    "none": Variant("none", _none),
}


def _conv(channels: int, out: int, stride: int) -> nn.Module:
    return nn.Conv2d(channels, out, 3, stride, 1, bias=False)


def _standardized(channels: int, out: int, stride: int) -> nn.Module:
    return WeightStandardizedConv2d(channels, out, 3, stride, 1, bias=False, convention="bcn")


def _bn_relu(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def _bcn_relu(channels: int, *, groups: int) -> nn.Module:
    return nn.Sequential(BatchChannelNorm(channels, groups), nn.ReLU())


def _relu(channels: int) -> nn.Module:
    return nn.ReLU()


CONVOLUTIONAL = {
    "bn": Variant("BatchNorm", _bn_relu, _conv, plain="none"),
    "ws_bcn": Variant("WS + BatchChannelNorm", _bcn_relu, _standardized, options={"groups": 8}),
    "evonorm_b0": Variant("EvoNorm B0", partial(EvoNorm, "B0"), _conv),
    "evonorm_s0": Variant("EvoNorm S0", partial(EvoNorm, "S0"), _conv, options={"groups": 8}),
    "none": Variant("none", _relu, _conv),
}


@dataclass(frozen=True)
class Task:
    """One training, done with several norms.

    Attributes:
        name: key in file names.
        title: name in tables.
        kind: `vit`, `gpt` or `cnn`.
        data: reads the data set.
        recipe: what all variants share.
        variants: keys of norms, the baseline first.
        seeds: how many seeds are run.
        dim: features of all heads together.
        depth: blocks of a transformer.
        init: std of the weights at the start; None for the defaults of torch, which do not depend on the depth either, as
            LayerNorm Scaling wants it. The 0.02 of its paper is for widths of 768 and more: at 48 features and depth 12
            most runs had not converged in these few steps.
    """

    name: str
    title: str
    kind: str
    data: Callable[[], Images | Text]
    recipe: Recipe
    variants: tuple[str, ...]
    seeds: int
    dim: int = 64
    depth: int = 4
    init: float | None = None

    def variant(self, name: str) -> Variant:
        return (CONVOLUTIONAL if self.kind == "cnn" else TRANSFORMER)[name]

    def build(self, variant: Variant, read: Images | Text) -> nn.Module:
        """The model with the norms of `variant`, for the data set `read`."""

        def norm(features: int, block: int) -> nn.Module:
            return variant.norm(features, block, self.recipe.steps, **variant.options)

        sizes = {"width": self.dim - variant.narrower, "dim": self.dim, "depth": self.depth, "heads": HEADS}
        model: nn.Module
        if isinstance(read, Text):
            model = models.GPT(norm, read.symbols, context=self.recipe.context, **sizes)
        elif self.kind == "vit":
            model = models.ViT(norm, size=read.size, **sizes)
        else:
            assert variant.conv is not None
            model = models.CNN(variant.conv, lambda channels: variant.norm(channels, **variant.options))
        if self.init is not None:
            lns_init_(model, std=self.init)
        return model

    def config(self, name: str) -> dict[str, Any]:
        """All that a run depends on besides its seed and the code; plain data."""
        options = dict(self.variant(name).options)
        return {**asdict(self.recipe), "dim": self.dim, "depth": self.depth, "init": self.init, **options}


_VIT = ("ln", "bn", "pn", "un", "l1", "rms", "crms", "dyt")
_DIGITS = Recipe(steps=800, batch=32, smoothing=0.1)
_DEEP = Recipe(steps=600, batch=32, smoothing=0.1)
_MNIST = Recipe(steps=400, batch=64, smoothing=0.1, shift=1)

TASKS = {
    t.name: t
    for t in (
        Task("digits_vit", "digits, ViT of depth 4", "vit", digits, _DIGITS, _VIT, 5),
        Task("digits_vit_deep", "digits, ViT of depth 12", "vit", digits, _DEEP, ("ln", "lns"), 5, 48, 12),
        Task("mnist_vit", "MNIST subset, ViT of depth 4", "vit", mnist, _MNIST, _VIT, 3),
        Task("mnist_vit_deep", "MNIST subset, ViT of depth 12", "vit", mnist, _MNIST, ("ln", "lns"), 3, 48, 12),
        Task(
            "pydoc_gpt",
            "pydoc text, GPT of depth 4",
            "gpt",
            pydoc,
            Recipe(steps=500, batch=32, rate=3e-3, decay=0.1, context=64),
            ("ln", "rms", "crms", "lns", "un_text"),
            3,
            init=0.02,
        ),
        Task(
            "digits_cnn",
            "digits, CNN",
            "cnn",
            digits,
            Recipe(steps=500, batch=64, smoothing=0.1),
            ("bn", "ws_bcn", "evonorm_b0", "evonorm_s0"),
            5,
        ),
    )
}
