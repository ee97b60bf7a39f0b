"""What a form of quantized layers has to say; each stands in a file of its own, and `quantized.forms` knows them all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from normfuse.export.lowering.layers import Layer
from normfuse.export.onnx.program import Program
from normfuse.export.targets import QuantizedForm, Target
from normfuse.ir.passes import Pass

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["INT4_OPSET", "Form", "Wanted"]

#: DequantizeLinear of INT4, and in blocks, exists from here on.
INT4_OPSET = 21


@dataclass(frozen=True)
class Wanted:
    """What a file with quantized layers is for.

    Attributes:
        target: where it is to run.
        opset: of its standard ops.
        int4: weights of up to 4 bits are INT4 in the file, expanded by the runtime when it loads.
        program: what is written; None where only the layers are known.
    """

    target: Target
    opset: int
    int4: bool = False
    program: Program | None = None

    def instead_of(self, *names: str) -> str:
        """The first form of the target that is none of these, for a remedy."""
        return next(f for f in self.target.quantized if f not in names)


class Form:
    """A way to write quantized layers. A new one is a file with a subclass, its name in `QuantizedForm` and in the targets that
    take it, and its line in `quantized.forms`.

    Attributes:
        name: what the user writes.
        packs: weights of up to 4 bits are packed in it anyway.
        rounds: activations are rounded as the module rounds them; else the file computes something else: `meant`.
        kernels: its nodes are ops of normfuse's kernel library, and are functions where that is not there.
        passes: what makes of the graph what it can write, in order.
    """

    name: ClassVar[QuantizedForm]
    packs: ClassVar[bool] = False
    rounds: ClassVar[bool] = True
    kernels: ClassVar[bool] = False
    passes: ClassVar[tuple[Pass, ...]] = ()

    def refuses(self, layers: Sequence[Layer], wanted: Wanted) -> str | None:
        """Why it cannot express these layers, and what to do; None where it can."""
        return None

    def offers_itself(self) -> bool:
        """`auto` considers it on this machine."""
        return True

    def write(self, model: ir.Model, wanted: Wanted) -> None:
        """Write every marker of the model in this form, in place."""
        raise NotImplementedError

    def at_last(self, model: ir.Model) -> None:
        """What must be done, in place, after constants that are alike have become one."""

    def meant(self, program: Program, target: Target, kept: Collection[str] = ()) -> Program:
        """What the file is held against; operators of `torch.ops.normfuse` named in `kept` are nodes of their own in it."""
        return program

    def deviates(self, program: Program, target: Target) -> str:
        """What of the file is not as the module computes it, for a note: "activations stay floats"; empty where nothing is."""
        return ""
