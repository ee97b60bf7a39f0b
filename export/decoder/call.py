"""One call of a model of transformers with our attention in the place of its own, and a cache that only hands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import CaptureError
from normfuse.export.decoder.causality import window_of
from normfuse.export.decoder.interfaces import attending, handing_cache
from normfuse.export.decoder.operator import cached_attention

__all__ = ["Call", "Pairs", "Site", "check_plain", "compared", "layers_of", "longest", "scale_of", "stumbled", "text_config"]

_HARMLESS = frozenset((
    "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions", "is_causal", "past_key_values",
    "past_key_value", "output_hidden_states", "return_dict", "layer_idx", "sliding_window", "softcap", "logits_to_keep",
))  # fmt: skip

Pairs = list[tuple[Tensor, Tensor]]
"""Keys and values by layer."""


@dataclass(frozen=True)
class Site:
    """One layer's attention.

    Attributes:
        name: path of the module.
        heads, kv_heads, width: of queries, of keys and values, of one head.
        scale, softcap: see `cached_attention`.
        window: tokens that a token sees, itself included; 0 for all.
    """

    name: str
    heads: int
    kv_heads: int
    width: int
    scale: float
    softcap: float
    window: int


@dataclass
class _Seen:
    """What a layer's attention was called with."""

    site: Site
    mask: Any


@dataclass
class Call:
    """One call.

    Attributes:
        model, route: what is called, and by which way it gets to its attention (`normfuse.export.decoder.interfaces.ROUTES`).
        attention_mask: [batch, total], 1 for valid tokens, the new ones included.
        windows: of each layer, as `Site` has it.
        pasts: keys and values of the tokens before; None for none.
        presents: those after the call, by layer.
    """

    model: nn.Module
    route: str
    attention_mask: Tensor
    windows: Sequence[int]
    pasts: Pairs | None = None
    seen: dict[int, _Seen] = field(default_factory=dict)
    presents: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: list[tuple[Tensor, Callable[..., Any], bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = handing_cache(self.pasts)

    def __call__(self, **keywords: Any) -> Tensor:
        """The logits of the model, called with `keywords` and the cache."""
        with attending(self.model, self.route, self.attend, self.mask):
            out = self.model(past_key_values=self.given_cache(), use_cache=True, **keywords)
        for i in range(len(self.windows)):
            if i not in self.presents:
                raise CaptureError(_around(self.model, i))
        logits: Tensor = out.logits
        return logits

    def given_cache(self) -> Any:
        """What the model is given as its cache."""
        return self.cache

    def flat(self) -> list[Tensor]:
        """Keys and values after the call: key of layer 0, value of layer 0, key of layer 1, …"""
        return [t for i in range(len(self.windows)) for t in self.presents[i]]

    def mask(self, mask_function: Callable[..., Any], use_vmap: bool = False, **_: Any) -> Tensor:
        """In the place of a mask: a tensor that stands for `mask_function`."""
        token = torch.empty(0)
        self.masks.append((token, mask_function, use_vmap))
        return token

    def function_of(self, mask: Any) -> tuple[Callable[..., Any], bool] | None:
        """What a mask that `mask` gave stands for; None for one of the model's own."""
        return next(((f, vmap) for token, f, vmap in self.masks if token is mask), None)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, dropout: float = 0.0,
        softcap: float | None = None, **rest: Any,
    ) -> Tensor:  # fmt: skip
        """In the place of attention: [batch, new, heads, width]."""
        layer = next((i for i, (k, v) in self.cache.fresh.items() if k is key and v is value), None)
        if layer is None:
            name = self.name(len(self.presents))
            raise CaptureError(f"{name} attends to other keys and values than it caches, as latent attention does")
        name = self.name(layer)
        if layer in self.presents:
            raise CaptureError(f"{name} attends to keys and values of another layer")
        check_plain(name, (query, key, value), dropout, rest)
        site = Site(
            name, query.shape[1], key.shape[1], query.shape[3], scale_of(query, scaling), float(softcap or 0.0), self.windows[layer]
        )
        self.seen[layer] = _Seen(site, attention_mask)
        past = self.pasts[layer] if self.pasts is not None else (key[:, :, :0], value[:, :, :0])
        out: Tensor
        out, *present = cached_attention(
            query, key, value, *past, self.attention_mask, None, None, site.scale, site.window, site.softcap, False,
            self.distances_of(layer),
        )  # fmt: skip
        self.presents[layer] = (present[0], present[1])
        return out

    def distances_of(self, layer: int) -> Tensor | None:
        """See `cached_attention`; a causal model adds nothing to its scores."""
        return None

    def name(self, layer: int) -> str:
        """Path of a layer's attention."""
        return _layer(self.model, layer)

    def sites(self) -> list[Site]:
        """What was seen, with the window that each layer's mask turned out to have."""
        found = []
        for i in range(len(self.windows)):
            site = self.seen[i].site
            held = self.function_of(self.seen[i].mask)
            if held is None:
                raise CaptureError(f"{site.name} makes a mask of its own, which cannot be looked into")
            window = window_of(*held, longest(self.model))
            if window is None:
                raise CaptureError(f"{site.name} has a mask that is neither causal nor causal within a window")
            found.append(Site(site.name, site.heads, site.kv_heads, site.width, site.scale, site.softcap, window))
        return found


def scale_of(query: Tensor, scaling: float | None) -> float:
    """The factor on the scores."""
    return float(query.shape[3] ** -0.5 if scaling is None else scaling)


def check_plain(name: str, operands: tuple[Tensor, Tensor, Tensor], dropout: float, rest: dict[str, Any]) -> None:
    """Complain about attention that does more than it says with queries, keys, values and a mask.

    Raises:
        CaptureError: see above; the message says what.
    """
    query, key, value = operands
    for argument, given in rest.items():
        if argument not in _HARMLESS and given is not None and given is not False:
            raise CaptureError(f"{name} asks its attention for {argument}, which is not written")
    if query.shape[3] != value.shape[3] or key.shape[3] != value.shape[3]:
        raise CaptureError(
            f"{name} has keys of width {key.shape[3]} and values of width {value.shape[3]} (latent attention); "
            "only heads of one width are written"
        )
    if dropout:
        raise CaptureError(f"{name} drops attention at random; put the model in eval mode")


def text_config(model: nn.Module) -> Any:
    """The configuration of the part that writes text."""
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def longest(model: nn.Module) -> int:
    """Rows of the model's table of positions, or what its configuration says that it was trained for."""
    config = text_config(model)
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    return int(next((n for n in (getattr(config, name, None) for name in names) if n), 2048))


def layers_of(model: nn.Module) -> int:
    """Layers of the part that writes text.

    Raises:
        CaptureError: its layers do not stand in a list.
    """
    if not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return int(text_config(model).num_hidden_layers)
    stack = next((m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)), None)  # type: ignore[operator]
    if stack is None:
        raise CaptureError(f"{type(model).__name__} has a decoder whose layers do not stand in a list")
    return len(stack)


