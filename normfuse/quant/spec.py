"""`ShiftQuant`: how a model is to be quantized."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from normfuse.errors import UsageError
from normfuse.quant.scheme import Scheme
from normfuse.quant.weight import BLOCKS

__all__ = ["ShiftQuant", "choices"]

_PER_LAYER = (
    "weight_bits", "activation_bits", "groups", "group_size", "block", "granularity", "activations", "exponents", "observer",
    "percentile",
    "rounding", "bias_correction",
)  # fmt: skip


@dataclass(frozen=True)
class ShiftQuant(Scheme):
    """Symmetric integers of 2 to 8 bits whose input channels are scaled by powers of two (arXiv 2411.10948).

        Ŵ[n, k] = S[n] · 2^(-e[k]) · C[n, k],   C integer,   |C| ≤ 2^(bits-1) - 1,   e[k] in 0 … groups-1

    so that a product is one integer sum and one float multiplication: Y[m, n] = s[m] S[n] 2^-E Σ_k A[m, k] (C[n, k] << (E - e[k])).

    Args:
        weight_bits: of linear and convolution weights, 2 to 8.
        activation_bits: of what they read, 2 to 8.
        groups: the most different exponents, 1 to 8; 1 is plain symmetric quantization.
        group_size: neighbouring input channels that share an exponent; 1 is the finest.
        block: so many neighbouring input channels of an output of a linear layer share a multiplier, a small integer beside the
            float scale of the output, in the place of exponents: 32, 64, 128 or 256; 0 for none. For weights of up to 4 bits;
            wider ones, and convolutions, keep exponents.
        granularity: one float scale for each output ("per_channel") or for the whole weight ("per_tensor").
        activations: "dynamic" takes the scale from each row (token; image for convolutions) when it runs; "static" fixes
            one a tensor from the calibration data, which QuantizeLinear can express.
        exponents: "range" sets them from the largest weight of a channel; "search" minimizes the error of the product,
            with the activations of the calibration data as weights where there are any.
        observer: how a static scale is found: "minmax", "percentile" or least squared error ("mse").
        percentile: for observer="percentile", in percent.
        rounding: "nearest" (ties to even), "stochastic", "gptq" (second order, needs calibration data), or "auto": gptq for layers
            with at least two rows of calibration data for each input, nearest for others and under a budget.
        migration: move powers of two from activations to weights through the gain of the norm in front, where that lowers
            the error; it costs nothing at run time.
        bias_correction: add to the bias what quantization moved the mean by, on the calibration data.
        chains: convolutions hand codes of 8 bits to each other, with channels running fastest, and what stands between them (sums,
            pools, activations) works on codes; needs activations="static".
        attention: also quantize the queries and keys of attention, to 8 bits by rows: their product is an exact sum of integers.
            The probabilities and their product with the values stay float.
        embedding_bits: of embedding tables, weights only, one scale a row; None keeps them in float.
        overrides: other values for layers, by pattern of their module path (`fnmatch`): {"head*": {"weight_bits": 8}}.
        keep: patterns of module paths that stay in float, e.g. ("patch_embed*", "head").
        size_budget: bytes of the quantized model as a fraction of the float one; widths are then chosen layer by layer.
        sqnr_budget: the SQNR in dB that the outputs must keep on the calibration data; widths are chosen likewise.
        prefer: "speed" leaves a layer in float that measures slower in integers; "size" does not.
        finetune_steps: steps of fine-tuning with straight-through estimators against the float model, 0 for none.
        seed: of stochastic rounding and fine-tuning.

    Raises:
        UsageError: a value is out of range, or a name is not known.
    """

    rewritten_by: ClassVar[tuple[str, str]] = ("normfuse.passes.quantize.shiftquant", "ShiftQuantize")

    weight_bits: int = 4
    activation_bits: int = 8
    groups: int = 4
    group_size: int = 1
    block: int = 0
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    activations: Literal["dynamic", "static"] = "dynamic"
    exponents: Literal["search", "range"] = "search"
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = 99.99
    rounding: Literal["auto", "nearest", "stochastic", "gptq"] = "auto"
    migration: bool = True
    bias_correction: bool = True
    chains: bool = False
    attention: bool = False
    embedding_bits: int | None = 8
    overrides: Any = ()
    keep: tuple[str, ...] = ()
    size_budget: float | None = None
    sqnr_budget: float | None = None
    prefer: Literal["speed", "size"] = "speed"
    finetune_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            _integer(name, getattr(self, name), 2, 8)
        if self.embedding_bits is not None:
            _integer("embedding_bits", self.embedding_bits, 2, 8)
        _integer("groups", self.groups, 1, 8)
        _integer("group_size", self.group_size, 1, 1 << 20)
        if self.block not in (0, *BLOCKS) or isinstance(self.block, bool):
            raise UsageError(f"ShiftQuant(block={self.block!r}): expected 0 (none), {', '.join(map(str, BLOCKS))}")
        if self.block and self.granularity == "per_tensor":
            raise UsageError(
                'ShiftQuant(block=…, granularity="per_tensor"): blocks are parts of the scale of an output; leave one out'
            )
        _integer("finetune_steps", self.finetune_steps, 0, 1 << 20)
        _integer("seed", self.seed, 0, (1 << 63) - 1)
        for name, allowed in choices().items():
            value = getattr(self, name)
            if value not in allowed:
                near = difflib.get_close_matches(str(value), allowed, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"ShiftQuant({name}={value!r}): expected one of {', '.join(map(repr, allowed))}{hint}")
        for name in ("migration", "bias_correction", "attention", "chains"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"ShiftQuant({name}={getattr(self, name)!r}): expected True or False")
        _number("percentile", self.percentile, 50.0, 100.0)
        if self.size_budget is not None:
            _number("size_budget", self.size_budget, 0.0, 1.0)
        if self.sqnr_budget is not None:
            _number("sqnr_budget", self.sqnr_budget, 0.0, 200.0)
        if self.chains:
            self._check_chains()
        object.__setattr__(self, "keep", _patterns(self.keep))
        object.__setattr__(self, "overrides", _overrides(self.overrides))
        for pattern, values in self.overrides:
            try:
                dataclasses.replace(self, overrides=(), **dict(values))
            except UsageError as e:
                raise UsageError(f"overrides[{pattern!r}]: {e}") from e

    def _check_chains(self) -> None:
        """Codes are written by one layer for the next one: with scales that are known before."""
        if self.activations != "static":
            raise UsageError("ShiftQuant(chains=True): codes need static scales; pass activations='static' and calibration data")
        for name in ("size_budget", "sqnr_budget", "finetune_steps"):
            if getattr(self, name):
                raise UsageError(
                    f"ShiftQuant(chains=True, {name}={getattr(self, name)!r}): widths in chains are not searched or "
                    f"trained; leave {name} out"
                )

    @property
    def needs_data(self) -> str:
        values = [self.activations, *(dict(found).get("activations") for _, found in self.overrides)]
        return "activations='static'" if "static" in values else ""

    def at(self, path: str) -> ShiftQuant:
        """The specification of the layer at `path`: later overrides win."""
        values: dict[str, Any] = {}
        for pattern, found in self.overrides:
            if fnmatch.fnmatchcase(path, pattern):
                values |= dict(found)
        return dataclasses.replace(self, overrides=(), **values) if values else self


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"ShiftQuant({name}={value!r}): expected an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not low < value <= high:
        raise UsageError(f"ShiftQuant({name}={value!r}): expected a number above {low:g} and at most {high:g}")


def _patterns(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(p, str) for p in found):
        raise UsageError(f"ShiftQuant(keep={value!r}): expected patterns of module paths, e.g. ('head', 'blocks.0.*')")
    return found


def _overrides(value: Any) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """As a tuple of tuples, so that equal specifications are equal and hash alike."""
    pairs = value.items() if isinstance(value, Mapping) else value
    found = []
    try:
        for pattern, values in pairs:
            items = tuple(sorted(dict(values).items()))
            if not isinstance(pattern, str):
                raise TypeError
            for name, _ in items:
                if name not in _PER_LAYER:
                    near = difflib.get_close_matches(str(name), _PER_LAYER, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise UsageError(
                        f"ShiftQuant(overrides): {name!r} cannot be set for a layer{hint} (expected {', '.join(_PER_LAYER)})"
                    )
            found.append((pattern, items))
    except (TypeError, ValueError) as e:
        raise UsageError(f"ShiftQuant(overrides={value!r}): expected {{pattern: {{field: value}}}}") from e
    return tuple(found)


@functools.cache
def choices() -> dict[str, tuple[str, ...]]:
    """The fields that take one of a few words, which their types name."""
    return {name: get_args(hint) for name, hint in get_type_hints(ShiftQuant).items() if get_origin(hint) is Literal}
