"""The passes: one idea a file, each a callable `Graph -> PassReport`."""

from normfuse.passes.affine.affine import Affine
from normfuse.passes.affine.expose import Expose
from normfuse.passes.affine.weightless import Weightless
from normfuse.passes.bake import Bake
from normfuse.passes.cancel import Cancel
from normfuse.passes.cleanup import Cleanup
from normfuse.passes.depth_scale import DepthScale
from normfuse.passes.huge_eps import HugeEps
from normfuse.passes.key_bias import KeyBias
from normfuse.passes.l1 import L1
from normfuse.passes.realise import Realise
from normfuse.passes.recognise import Recognise
from normfuse.passes.select import Select
from normfuse.passes.streams.compress import Compress
from normfuse.passes.streams.mean_free import MeanFree
from normfuse.passes.streams.pre_rms import pre_rms

__all__ = [
    "L1",
    "PASSES",
    "Affine",
    "Bake",
    "Cancel",
    "Cleanup",
    "Compress",
    "DepthScale",
    "Expose",
    "HugeEps",
    "KeyBias",
    "MeanFree",
    "Realise",
    "Recognise",
    "Select",
    "Weightless",
    "pre_rms",
]

#: every pass that can be named in `optimize(passes=…)`, in the order in which they are of use
PASSES = {
    p.name: p
    for p in (
        Cleanup(),
        Bake(),
        Recognise(),
        DepthScale(),
        HugeEps(),
        Expose(),
        Affine(),
        MeanFree(),
        KeyBias(),
        Realise(),
        Select(),
        Weightless(),
        Cancel(),
        Compress(),
        L1(),
    )
}
