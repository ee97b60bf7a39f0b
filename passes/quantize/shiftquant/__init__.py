"""ShiftQuant: weights of 2 to 8 bits whose input channels are scaled by powers of two, activations of 2 to 8 bits.

shiftquant.py   the pass
widths.py       bits layer by layer under a budget
migration.py    ranges from activations to weights
clipping.py     one static scale
coded.py        a layer as integers
finetuning.py   training with them
attention.py    scores of attention
chains/         convolutional networks whose activations stay codes

Another number format is a folder beside this one: a scheme (`normfuse.quant.scheme.Scheme`), its pass, and what it makes of a layer
(`normfuse.passes.quantize.coded`). What layers are, calibration, measurements, times and the report are shared.
"""

from normfuse.passes.quantize.shiftquant.shiftquant import ShiftQuantize

__all__ = ["ShiftQuantize"]
