"""The words that kernels take. The place of a word is its number in C: native/words.h has the same ones in the same order."""

from __future__ import annotations

__all__ = ["EPILOGUES", "FUNCTIONS", "KINDS"]

#: What comes behind a product.
EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu")
#: Normalizations over the last axis.
KINDS = ("layer", "rms", "crms", "l1")

#: Functions of the values that a convolution of codes writes.
FUNCTIONS = ("none", "hardswish", "silu")
