"""ShiftQuant through torchao: `quantize_(model, ShiftQuantConfig("w4a8"))` swaps each nn.Linear for integers in place.

Each layer is looked at alone, and there is no data: what needs the graph (folding norms, chains, budgets) or calibration (static
scales, gptq) is `normfuse.optimize(model, inputs, quantize=...)`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.errors import UsageError
from normfuse.extras import need
from normfuse.quant.accumulator import check_accumulator
from normfuse.quant.packing import pack_groups
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.scheme import Scheme
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.words import Widths, parse_quantize

if TYPE_CHECKING:
    from normfuse.quant.weight import QuantizedWeight

__all__ = ["IntegerLinear", "ShiftQuantConfig"]

_Config: Any = need("torchao.core.config", extra="torchao").AOBaseConfig
_register = need("torchao.quantization.transform_module", extra="torchao").register_quantize_module_handler

#: Fields of `ShiftQuant` that say how one layer becomes integers, without data.
_OF_A_LAYER = (
    "weight_bits", "activation_bits", "groups", "group_size", "granularity", "exponents", "seed", "embedding_bits", "prefer",
    "migration", "bias_correction",
)  # fmt: skip


@dataclass
class ShiftQuantConfig(_Config):  # type: ignore[misc]  # torchao is known when it runs
    """What `torchao.quantization.quantize_` takes.

    Args:
        quantize: widths in words ("w4a8", "w8a8,groups=1"), or a `normfuse.ShiftQuant` whose scales are dynamic.

    Raises:
        UsageError: it asks for more than one layer alone can do.
    """

    quantize: Scheme | Widths = "w4a8"

    def __post_init__(self) -> None:
        given = parse_quantize(self.quantize) if isinstance(self.quantize, str) else self.quantize
        if not isinstance(given, ShiftQuant):
            raise UsageError(f"ShiftQuantConfig({self.quantize!r}): expected words such as 'w4a8', or a normfuse.ShiftQuant")
        plain = ShiftQuant()
        for field in dataclasses.fields(given):
            if field.name not in _OF_A_LAYER and getattr(given, field.name) != getattr(plain, field.name):
                raise UsageError(
                    f"{field.name}={getattr(given, field.name)!r} needs the whole model or data, and torchao hands over one layer "
                    "at a time: use normfuse.optimize(model, inputs, quantize=...), or filter_fn= to choose layers"
                )
        self.spec = dataclasses.replace(given, rounding="nearest")


class IntegerLinear(nn.Module):
    """y = W x + b with integer weights and activations, as `torch.ops.normfuse.shiftquant_linear`; it has no gradient.

    Args:
        weight: codes of W [N, K].
        bias: [N] or None.
        activation_bits: of x, which is quantized by rows when it runs.
    """

    codes: Tensor
    exponents: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, activation_bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.activation_bits = weight.bits, activation_bits
        for name, value in zip(("codes", "exponents", "scale"), pack_groups((weight,), 1), strict=True):
            self.register_buffer(name, value)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of any float dtype; the result [..., N] has it too."""
        tensors = (self.codes, self.exponents, self.scale, self.bias, None)
        y: Tensor = torch.ops.normfuse.shiftquant_linear(x, *tensors, self.bits, self.activation_bits)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, w{self.bits}a{self.activation_bits}"


@_register(ShiftQuantConfig)  # type: ignore[untyped-decorator]
def _integers(module: nn.Module, config: ShiftQuantConfig) -> nn.Module:
    """The layer in integers.

    Raises:
        UsageError: it is no plain linear layer, or its weight has no finite values.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or type(weight) is not nn.Parameter:
        what = type(module).__name__ + ("" if weight is None else f" with a {type(weight).__name__}")
        raise UsageError(f"ShiftQuantConfig is for nn.Linear in floats, got {what}: leave it out with filter_fn=")
    if weight.is_meta or not bool(weight.isfinite().all()):
        why = "is on the device meta" if weight.is_meta else "holds NaN or Inf"
        raise UsageError(f"the weight of {module} {why}: load finite weights before quantize_")
    coded = quantize_weight(weight.detach().double().cpu(), config.spec)
    check_accumulator(coded, config.spec.activation_bits, str(module))
    return IntegerLinear(coded, module.bias, config.spec.activation_bits).to(weight.device).train(module.training)
