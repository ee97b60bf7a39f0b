"""Operators on u8 codes, [batch, height, width, channels]: what travels between quantized convolutions.

A code u is worth (u − zero) · scale. Scales and zero points are constants of a plan (`chains` of `normfuse.passes.quantize`), and
operators have numbers for arguments: in units of the codes that they write, with all zero points but that of a convolution's input
within the bias. Each product and sum of floats is rounded by itself to float32, and codes are rounded to even: the same codes on
every machine.
"""

from __future__ import annotations

from normfuse.ops.codes.borders import DEQUANTIZE_CODES, QUANTIZE_CODES, dequantize_codes, quantize_codes
from normfuse.ops.codes.conv2d import CODES_CONV2D, codes_conv2d
from normfuse.ops.codes.elementwise import CODES_ADD, CODES_GATE, codes_add, codes_gate
from normfuse.ops.codes.moves import CODES_TAKE, CODES_UPSAMPLE, codes_take, codes_upsample
from normfuse.ops.codes.pools import CODES_MAX_POOL2D, CODES_MEAN, codes_max_pool2d, codes_mean

__all__ = [
    "CODES_ADD", "CODES_CONV2D", "CODES_GATE", "CODES_MAX_POOL2D", "CODES_MEAN", "CODES_TAKE", "CODES_UPSAMPLE", "DEQUANTIZE_CODES",
    "QUANTIZE_CODES", "codes_add", "codes_conv2d", "codes_gate", "codes_max_pool2d", "codes_mean", "codes_take", "codes_upsample",
    "dequantize_codes", "quantize_codes",
]  # fmt: skip
