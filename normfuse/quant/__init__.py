"""What a quantized tensor is: the specification, codes and exponents, packing, and the integer arithmetic in plain PyTorch."""

from normfuse.quant.spec import ShiftQuant

__all__ = ["ShiftQuant"]
