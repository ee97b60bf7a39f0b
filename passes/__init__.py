"""The passes: one idea a file, each a callable `Graph -> PassReport`."""

from normfuse.passes.affine import Affine
from normfuse.passes.cleanup import Cleanup
from normfuse.passes.expose import Expose
from normfuse.passes.mean_free import MeanFree
from normfuse.passes.realise import Realise
from normfuse.passes.select import Select

__all__ = ["PASSES", "Affine", "Cleanup", "Expose", "MeanFree", "Realise", "Select"]

#: every pass that can be named in `optimize(passes=…)`, in the order of the default pipeline
PASSES = {p.name: p for p in (Cleanup(), Expose(), Affine(), MeanFree(), Realise(), Select())}
