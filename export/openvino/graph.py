"""What is in a file of OpenVINO, read from its text; and what OpenVINO makes of it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from normfuse.errors import UsageError

__all__ = ["Facts", "Ran", "as_run", "facts", "float_dtypes", "layer_counts", "norm_counts", "provenance", "with_facts"]

_NO_OPERATORS = ("Const", "Parameter", "Result")
_FLOATS = {"f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16"}
_NORMS = ("MVN", "RMS", "GroupNormalization", "NormalizeL2")
_PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
_ATTENTION = ("ScaledDotProductAttention", "ScaledAttn", "PagedAttention")
_WRITTEN_NORMS = ("MVN", "GroupNormalization", "NormalizeL2", "BatchNormInference")
_PRECISIONS = {"FP16": "float16", "FP32": "float32", "FP64": "float64", "BF16": "bfloat16", "BOOL": "bool"}
_INTEGERS = ("i8", "u8", "i4", "u4")


@dataclass(frozen=True)
class Facts:
    """What somebody who is to run a file wants to know.

    Attributes:
        inputs, outputs: name and type of each, e.g. `("x", "float32[?, 3, 224, 224]")`; sizes that may vary are `?`.
        ir: version of OpenVINO's format.
        bytes: size of the file and of the weights beside it.
    """

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    ir: int
    bytes: int


def facts(path: Path) -> Facts:
    """What is needed to run the file at `path`; it is read as text, without OpenVINO.

    Raises:
        UsageError: the file is missing or is no model of OpenVINO.
    """
    root = _root(path)
    inputs = [_port(layer, "output/port", str(layer.get("name"))) for layer in _of_type(root, "Parameter")]
    outputs = [
        _port(layer, "input/port", str(layer.get("output_names") or layer.get("name"))) for layer in _of_type(root, "Result")
    ]
    files = (path, path.with_suffix(".bin"))
    version = root.get("version", "")
    return Facts(
        tuple(inputs),
        tuple(outputs),
        int(version) if version.isdecimal() else 0,
        sum(f.stat().st_size for f in files if f.is_file()),
    )


def _of_type(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [layer for layer in root.iter("layer") if layer.get("type") == kind]


def _port(layer: ElementTree.Element, where: str, otherwise: str) -> tuple[str, str]:
    """Name and type of what goes through the first port there."""
    port = layer.find(where)
    if port is None:
        return otherwise, "?"
    sizes = [dim.text or "?" for dim in port.iter("dim")]
    name = (port.get("names") or otherwise).partition(",")[0]
    precision = port.get("precision", "?")
    kind = _PRECISIONS.get(precision) or re.sub(r"^(U?)I(\d+)$", lambda m: f"{m[1].lower()}int{m[2]}", precision)
    return name, f"{kind}[{', '.join('?' if n.startswith('-') else n for n in sizes)}]"


def norm_counts(path: Path) -> dict[str, int]:
    """Number of normalizations by type; OpenVINO spells an RMSNorm out.

    Raises:
        UsageError: the file is missing or is no model of OpenVINO.
    """
    return {name: n for name, n in layer_counts(path).items() if name in _WRITTEN_NORMS}


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
