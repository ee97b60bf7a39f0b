"""A causal language model of transformers as a module with flat caches: tensors in, tensors out.

Models of transformers call their attention through an interface, and get their masks through another one. Both are ours while the
model is called: attention becomes one operator (`normfuse.export.decoder.operator`), and a mask is a token that stands for a
function of positions, which is *evaluated*: only what is causal, or causal within a window, is taken. The cache that the model
is given only hands keys and values on. What goes around the interfaces is refused by the name of its layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import CaptureError, UsageError
from normfuse.export.decoder.causality import window_of
from normfuse.export.decoder.interfaces import ROUTES, attending, handing_cache
from normfuse.export.decoder.operator import cached_attention, newest, positions
from normfuse.extras import need

__all__ = ["CausalModel", "Site", "cached", "check_kind", "longest", "text_config"]

_HARMLESS = frozenset((
    "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions", "is_causal", "past_key_values",
    "past_key_value", "output_hidden_states", "return_dict", "layer_idx", "sliding_window", "softcap", "logits_to_keep",
))  # fmt: skip


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


class CausalModel(nn.Module):
    """`model` with its cache as tensors.

    `forward(input_ids, attention_mask, pasts)` returns the logits [batch, new, vocabulary] ([batch, 1, vocabulary], those of
    each row's newest token, with `last_logits`), and the keys and values of each
    layer in the order of `pasts`: key of layer 0, value of layer 0, key of layer 1, …
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], route: str = ROUTES[0], *, last_logits: bool = False) -> None:
        super().__init__()
        self.model, self.sites, self.route, self.last_logits = model, tuple(sites), route, last_logits
        self.train(model.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pasts: list[Tensor]) -> tuple[Tensor, ...]:
        call = _Call(self.model, self.route, attention_mask, [site.window for site in self.sites])
        with self._newest(attention_mask):
            logits, presents = call(input_ids, list(zip(pasts[::2], pasts[1::2], strict=True)))
        return (logits, *presents)

    @contextmanager
    def _newest(self, mask: Tensor) -> Iterator[None]:
        """The last matrix reads the newest token of each row alone, where that is asked for."""
        if not self.last_logits:
            yield
            return
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, given: (newest(given[0], mask), *given[1:]))
        try:
            yield
        finally:
            hook.remove()

    def example(self, batch: int = 2, past: int = 3, new: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Inputs with random tokens; the second row is padded on the left."""
        generator = torch.Generator().manual_seed(0)
        config = text_config(self.model)
        ids = torch.randint(0, config.vocab_size, (batch, new), generator=generator)
        mask = torch.ones(batch, past + new, dtype=torch.int64)
        mask[1:, :1] = 0
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        sizes = [(batch, s.kv_heads, past, s.width) for s in self.sites for _ in range(2)]
        return ids, mask, [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    def dynamic_shapes(self) -> tuple[Any, Any, Any]:
        """What may vary: rows, new tokens, slots of the past, and the length of the mask."""
        dim = torch.export.Dim
        batch, new = dim("batch_size"), dim("sequence_length")
        past, total = dim("past_sequence_length"), dim("total_sequence_length")
        return {0: batch, 1: new}, {0: batch, 1: total}, [{0: batch, 2: past} for _ in range(2 * len(self.sites))]


def cached(model: nn.Module, *, last_logits: bool = False) -> CausalModel:
    """`model` with flat caches; it is shared, not copied.

    Raises:
        UsageError: it is no causal language model of transformers, or its last matrix is not read as a layer (`last_logits`).
        CaptureError: a layer's attention is not of a kind that can be written; the message names the layer.
    """
    check_kind(model)
    refused: CaptureError | None = None
    for route in ROUTES:
        try:
            with torch.no_grad():
                found = CausalModel(model, _sites(model, route), route, last_logits=last_logits)
                if last_logits and found(*found.example())[0].shape[1] != 1:
                    raise UsageError(f"last_logits=True: {type(model).__name__} does not call its last matrix as a layer")
                return found
        except CaptureError as e:
            refused = refused or e
    assert refused is not None
    raise refused


def _sites(model: nn.Module, route: str) -> list[Site]:
    """The layers' attention, from a call of the model that must say what the model itself says."""
    found = _Call(model, route, None, [0] * text_config(model).num_hidden_layers)
    ids = torch.arange(8)[None] % text_config(model).vocab_size
    try:
        logits, _ = found(ids, None)
    except CaptureError:
        raise
    except Exception as e:
        # a layer that computes attention itself stumbles over the cache that only hands on
        said = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise CaptureError(f"{_around(model, len(found.presents))} ({said})") from e
    sites = found.sites()
    _compare(model, ids, logits, sites)
    return sites


def text_config(model: nn.Module) -> Any:
    """The configuration of the part that writes text."""
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def check_kind(model: nn.Module) -> None:
    """Complain about anything that is no causal language model of transformers.

    Raises:
        UsageError: see above; the message says what it is instead.
    """
    transformers = need("transformers", extra="hf")
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(f"{type(model).__name__} is no model of transformers: a decoder is made of a causal language model")
    if model.config.is_encoder_decoder:
        raise UsageError(f"{type(model).__name__} has an encoder and a decoder: only causal language models become folders")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UsageError(f"{type(model).__name__} generates no text: it is no causal language model")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"{type(model).__name__} keeps no keys and values: it takes no past_key_values")


