"""All official layers that are known."""

from __future__ import annotations

from normfuse.importers.alpha import ALPHA_BATCH_NORM
from normfuse.importers.batch_channel import BATCH_CHANNEL_NORM, ESTIMATED_BATCH_NORM
from normfuse.importers.centered import CENTERED_LINEAR, LINEAR_ZERO_MEAN_OUTPUT
from normfuse.importers.dynamic import DYNAMIC_ERF, DYNAMIC_TANH
from normfuse.importers.evonorm import EVONORM
from normfuse.importers.family import Family
from normfuse.importers.l1 import L1_BATCH_NORM
from normfuse.importers.power import POWER_NORM
from normfuse.importers.pre_rms import CRMS_NORM, RMS_NORM
from normfuse.importers.region import REGION_NORM_B, REGION_NORM_L
from normfuse.importers.tract import TRACT_CONV, TRACT_LINEAR
from normfuse.importers.unified import UNIFIED_NORM
from normfuse.importers.weight_standardization import WEIGHT_STANDARDIZED_CONV

__all__ = ["FAMILIES"]

FAMILIES: tuple[Family, ...] = (
    UNIFIED_NORM,
    POWER_NORM,
    BATCH_CHANNEL_NORM,
    ESTIMATED_BATCH_NORM,
    WEIGHT_STANDARDIZED_CONV,
    EVONORM,
    L1_BATCH_NORM,
    REGION_NORM_B,
    REGION_NORM_L,
    ALPHA_BATCH_NORM,
    DYNAMIC_TANH,
    DYNAMIC_ERF,
    CRMS_NORM,
    RMS_NORM,
    LINEAR_ZERO_MEAN_OUTPUT,
    CENTERED_LINEAR,
    TRACT_LINEAR,
    TRACT_CONV,
)
