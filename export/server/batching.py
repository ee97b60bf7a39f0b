"""Whether the server may put requests together, and how many of them.

The server stacks requests along the first axis of every input, runs the model once and cuts the outputs apart again. It may do so
where the first axis of every input and output is one and the same axis, and no other axis depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from normfuse.errors import UsageError
from normfuse.export.server.signature import Signature

__all__ = ["DEFAULT_MAX_BATCH", "check_preferred", "max_batch_size", "why_not"]

#: What a model without an upper bound is served with, where nothing else is said.
DEFAULT_MAX_BATCH = 64


def why_not(signature: Signature) -> str:
    """Why requests cannot be put together; empty where they can."""
    tensors = signature.tensors
    for t in tensors:
        if not t.shape:
            return f"{t} has no axes"
        if isinstance(t.shape[0], int):
            return f"the first axis of {t} is fixed; export it with --dynamic batch, or dynamic_shapes"
    names = {str(t.shape[0]) for t in tensors} - {""}
    if len(names) > 1:
        return f"the first axes of inputs and outputs differ ({', '.join(sorted(names))})"
    for t in tensors:
        # [batch, batch]: each row of the output depends on every request in the batch
        if any(isinstance(size, str) and names & set(re.findall(r"\w+", size)) for size in t.shape[1:]):
            return f"{t} uses the first axis of the inputs a second time"
    for name, profile in signature.profiles.items():
        if profile.min[0] > 1:
            return f"the engine takes no batch below {profile.min[0]} of input {name}"
    return ""


def max_batch_size(signature: Signature, wanted: int | None) -> int:
    """`max_batch_size` of the configuration: 0 for a model that is served without batching.

    Raises:
        UsageError: `wanted` cannot be had.
    """
    if wanted is not None and wanted < 0:
        raise UsageError(f"max_batch is {wanted}, expected 0 (no batching) or more")
    if wanted == 0:
        return 0
    problem = why_not(signature)
    if problem:
        if wanted is not None:
            raise UsageError(
                f"max_batch is {wanted}, and requests cannot be put together: {problem}. Export with a dynamic batch axis "
                "(--dynamic), or leave max_batch out"
            )
        return 0
    bound = min((p.max[0] for p in signature.profiles.values()), default=None)
    if wanted is None:
        return DEFAULT_MAX_BATCH if bound is None else bound
    if bound is not None and wanted > bound:
        raise UsageError(f"max_batch is {wanted}, and the engine was built for at most {bound}; build it with larger --shapes")
    return wanted


def check_preferred(sizes: Sequence[int], max_batch: int) -> None:
    """Raises UsageError where a preferred batch size cannot occur."""
    for size in sizes:
        if not 1 <= size <= max(max_batch, 0):
            limit = f"1 to {max_batch}" if max_batch else "none, because the model is served without batching"
            raise UsageError(f"preferred batch size {size}: expected {limit}")
