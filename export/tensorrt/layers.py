"""What the builder made of a graph: its fused layers, read from its log.

Without a GPU no engine can be opened, and the log is the only inspector. Its format is no interface of TensorRT: what cannot be
read is left out, and nothing depends on it but what people look at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Layer", "kind", "kinds", "layers", "memory"]

_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), ")
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Layer:
    """One kernel of the engine.

    Attributes:
        name: TensorRT's, which lists the operations that are fused.
        type: `kgen` (generated), `gemm`, `runtime_fusion` (a product and what is around it), `correlation` (a convolution),
            `custom_layer` (a plugin), ...
        constants: element types of its weights.
        onnx: names of the ONNX nodes that are in it; our names carry the module path.
    """

    name: str
    type: str
    constants: tuple[str, ...] = ()
    onnx: tuple[str, ...] = ()


def layers(facts: Iterable[str]) -> tuple[Layer, ...]:
    """The fused layers in the messages of a builder."""
    found = []
    for text in facts:
        if text.startswith("Layers:"):
            for line in text.splitlines()[1:]:
                head = _LINE.match(line)
                if head:
                    _, _, rest = line.partition("Constants: [")
                    constants = tuple(_DATATYPE.findall(rest.partition("], Outputs")[0]))
                    found.append(Layer(head["name"], head["type"], constants, tuple(_ORIGIN.findall(line))))
    return tuple(found)


def memory(facts: Iterable[str], what: str) -> int | None:
    """Bytes of "Weights" or "Activation" memory; None where the builder did not say."""
    for text in facts:
        found = re.search(rf"Total {what} Memory: (\d+)", text)
        if found:
            return int(found[1])
    return None


def kinds(found: Sequence[Layer]) -> dict[str, int]:
    """Number of layers by what they do."""
    return dict(sorted(Counter(kind(layer) for layer in found).items(), key=lambda item: -item[1]))


def kind(layer: Layer) -> str:
    """What a layer does, where its name tells: a norm, attention, a plugin; else its type."""
    operations = [name.rsplit("/", 1)[-1].rstrip("_0123456789") for name in layer.onnx]
    if layer.type == "custom_layer":
        return "plugin"
    if "_mha" in layer.name:
        return "fused attention"
    for norm in ("LayerNormalization", "RMSNormalization"):
        if norm in operations and "Sqrt" in layer.name:  # a norm may have a second kernel, for what needs no row as a whole
            return norm
    return layer.type
