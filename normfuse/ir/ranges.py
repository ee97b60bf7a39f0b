"""The range that a value had on the calibration data, as a note on its node.

It stands in `node.meta["custom"]`, which torch.export carries into the graph of a program and into saved ones.
"""

from __future__ import annotations

import json
import math
from typing import Any

from torch import fx

__all__ = ["KEY", "parsed_ranges", "range_of", "set_range"]

#: Of the entry: [least, largest].
KEY = "normfuse_range"


def set_range(node: fx.Node, low: float, high: float) -> None:
    """Note that the values of `node` lay between `low` and `high`."""
    node.meta["custom"] = {**node.meta.get("custom", {}), KEY: [float(low), float(high)]}


def range_of(node: fx.Node) -> tuple[float, float] | None:
    """What was noted; None where nothing was."""
    return _range(node.meta.get("custom"))


def parsed_ranges(text: str) -> str | None:
    """The entry of a saved node with nothing in it but a range; None where it has none."""
    try:
        found = _range(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return None if found is None else json.dumps({KEY: list(found)})


def _range(custom: Any) -> tuple[float, float] | None:
    found = custom.get(KEY) if isinstance(custom, dict) else None
    if not isinstance(found, (list, tuple)) or len(found) != 2 or not all(type(v) in (int, float) for v in found):
        return None
    low, high = map(float, found)
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low <= high else None