def _layer(model: nn.Module, layer: int) -> str:
    """Path of a layer's attention, of the layer where that is not found, and its number where that is not found either."""
    inside = ""
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        decoder = model.get_decoder()  # type: ignore[operator]
        inside = next(n for n, m in model.named_modules() if m is decoder)
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.startswith(inside)]
    path = next((n for n, m in stacks if len(m) == layers_of(model)), None)
    if path is None:
        return f"layer {layer}"
    inner = [n for n, m in model.get_submodule(f"{path}.{layer}").named_children() if "attn" in n or "attention" in n]
    inner = [n for n in inner if "norm" not in n]
    return f"{path}.{layer}.{inner[0]}" if inner else f"{path}.{layer}"


def _around(model: nn.Module, layer: int) -> str:
    """A layer whose attention never came to us."""
    name = _layer(model, layer)
    with suppress(AttributeError):  # it may be only a number
        name = f"{name} ({type(model.get_submodule(name)).__name__})"
    return f"{name} has attention that does not go through the interface of transformers, or keeps no keys and values of its own"


def stumbled(call: Call, error: Exception) -> CaptureError:
    """A layer that computes attention itself stumbles over the cache that only hands on."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return CaptureError(f"{_around(call.model, len(call.presents))} ({said})")


def compared(model: nn.Module, logits: Tensor, expected: Tensor, sites: Sequence[Site]) -> None:
    """The model itself must say the same: what we do not know of shows in numbers.

    Raises:
        CaptureError: it says something else.
    """
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    bound = 1e-3 if logits.dtype == torch.float32 else 0.1
    if not error <= bound:
        raise CaptureError(
            f"{type(model).__name__} with its attention as an operator deviates by {error:.1e}: a layer such as {sites[0].name} "
            "does more than it tells"
        )
