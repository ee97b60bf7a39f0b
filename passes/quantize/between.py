"""The ranges of what lies between convolutions with static scales, for files whose runtimes keep codes from layer to layer.

Such a runtime adds, pools and concatenates codes, so that it needs a scale for what additions read and write, too, and not only
for what layers read. Images only: what a transformer adds up stays in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.ir.ranges import set_range
from normfuse.passes.quantize.layers.conv2d import Conv2d
from normfuse.passes.quantize.layers.layer import Layer
from normfuse.passes.quantize.probe import accumulate

__all__ = ["note_ranges", "observed_ranges"]

_IMAGE = 4  # axes


def observed_ranges(graph: Graph, samples: Samples, layers: Sequence[Layer]) -> dict[fx.Node, Tensor]:
    """(largest, −least) of each image that such a convolution gives, or that is made of one, over all calibration data.

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
    found = accumulate(graph, samples, [(node, _extremes) for node in nodes], torch.maximum, label="ranges")
    return dict(zip(nodes, found, strict=bool(found)))


def note_ranges(found: Mapping[fx.Node, Tensor], emitted: Mapping[fx.Node, fx.Node]) -> None:
    """Write them on the nodes, or on what stands in their place."""
    for node, (high, low) in found.items():
        set_range(emitted.get(node, node), -float(low), float(high))


def _is_image(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.ndim == _IMAGE and value.is_floating_point()


def _extremes(x: Tensor) -> Tensor:
    return torch.stack([x.amax(), -x.amin()]).double() if x.numel() else torch.full((2,), -torch.inf, dtype=torch.float64)
