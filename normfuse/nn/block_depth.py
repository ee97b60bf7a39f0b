"""The depth of the block that each norm of a model belongs to, from the lists in the module paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from normfuse.errors import UsageError, did_you_mean

__all__ = ["block_depths"]

# q and k of one head, and what stands behind a branch: no norm of the residual stream
_INNER = re.compile(r"(^|_)(q|k|v|qk|query|key|value|head)_?(layer_?)?norm|^inner_|(^|_)norm_(q|k|v)$|sub_?(layer_?)?norm")


def block_depths(
    model: nn.Module, paths: Sequence[str], base: int = 1, depths: Mapping[str, int] | None = None
) -> dict[str, int | str]:
    """ℓ of each norm, or the reason why it has none.

    Args:
        model: the model.
        paths: module paths of its norms.
        base: ℓ of the first block of a list.
        depths: ℓ by module path of a norm or of a module around norms, the longest that fits; norms without one have none.

    Raises:
        UsageError: `base` or an ℓ is below 1, or a key of `depths` is no part of any path.
    """
    if depths is not None:
        return _given(paths, depths)
    _whole(base, "base")
    blocks = {path: _block(model, path, paths) for path in paths}
    families: dict[tuple[str, ...], list[str]] = {}
    for known in dict.fromkeys(b for b in blocks.values() if b is not None):
        families.setdefault(_family(known), []).append(known)
    found: dict[str, int | str] = {}
    for path, block in blocks.items():
        reason = _no_pre_norm(model, path)
        if block is None:
            found[path] = "belongs to no block: the final norm, or one that depths= must name"
        elif block == path:
            found[path] = "is an item of a list of norms, of which the last may be the final norm; name them in depths="
        elif any(b is not None and b.startswith(f"{block}.") for b in blocks.values()):
            found[path] = "stands between blocks; name it in depths= if it is a pre-norm"
        elif reason is not None:
            found[path] = reason
        else:
            family = families[_family(block)]
            numbers = [int(p) for p in block.split(".") if p.isdecimal()]
            found[path] = base + (numbers[-1] if len(numbers) == 1 else family.index(block))
    return found


def _block(model: nn.Module, path: str, paths: Sequence[str]) -> str | None:
    """The item of the innermost list of like modules around a norm: `layers.0.blocks.1` of a Swin, `block.3` of a T5."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if not parts[end - 1].isdecimal():
            continue
        around, block = model.get_submodule(".".join(parts[: end - 1])), ".".join(parts[:end])
        items = list(around.children())
        if not isinstance(around, (nn.ModuleList, nn.Sequential)) or len({type(m) for m in items}) > 1:
            continue
        # a chain of one module is a list of blocks if that module looks like a block
        if len(items) > 1 or isinstance(around, nn.ModuleList) or sum(p.startswith(f"{block}.") for p in paths) > 1:
            return block
    return None


def _family(block: str) -> tuple[str, ...]:
    return tuple("#" if p.isdecimal() else p for p in block.split("."))


def _no_pre_norm(model: nn.Module, path: str) -> str | None:
    """Why a norm inside a block is no pre-norm, as far as names and settings tell."""
    parts = path.split(".")
    if _INNER.search(parts[-1].lower()):
        return "normalizes something inside a branch, not the residual stream"
    parents = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    if any(getattr(m, "norm_first", None) is False for m in parents) or parts[-2:] == ["output", "LayerNorm"]:
        return "stands behind its branch (Post-LN)"
    names = {name for name, _ in parents[-1].named_children()}
    if "pre_feedforward_layernorm" in names and parts[-1].startswith("post_"):
        return "stands behind its branch"
    return None


def _given(paths: Sequence[str], depths: Mapping[str, int]) -> dict[str, int | str]:
    for key, depth in depths.items():
        _whole(depth, f"depths[{key!r}]")
        if not any(p == key or p.startswith(f"{key}.") for p in paths):
            hint = did_you_mean(key, paths)
            raise UsageError(f"depths: {key!r} is no norm of the model and contains none{hint}")
    found: dict[str, int | str] = {}
    for path in paths:
        keys = [k for k in depths if path == k or path.startswith(f"{k}.")]
        found[path] = depths[max(keys, key=len)] if keys else "has no entry in depths="
    return found


def _whole(value: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{what} = {value!r}: expected a whole number from 1 on, because the factor is 1/√ℓ")
