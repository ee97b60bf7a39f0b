"""What is in an ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normfuse.errors import UsageError
from normfuse.export.onnx.tensors import check_tensors
from normfuse.export.onnx.writer.variants import base_name
from normfuse.export.ops import DOMAIN
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx

__all__ = ["NORM_OPS", "Facts", "facts", "float_dtypes", "norm_counts", "op_counts", "provenance", "read_model"]

#: Normalizations, standard and of ONNX Runtime.
NORM_OPS = frozenset(
    {
        "BatchNormalization",
        "CrmsNorm",
        "EmbedLayerNormalization",
        "GroupNorm",
        "GroupNormalization",
        "InstanceNormalization",
        "L1Norm",
        "LayerNormalization",
        "LpNormalization",
        "MeanVarianceNormalization",
        "NormQuantize",
        "RMSNormalization",
        "RmsNorm",
        "SimplifiedLayerNormalization",
        "SkipGroupNorm",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)


# By the number that stands for it in a file.
_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}


@dataclass(frozen=True)
class Facts:
    """What somebody who is to run a file wants to know.

    Attributes:
        inputs, outputs: name and type of each, e.g. `("x", "float32[batch, 3, 224, 224]")`.
        opsets: version by domain; "" is ONNX's own.
        ir: version of the format.
        bytes: size of the file and of the weights beside it.
        runtime: the oldest ONNX Runtime that it needs; empty where the file does not say it.
    """

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    opsets: dict[str, int]
    ir: int
    bytes: int
    runtime: str = ""


def facts(path: str | Path) -> Facts:
    """What is needed to run the file at `path`.

    Raises:
        UsageError: the file is missing or is no ONNX model.
    """
    proto = read_model(path)
    weights = {t.name for t in proto.graph.initializer}
    beside = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    files = [Path(path), *(Path(path).parent / name for name in beside)]
    return Facts(
        tuple((v.name, _type(v)) for v in proto.graph.input if v.name not in weights),
        tuple((v.name, _type(v)) for v in proto.graph.output),
        {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import},
        proto.ir_version,
        sum(f.stat().st_size for f in files if f.is_file()),
        provenance(proto).get("normfuse.runtime", ""),
    )


def _type(value: onnx.ValueInfoProto) -> str:
    onnx = need("onnx", extra="onnx")
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return str(kind)
    tensor = value.type.tensor_type
    sizes = [d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    name = {"float": "float32", "double": "float64"}.get(name, name)
    return f"{name}[{', '.join(sizes)}]" if tensor.HasField("shape") else name


def op_counts(model: str | Path | onnx.ModelProto) -> dict[str, int]:
    """Number of nodes by op type, the most frequent first; subgraphs and functions count once.

    Ops of another domain than ONNX's own carry it: `com.microsoft.Attention`. Variants of an op of normfuse count as that op, and
    functions of its domain do not count: they say what its ops mean to a runtime without them.

    Raises:
        UsageError: the file is missing or is no ONNX model.
    """
    proto = read_model(model)
    nodes = [*_nodes(proto.graph.node), *(n for f in proto.functions if f.domain != DOMAIN for n in _nodes(f.node))]
    counts = Counter(map(_label, nodes))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def float_dtypes(model: str | Path | onnx.ModelProto) -> frozenset[str]:
    """Floating dtypes of inputs, outputs and weights, e.g. `float16`.

    Raises:
        UsageError: the file is missing or is no ONNX model.
    """
    graph = read_model(model).graph
    values = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)]
    return frozenset(_FLOATS[t] for t in (*values, *(t.data_type for t in graph.initializer)) if t in _FLOATS)


def norm_counts(model: str | Path | onnx.ModelProto) -> dict[str, int]:
    """Number of normalizations by op type; one that is spelt out in primitive ops is not recognised."""
    return {op: n for op, n in op_counts(model).items() if op.rpartition(".")[2] in NORM_OPS}


def provenance(model: str | Path | onnx.ModelProto) -> dict[str, str]:
    """What normfuse wrote into the file: version, target, passes, error, hashes; empty for a file of another origin."""
    return {p.key: p.value for p in read_model(model).metadata_props if p.key.startswith("normfuse.")}


def read_model(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """The ONNX file as a message, without weights that stand beside it; a message as it is.

    Raises:
        UsageError: the file is missing or is no ONNX model, or takes weights from elsewhere.
    """
    onnx = need("onnx", extra="onnx")
    if not isinstance(model, (str, Path)):
        return model
    path = Path(model)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as e:  # protobuf raises DecodeError or whatever the bytes lead to
        raise UsageError(f"{path} is not an ONNX model: {e}") from e
    if not proto.graph.node and not proto.graph.output:
        raise UsageError(f"{path} is not an ONNX model: it holds no graph")
    check_tensors(proto, path)
    return proto  # type: ignore[no-any-return]


def _label(node: onnx.NodeProto) -> str:
    if node.domain in ("", "ai.onnx"):
        return str(node.op_type)
    return f"{node.domain}.{base_name(node.op_type) if node.domain == DOMAIN else node.op_type}"


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
                yield from _nodes(graph.node)
