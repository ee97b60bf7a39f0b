"""Where models of transformers call their attention and get their masks, for the time of a call ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.extras import need

__all__ = ["ROUTES", "attending", "handing_cache", "handing_pair"]

_OURS = "normfuse_decoder"  # our name in the interfaces
_SDPA = "sdpa"
#: Ways to a model's attention: its registry, which nearly all models ask; and PyTorch's own function, which some call themselves.
ROUTES = ("registry", "function")

Attend = Callable[..., Tensor]


@contextmanager
def attending(model: nn.Module, route: str, attend: Attend, mask: Callable[..., Any]) -> Iterator[None]:
    """Attention and masks of `model` are these.

    Args:
        attend: (query, key, value, mask, keywords of the interface) -> [batch, new, heads, width].
        mask: keywords of the interface -> what layers are given as their mask.
    """
    transformers = need("transformers", extra="hf")
    attentions, masks = transformers.AttentionInterface._global_mapping, transformers.AttentionMaskInterface._global_mapping
    name = _OURS if route == "registry" else _SDPA
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    mask_before, function = masks.get(name), torch.nn.functional.scaled_dot_product_attention
    masks[name] = lambda *_, **keywords: mask(**keywords)
    if route == "registry":
        attentions[name] = lambda _module, *values, **keywords: (attend(*values, **keywords), None)
    else:
        torch.nn.functional.scaled_dot_product_attention = _as_function(attend)
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        torch.nn.functional.scaled_dot_product_attention = function
        if mask_before is None:
            masks.pop(name, None)
        else:
            masks[name] = mask_before
        attentions.pop(_OURS, None)


def _as_function(attend: Attend) -> Callable[..., Tensor]:
    """With the signature of PyTorch's function; a mask that it makes itself (`is_causal`) is none of the model's."""

    def scaled_dot_product_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        return attend(query, key, value, attn_mask, scaling=scale, dropout=dropout_p).transpose(1, 2)

    return scaled_dot_product_attention


def handing_cache(pasts: list[tuple[Tensor, Tensor]] | None, before: int = 0) -> Any:
    """A cache of transformers that hands keys and values on, and says how many there were before.

    `fresh` holds by layer what was handed on. Without `pasts`, so many slots of zeros stand `before` what is handed on.
    """
    transformers = need("transformers", extra="hf")

    class Handing(transformers.DynamicCache):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.fresh: dict[int, tuple[Tensor, Tensor]] = {}

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            handed = (key_states, value_states)
            if before:
                handed = tuple(torch.cat([t.new_zeros(*t.shape[:2], before, t.shape[3]), t], 2) for t in handed)  # type: ignore[assignment]
            self.fresh[layer_idx] = handed
            return handed

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return before if pasts is None else pasts[0][0].shape[2]

        def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
            return self.get_seq_length() + query_length, 0

    return Handing()


def handing_pair(own: Any, cross: Any, given: list[tuple[Tensor, Tensor]] | None = None) -> Any:
    """Two handing caches as that of an encoder and a decoder.

    Args:
        own, cross: of the tokens before, and of the encoder's states.
        given: keys and values of the encoder's states, which the layers then do not make themselves.
    """
    transformers = need("transformers", extra="hf")
    pair = transformers.EncoderDecoderCache(own, cross)
    if given is not None:
        cross.layers = [SimpleNamespace(keys=k, values=v) for k, v in given]
        cross.fresh.update(enumerate(given))
        pair.is_updated = dict.fromkeys(range(len(given)), True)
    return pair
