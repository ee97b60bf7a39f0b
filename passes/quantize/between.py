"""The ranges of what lies between convolutions with static scales, for files whose runtimes keep codes from layer to layer.

Such a runtime adds, pools and concatenates codes, so that it needs a scale for what additions read and write, too, and not only
for what layers read. Images only: what a transformer adds up stays in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.ir.ranges import set_range
from normfuse.passes.quantize.layers.conv2d import Conv2d
from normfuse.passes.quantize.layers.layer import Layer
from normfuse.passes.quantize.reach import Reach, reaches

__all__ = ["note_ranges", "observed_ranges"]

_IMAGE = 4  # axes


def observed_ranges(graph: Graph, samples: Samples, layers: Sequence[Layer]) -> dict[fx.Node, Reach]:
    """How far each image reaches that such a convolution gives, or that is made of one.

    Args:
        graph: in float; it is not changed.
        samples: the batches of this rank.
        layers: those that are to be quantized.
    """
    static = {layer.node for layer in layers if isinstance(layer, Conv2d) and layer.spec.activations == "static"}
    nodes: dict[fx.Node, None] = {}
    for node in graph.fx.nodes:
        if node in static or (_is_image(node) and any(n in nodes for n in node.all_input_nodes)):
            nodes[node] = None
    return reaches(graph, samples, list(nodes))


def note_ranges(found: Mapping[fx.Node, Reach], emitted: Mapping[fx.Node, fx.Node]) -> None:
    """Write those that are known on the nodes, or on what stands in their place."""
    for node, reach in found.items():
        if reach.known:
            set_range(emitted.get(node, node), reach.low, reach.high)


def _is_image(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == _IMAGE and value.is_floating_point()
