"""What is in a file of OpenVINO, read from its text; and what OpenVINO makes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from normfuse.errors import UsageError

__all__ = ["Ran", "as_run", "float_dtypes", "layer_counts", "provenance", "with_facts"]

_NO_OPERATORS = ("Const", "Parameter", "Result")
_FLOATS = {"f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16"}
_NORMS = ("MVN", "RMS", "GroupNormalization", "NormalizeL2")
_PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
_ATTENTION = ("ScaledDotProductAttention", "ScaledAttn", "PagedAttention")
_INTEGERS = ("i8", "u8", "i4", "u4")


def layer_counts(path: Path) -> dict[str, int]:
    """Number of operators by type, the most frequent first.

    Raises:
        UsageError: the file is missing or is no model of OpenVINO.
    """
    found = Counter(str(layer.get("type")) for layer in _root(path).iter("layer"))
    return {name: n for name, n in found.most_common() if name not in _NO_OPERATORS}


def float_dtypes(path: Path) -> tuple[str, ...]:
    """Floating dtypes of inputs and weights, by torch's names.

    Raises:
        UsageError: the file is missing or is no model of OpenVINO.
    """
    found = {str(data.get("element_type")) for data in _root(path).iter("data")}
    return tuple(sorted(_FLOATS[name] for name in found if name in _FLOATS))


def provenance(path: Path) -> dict[str, str]:
    """What normfuse wrote into the file, under the keys that an ONNX file has; empty for a file of another origin.

    Raises:
        UsageError: the file is missing or is no model of OpenVINO.
    """
    told = _root(path).find("rt_info/framework")
    return {} if told is None else {e.tag: e.get("value", "") for e in told if e.tag.startswith("normfuse.")}


def with_facts(text: str, facts: dict[str, str]) -> str:
    """The text of a file with facts where OpenVINO puts the metadata of an ONNX file that it reads."""
    end = text.rindex("</net>")
    entries = "".join(f"\t\t\t<normfuse.{key} value={quoteattr(value)} />\n" for key, value in sorted(facts.items()))
    told = f"\t\t<framework>\n{entries}\t\t</framework>\n"
    closed = text.rfind("</rt_info>", text.rfind("</edges>"), end)
    if closed >= 0:
        return f"{text[:closed].rstrip()}\n{told}\t{text[closed:]}"
    empty = text.rfind("<rt_info", text.rfind("</edges>"), end)
    before = text[: empty if empty >= 0 else end].rstrip()
    return f"{before}\n\t<rt_info>\n{told}\t</rt_info>\n</net>\n"


@dataclass(frozen=True)
class Ran:
    """What OpenVINO runs in the place of a file.

    Attributes:
        norms: normalizations by kernel; those that it takes apart are not among them.
        products: number of products with weights, and of these those in integers.
        kernels: number of kernels by type and precision: `FullyConnected:u8`.
    """

    norms: dict[str, int]
    products: tuple[int, int]
    kernels: dict[str, int]


def as_run(compiled: Any) -> Ran:
    """Of a compiled model."""
    kernels = Counter[str]()
    for node in compiled.get_runtime_model().get_ops():
        told = node.get_rt_info()
        kernels[f"{told['layerType'].astype(str)}:{told['runtimePrecision'].astype(str)}"] += 1
    kinds = Counter[str]()
    for name, n in kernels.items():
        kinds[name.partition(":")[0]] += n
    products = {name: n for name, n in kernels.items() if name.partition(":")[0] in _PRODUCTS}
    integers = sum(n for name, n in products.items() if name.partition(":")[2] in _INTEGERS)
    return Ran({k: kinds[k] for k in _NORMS if kinds[k]}, (sum(products.values()), integers), dict(kernels.most_common()))


def _root(path: Path) -> ElementTree.Element:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as e:
        raise UsageError(f"{path} is not a model of OpenVINO: {e}") from e
    if root.tag != "net" or root.find("layers") is None:
        raise UsageError(f"{path} is not a model of OpenVINO: it holds no layers")
    return root