@dataclass
class _Seen:
    """What a layer's attention was called with."""

    site: Site
    mask: Any


@dataclass
class _Call:
    """One call of the model with our attention in the place of its own."""

    model: nn.Module
    route: str
    attention_mask: Tensor | None
    windows: list[int]
    seen: dict[int, _Seen] = field(default_factory=dict)
    presents: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: list[tuple[Tensor, Callable[..., Any], bool]] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, pasts: list[tuple[Tensor, Tensor]] | None) -> tuple[Tensor, list[Tensor]]:
        mask = torch.ones_like(input_ids) if self.attention_mask is None else self.attention_mask
        self.attention_mask = mask
        self.cache = handing_cache(pasts)
        keywords: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        takes = inspect.signature(self.model.forward).parameters
        if "position_ids" in takes:
            keywords["position_ids"] = positions(mask, input_ids)
        with attending(self.model, self.route, self.attend, self.mask):
            out = self.model(input_ids=input_ids, attention_mask=None, **keywords)
        layers = range(len(self.windows))
        for i in layers:
            if i not in self.presents:
                raise CaptureError(_around(self.model, i))
        return out.logits, [t for i in layers for t in self.presents[i]]

    def mask(self, mask_function: Callable[..., Any], use_vmap: bool = False, **_: Any) -> Tensor:
        """In the place of a mask: a tensor that stands for `mask_function`."""
        token = torch.empty(0)
        self.masks.append((token, mask_function, use_vmap))
        return token

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, dropout: float = 0.0,
        softcap: float | None = None, **rest: Any,
    ) -> Tensor:  # fmt: skip
        """In the place of attention: [batch, new, heads, width]."""
        layer = next((i for i, (k, v) in self.cache.fresh.items() if k is key and v is value), None)
        if layer is None:
            name = _layer(self.model, len(self.presents))
            raise CaptureError(f"{name} attends to other keys and values than it caches, as latent attention does")
        name = _layer(self.model, layer)
        if layer in self.presents:
            raise CaptureError(f"{name} attends to keys and values of another layer")
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
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        site = Site(name, query.shape[1], key.shape[1], query.shape[3], scale, float(softcap or 0.0), self.windows[layer])
        self.seen[layer] = _Seen(site, attention_mask)
        pasts = self.cache.pasts
        past = pasts[layer] if pasts is not None else (key[:, :, :0], value[:, :, :0])
        assert self.attention_mask is not None
        out: Tensor
        out, *present = cached_attention(
            query, key, value, *past, self.attention_mask, None, None, site.scale, site.window, site.softcap, False
        )
        self.presents[layer] = (present[0], present[1])
        return out

    def sites(self) -> list[Site]:
        """What was seen, with the window that each layer's mask turned out to have."""
        found = []
        for i in range(len(self.windows)):
            site, mask = self.seen[i].site, self.seen[i].mask
            held = next(((f, vmap) for token, f, vmap in self.masks if token is mask), None)
            if held is None:
                raise CaptureError(f"{site.name} makes a mask of its own, which cannot be looked into")
            window = window_of(*held, longest(self.model))
            if window is None:
                raise CaptureError(f"{site.name} has a mask that is neither causal nor causal within a window")
            found.append(Site(site.name, site.heads, site.kv_heads, site.width, site.scale, site.softcap, window))
        return found


def longest(model: nn.Module) -> int:
    """Rows of the model's table of positions, or what its configuration says that it was trained for."""
    config = text_config(model)
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)


def _layer(model: nn.Module, layer: int) -> str:
    """Path of a layer's attention, of the layer where that is not found, and its number where that is not found either."""
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    path = next((n for n, m in stacks if len(m) == text_config(model).num_hidden_layers), None)
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


def _compare(model: nn.Module, ids: Tensor, logits: Tensor, sites: Sequence[Site]) -> None:
    """The model itself must say the same: what we do not know of shows in numbers."""
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    bound = 1e-3 if logits.dtype == torch.float32 else 0.1
    if not error <= bound:
        raise CaptureError(
            f"{type(model).__name__} with its attention as an operator deviates by {error:.1e}: a layer such as {sites[0].name} "
            "does more than it tells"
        )
