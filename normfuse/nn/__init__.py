"""Trainable normalization layers of the field's papers, and what is done with them before inference.

Each layer states its identity, its shapes and its source; `normfuse.optimize` takes each to the inference form that its
paper promises.
"""

from normfuse.nn.alpha import AlphaBatchNorm
from normfuse.nn.batch_channel import BatchChannelNorm
from normfuse.nn.calibrate import calibrate
from normfuse.nn.compander import WeightCompander
from normfuse.nn.convert import Swap, convert, swaps
from normfuse.nn.crms import CRMSNorm
from normfuse.nn.dynamic import DynamicErf, DynamicTanh
from normfuse.nn.evonorm import EvoNorm
from normfuse.nn.l1 import L1BatchNorm, L1LayerNorm
from normfuse.nn.power import PowerNorm
from normfuse.nn.quantized_l1 import QuantizedL1LayerNorm
from normfuse.nn.region import RegionNormB, RegionNormL
from normfuse.nn.scaled import ScaledNorm, lns_init_
from normfuse.nn.shift_quant import ShiftQuantConv2d, ShiftQuantLinear
from normfuse.nn.unified import UnifiedNorm
from normfuse.nn.weight_standardization import (
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
)
from normfuse.nn.zero_mean import LinearZeroMeanOutput, ZeroMean

__all__ = [
    "AlphaBatchNorm",
    "BatchChannelNorm",
    "CRMSNorm",
    "DynamicErf",
    "DynamicTanh",
    "EvoNorm",
    "L1BatchNorm",
    "L1LayerNorm",
    "LinearZeroMeanOutput",
    "PowerNorm",
    "QuantizedL1LayerNorm",
    "RegionNormB",
    "RegionNormL",
    "ScaledNorm",
    "ShiftQuantConv2d",
    "ShiftQuantLinear",
    "Swap",
    "UnifiedNorm",
    "WeightCompander",
    "WeightStandardizedConv1d",
    "WeightStandardizedConv2d",
    "WeightStandardizedConv3d",
    "ZeroMean",
    "calibrate",
    "convert",
    "lns_init_",
    "swaps",
]
