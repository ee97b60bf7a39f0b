"""A model and the way it is tried, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["DTYPES", "Input", "Mode", "Spec", "Step"]

DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Input:
    """One argument of `forward`.

    Attributes:
        name: of the argument.
        kind: `image` (N, C, H, W), `tokens` (B, T, C), `sequence` (N, C, L), `table` (N, C), `volume` (N, C, D, H, W), `ids` (B, T)
            integers, or `number`, `flag`.
        shape: of a tensor.
        value: of a number or a flag; it is also the default.
        optional: None is the default; `given` says whether the call has it.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    value: Any = None
    optional: bool = False
    given: bool = True

    @property
    def is_tensor(self) -> bool:
        return self.kind not in ("number", "flag")


@dataclass(frozen=True)
class Step:
    """One building block: the value `name` is made from `reads`; `seed` draws its sizes and options."""

    name: str
    block: str
    reads: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Mode:
    """How the model is tried.

    Attributes:
        verify: `off`, `end` or `each`.
        with_inputs: False for `optimize(model)`.
        keywords: the example inputs are a dictionary.
        dynamic: axes that may vary: empty, `batch`, or `batch and size`.
        passes: as in `optimize`, or None.
        quantize: (weight bits, activation bits), or None.
        export: target of `to_onnx`, or empty.
    """

    verify: str = "off"
    with_inputs: bool = True
    keywords: bool = False
    dynamic: str = ""
    passes: tuple[str, ...] | None = None
    quantize: tuple[int, int] | None = None
    export: str = ""


@dataclass(frozen=True)
class Spec:
    """A whole case.

    Attributes:
        seed: of the values of weights and inputs.
        dtype: of both, where nothing else is said.
        outputs: names of values, of inputs, or of parameters as `self.NAME`; "None" stands for itself.
        structure: how they are returned: a key of `emit.STRUCTURES`.
    """

    seed: int
    dtype: str
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    structure: str
    mode: Mode
