"""The passes, one idea a file, in the order in which they are of use. A pass that can be named is a line here."""

# ruff: noqa: I001 - the order is that of `PASSES`
from typing import Literal, cast

from normfuse.ir.passes import Pass as Pass
from normfuse.passes.cleanup import Cleanup as Cleanup
from normfuse.passes.bake import Bake as Bake
from normfuse.passes.recognise import Recognise as Recognise
from normfuse.passes.depth_scale import DepthScale as DepthScale
from normfuse.passes.huge_eps import HugeEps as HugeEps
from normfuse.passes.affine.expose import Expose as Expose
from normfuse.passes.affine.affine import Affine as Affine
from normfuse.passes.streams.mean_free import MeanFree as MeanFree
from normfuse.passes.key_bias import KeyBias as KeyBias
from normfuse.passes.realise import Realise as Realise
from normfuse.passes.select import Select as Select
from normfuse.passes.affine.weightless import Weightless as Weightless
from normfuse.passes.cancel import Cancel as Cancel
from normfuse.passes.streams.compress import Compress as Compress
from normfuse.passes.l1 import L1 as L1
from normfuse.passes.streams.half_range import HalfRange as HalfRange

from normfuse.passes.streams.pre_rms import pre_rms as pre_rms

_PASSES = [p for p in list(vars().values()) if isinstance(p, type) and issubclass(p, Pass) and p is not Pass]

PASSES: dict[str, Pass] = {p.name: p() for p in _PASSES}
"""Every pass that can be named in `optimize(passes=…)`."""

PassName = Literal[
    "default", "cleanup", "bake", "recognise", "depth_scale", "huge_eps", "expose", "affine", "mean_free", "key_bias", "realise",
    "select", "weightless", "cancel", "compress", "l1", "half_range",
]  # fmt: skip
"""The names in `PASSES`, for type checkers; "default" stands for the default pipeline."""

DEFAULT: tuple[PassName, ...] = tuple(
    cast(PassName, p.name)
    for p in (
        Bake, Cleanup, Recognise, HugeEps, Select, Expose, Affine, Select, Bake, MeanFree, Affine, Select, Bake, Affine, KeyBias,
        Realise, Recognise, Cleanup,
    )
)  # fmt: skip
"""The default pipeline. `affine`, `select` and `bake` run in turns, because each waits for what the others do: LayerScale must
be in the weights before they are centered, and a β can leave its norm only when the norm has become an RMSNorm; behind a product,
a selection meets the BatchNorm between them no more once that is in the weights; branches are one convolution only once their
BatchNorms are in their weights, and what goes around them is a branch, too, only once a gain in front of them is in that one.
`recognise` runs twice: x ⊙ γ · σ(x) is SiLU only once γ has moved on."""
