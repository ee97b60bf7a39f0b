"""Which nodes of an ONNX file TensorRT takes, without building anything."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normfuse.export.onnx.inspect import read_model
from normfuse.export.tensorrt.builder import ask, refusal
from normfuse.export.tensorrt.flavour import find

__all__ = ["Node", "Support", "supported"]


@dataclass(frozen=True)
class Node:
    """One node: name, op type, whether the parser takes it, and what it says if not."""

    name: str
    op: str
    taken: bool
    text: str = ""


@dataclass(frozen=True)
class Support:
    """What a parser says of a file.

    Attributes:
        file: the ONNX file.
        module, version: which TensorRT.
        nodes: in the order of the graph.
    """

    file: Path
    module: str
    version: str
    nodes: tuple[Node, ...]

    @property
    def refused(self) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if not n.taken)

    def to_dict(self) -> dict[str, Any]:
        return {"module": self.module, "version": self.version, "nodes": [asdict(n) for n in self.nodes]}

    def __str__(self) -> str:
        """A line an op type, then each refused node with its reason; at most 80 columns."""
        taken = Counter(n.op for n in self.nodes if n.taken)
        refused = Counter(n.op for n in self.nodes if not n.taken)
        lines = [f"{self.module} {self.version}: takes {sum(taken.values())} of {len(self.nodes)} nodes"]
        width = max((len(op) for op in {*taken, *refused}), default=0)
        lines += (
            f"  {op:<{width}} {taken[op]:>5}{f'  refused: {refused[op]}' if op in refused else ''}"
            for op in sorted({*taken, *refused}, key=lambda op: (op not in refused, -taken[op], op))
        )
        for node in self.refused:
            lines += textwrap.wrap(node.text, 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        return "\n".join(lines)


def supported(file: str | Path, *, flavour: str | None = None, plugins: bool = False) -> Support:
    """Ask the parser about every node of the ONNX file at `file`; with `plugins`, it knows normfuse's own.

    Raises:
        UsageError: there is no such file, or it is no ONNX file.
        ExportError: TensorRT does not load.
        MissingExtra: it is not installed.
    """
    file = Path(file)
    graph = read_model(file).graph
    module = find(flavour)
    answer = ask(module, "support", {"onnx": str(file.resolve()), "plugins": plugins})
    errors = {e["node"]: e for e in answer["errors"]}
    nodes = []
    for node in graph.node:
        error = errors.pop(node.name, None)
        nodes.append(Node(node.name, node.op_type, error is None, "" if error is None else refusal(error)))
    nodes += [Node(e["node"], e["op"] or "weight", False, refusal(e)) for e in errors.values()]
    return Support(file, module, answer["version"], tuple(nodes))
