"""Neighbouring operators of a quantized model become one that has a kernel: one pass over memory, not several.

Each keeps every integer as it was, but for norms: in a kernel of its own a norm rounds its float result differently by an ulp or
two, so that a code on a tie may be its neighbour.
"""

from __future__ import annotations

from normfuse.ir.passes import Pass
from normfuse.passes.fuse.codes_between import CodesBetween
from normfuse.passes.fuse.norm_codes import NormCodes
from normfuse.passes.fuse.residual import Residual
from normfuse.passes.fuse.shared_codes import SharedCodes

__all__ = ["FUSED", "CodesBetween", "NormCodes", "Residual", "SharedCodes"]

FUSED: tuple[Pass, ...] = (Residual(), NormCodes(), CodesBetween(), SharedCodes())
"""In this order: what a product adds is known before its result may become codes, and only what nothing else takes is shared."""
