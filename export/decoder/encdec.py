"""A model of transformers with an encoder and a decoder as two modules with flat caches: tensors in, tensors out.

The decoder's attention to its own tokens is that of a causal model. Its attention to the encoder's states is another operator
(`cross_attention`): keys and values are made of the states in the first step and kept. A model of speech gets them from the
file of its encoder instead, as onnxruntime-genai has it. What a model adds to its scores (T5) must follow from the distance of
two tokens alone; it is read as a table, by its values.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import CaptureError, UsageError
from normfuse.export.decoder.call import (
    Call,
    Pairs,
    Site,
    check_plain,
    compared,
    layers_of,
    longest,
    scale_of,
    stumbled,
    text_config,
)
from normfuse.export.decoder.causality import sees_all
from normfuse.export.decoder.interfaces import ROUTES, handing_cache, handing_pair
from normfuse.export.decoder.operator import cross_attention, positions, unpadded
from normfuse.extras import need

__all__ = [
    "Found",
    "SpeechDecoder",
    "SpeechEncoder",
    "TextDecoder",
    "TextEncoder",
    "encoder_decoder",
    "example_source",
    "states_of",
]

_LOOKED_AT = 64  # tokens whose scores are looked at together
_TEXT, _SPEECH = "input_ids", "input_features"


@dataclass(frozen=True)
class Found:
    """What a model turned out to be.

    Attributes:
        route: see `normfuse.export.decoder.interfaces.ROUTES`.
        sites: attention to the decoder's own tokens, by layer.
        masked: the attention to the encoder's states hides those that are padding.
        cross: heads and width of the attention to the encoder's states.
        distances: what layers add to their scores, [heads, slots] each; None for nothing.
    """

    route: str
    sites: tuple[Site, ...]
    masked: bool
    cross: tuple[int, int]
    distances: tuple[Tensor | None, ...]


@dataclass
class _Sequences(Call):
    """One call of a decoder behind an encoder.

    Attributes:
        source_mask: [batch, source], 1 for valid states; None where all are.
        cross_pasts: keys and values of the encoder's states from an earlier step.
        use_past: [1], they are taken; None where there are no others.
        distances: see `Found`.
        looking: it is run to find out what the model is, and not captured.
    """

    source_mask: Tensor | None = None
    cross_pasts: Pairs | None = None
    use_past: Tensor | None = None
    distances: Sequence[Tensor | None] = ()
    looking: bool = False
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cross_masks: list[Any] = field(default_factory=list)
    cross_sizes: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cross = handing_cache(None)

    def given_cache(self) -> Any:
        only = self.cross_pasts if self.use_past is None else None
        return handing_pair(self.cache, self.cross, only)

    def states(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logits behind an encoder's states [batch, source, features]."""
        outputs = need("transformers.modeling_outputs", extra="hf").BaseModelOutput(last_hidden_state=hidden)
        keywords: dict[str, Any] = {"encoder_outputs": outputs, "decoder_input_ids": ids}
        takes = inspect.signature(self.model.forward).parameters
        if "decoder_position_ids" in takes:
            keywords["decoder_position_ids"] = positions(self.attention_mask, ids)
        if self.source_mask is not None:
            keywords["attention_mask"] = self.source_mask
        return self(**keywords)

    def attend(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, position_bias: Tensor | None = None, **rest: Any
    ) -> Tensor:
        layer = next((i for i, (k, v) in self.cross.fresh.items() if k is key and v is value), None)
        if layer is None:
            return super().attend(query, key, value, attention_mask, **rest)
        name = f"{self.name(layer)} (to the encoder's states)"
        if self.looking and position_bias is not None and position_bias.any():
            raise CaptureError(f"{name} adds to its scores, which is not written")
        scaling, dropout = rest.pop("scaling", None), rest.pop("dropout", 0.0)
        check_plain(name, (query, key, value), dropout, rest)
        if query.shape[1] != key.shape[1]:
            raise CaptureError(f"{name} has {query.shape[1]} heads of queries and {key.shape[1]} of keys, which is not written")
        pasts = (None, None) if self.cross_pasts is None or self.use_past is None else self.cross_pasts[layer]
        mask = None if attention_mask is None else self.source_mask
        self.cross_masks.append(attention_mask)
        self.cross_sizes.add((query.shape[1], query.shape[3]))
        out: Tensor
        out, *kept = cross_attention(query, key, value, *pasts, self.use_past, mask, scale_of(query, scaling))
        self.kept[layer] = (kept[0], kept[1])
        return out

    def distances_of(self, layer: int) -> Tensor | None:
        return self.distances[layer] if self.distances else None

    def check_masks(self) -> bool:
        """Whether the attention to the encoder's states hides padding.

        Raises:
            CaptureError: it hides something else.
        """
        if len(self.kept) != len(self.windows):
            raise CaptureError(f"{self.name(len(self.kept))} has no attention to the encoder's states through the interface")
        for mask in self.cross_masks:
            held = None if mask is None else self.function_of(mask)
            if mask is not None and (held is None or not sees_all(*held)):
                raise CaptureError(f"{self.name(0)} hides some of the encoder's states by a mask of its own")
        if len({mask is None for mask in self.cross_masks}) != 1 or len(self.cross_sizes) != 1:
            raise CaptureError(f"{self.name(0)} looks at the encoder's states in another way than the other layers do")
        return self.cross_masks[0] is not None


class _Looking(_Sequences):
    """A call of which only what layers add to their scores is of interest; `before` slots stand before the new tokens."""

    def __init__(self, model: nn.Module, route: str, layers: int, before: int) -> None:
        super().__init__(model, route, torch.ones(1, 1, dtype=torch.int64), [0] * layers)
        self.cache = handing_cache(None, before)
        self.added: dict[int, Tensor | None] = {}

    def attend(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, position_bias: Tensor | None = None, **rest: Any
    ) -> Tensor:
        layer = next((i for i, (k, v) in self.cache.fresh.items() if k is key and v is value), None)
        if layer is not None:
            self.added[layer] = position_bias
            self.presents[layer] = (key, value)
        return torch.zeros_like(query).transpose(1, 2)


# -- finding out -----------------------------------------------------------------------------------------------------------


def encoder_decoder(model: nn.Module) -> Found:
    """What `model` is.

    Raises:
        UsageError: its encoder reads something other than text or speech.
        CaptureError: a layer's attention or table of positions is not of a kind that can be written; the message names the layer.
    """
    reads = getattr(model.get_encoder(), "main_input_name", _TEXT)  # type: ignore[operator]
    if reads not in (_TEXT, _SPEECH):
        raise UsageError(f"{type(model).__name__} has an encoder of {reads}: only encoders of text and of speech are written")
    if reads == _SPEECH and model.config.model_type != "whisper":  # type: ignore[union-attr]
        raise UsageError(f"{type(model).__name__} has an encoder of speech of its own kind: only those of Whisper are written")
    growing = next((f"{path} ({type(m).__name__})" for path, m in model.named_modules() if hasattr(m, "make_weights")), None)
    if growing is not None:
        raise CaptureError(
            f"{growing} makes a longer table of positions where a text needs one, which a graph cannot: models with tables of a "
            "fixed length, and with positions that are computed, are written"
        )
    refused: CaptureError | None = None
    for route in ROUTES:
        try:
            with torch.no_grad():
                return _found(model, route)
        except CaptureError as e:
            refused = refused or e
    assert refused is not None
    raise refused


def _found(model: nn.Module, route: str) -> Found:
    layers, vocabulary = layers_of(model), text_config(model).vocab_size
    source = example_source(model, batch=1, length=8)
    hidden, ids = states_of(model, *source), torch.arange(8)[None] % vocabulary
    mask = torch.ones(1, hidden.shape[1], dtype=torch.int64) if len(source) == 2 else None
    call = _Sequences(model, route, torch.ones_like(ids), [0] * layers, source_mask=mask, looking=True)
    try:
        call.distances = _distances(model, route, hidden, layers)
        logits = call.states(hidden, ids)
    except CaptureError:
        raise
    except Exception as e:
        raise stumbled(call, e) from e
    sites, masked = call.sites(), call.check_masks()
    names = (_TEXT, "attention_mask") if len(source) == 2 else (_SPEECH,)
    expected = model(**dict(zip(names, source, strict=True)), decoder_input_ids=ids, use_cache=False).logits
    compared(model, logits, expected, sites)
    return Found(route, tuple(sites), masked, next(iter(call.cross_sizes)), tuple(call.distances))


def states_of(model: Any, source: Tensor, mask: Tensor | None = None) -> Tensor:
    """The encoder's states [batch, source, features] of ids with their mask, or of features of speech."""
    keywords = {_SPEECH: source} if mask is None else {_TEXT: source, "attention_mask": mask}
    return model.get_encoder()(**keywords).last_hidden_state  # type: ignore[no-any-return]


def example_source(model: Any, batch: int = 2, length: int = 5) -> tuple[Tensor, ...]:
    """Random ids with a mask, whose last row ends before the others, or features of speech as long as the model wants them."""
    generator = torch.Generator().manual_seed(1)
    encoder = model.get_encoder()
    if encoder.main_input_name == _SPEECH:
        frames = encoder.config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return (torch.randn(batch, encoder.config.num_mel_bins, frames, generator=generator).to(dtype),)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, -1:] = 0
    return torch.randint(0, encoder.config.vocab_size, (batch, length), generator=generator), mask


def _distances(model: nn.Module, route: str, hidden: Tensor, layers: int) -> tuple[Tensor | None, ...]:
    """What each layer adds to its scores, as a table by distance."""
    rows = longest(model)

    def added(before: int, new: int) -> dict[int, Tensor | None]:
        call = _Looking(model, route, layers, before)
        call.states(hidden, torch.zeros(1, new, dtype=torch.int64))
        return call.added

    tables: list[Tensor | None] = []
    newest = added(rows - 1, 1)
    others = {before: added(before, _LOOKED_AT) for before in (0, rows - _LOOKED_AT)}
    for layer in range(layers):
        row = newest.get(layer)
        table = None if row is None else row[0, :, 0].flip(-1).contiguous()
        for before, found in others.items():
            if not _by_distance(found.get(layer), table, before):
                raise CaptureError(f"{_Looking(model, route, layers, 0).name(layer)} adds to its scores what no distance tells")
        tables.append(next((t for t in tables if t is not None and table is not None and torch.equal(t, table)), table))
    return tuple(tables)


def _by_distance(found: Tensor | None, table: Tensor | None, before: int) -> bool:
    """`found` [1, heads, new, before + new] is what `table` says of every token that is not behind its own."""
    if found is None or table is None:
        return found is None and table is None
    at = torch.arange(found.shape[3])
    back = before + torch.arange(found.shape[2])[:, None] - at
    return torch.equal(torch.where(back < 0, 0, table[:, back.clamp(min=0)]), torch.where(back < 0, 0, found[0]))


# -- the modules -----------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """`forward(input_ids, attention_mask)` returns the states [batch, source, features]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return states_of(self.model, input_ids, attention_mask)

    def example(self) -> tuple[Tensor, ...]:
        """Two rows, one of them shorter."""
        return example_source(self.model)

    def dynamic_shapes(self) -> tuple[Any, Any]:
        """Rows and their length may vary, up to the table of positions where there is one."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        sizes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("encoder_sequence_length", max=most)}
        return sizes, sizes


class _Behind(nn.Module):
    """A model with what `encoder_decoder` found; the model is shared, not copied."""

    def __init__(self, model: nn.Module, found: Found) -> None:
        super().__init__()
        self.model, self.found = model, found
        self.tables: list[str | None] = []
        for table in found.distances:
            known = next((n for n, held in self.named_buffers(recurse=False) if held is table), None)
            if table is not None and known is None:
                known = f"distances_{len(self.tables)}"
                self.register_buffer(known, table)
            self.tables.append(known)
        self.train(model.training)

    def call(self, mask: Tensor, pasts: Pairs | None, **rest: Any) -> _Sequences:
        tables = [None if name is None else getattr(self, name) for name in self.tables]
        windows = [site.window for site in self.found.sites]
        return _Sequences(self.model, self.found.route, mask, windows, pasts, distances=tables, **rest)

    def caches(self, batch: int, slots: int, source: int) -> list[Tensor]:
        """Random keys and values of own tokens and of the encoder's states, as `TextDecoder` takes them."""
        generator = torch.Generator().manual_seed(2)
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        heads, width = self.found.cross
        sizes = [[(batch, s.kv_heads, slots, s.width)] * 2 + [(batch, heads, source, width)] * 2 for s in self.found.sites]
        return [torch.randn(size, generator=generator).to(dtype) for layer in sizes for size in layer]

    def ids(self, batch: int, new: int) -> Tensor:
        return torch.randint(0, text_config(self.model).vocab_size, (batch, new), generator=torch.Generator().manual_seed(0))


class TextDecoder(_Behind):
    """The decoder of a model from text to text.

    `forward(encoder_attention_mask, input_ids, encoder_hidden_states, pasts, use_cache_branch)` returns the logits
    [batch, new, vocabulary] and the keys and values of each layer in the order of `pasts`: key and value of own tokens, key
    and value of the encoder's states. In the first step `use_cache_branch` [1] is False, and the latter are made; later they
    are taken from `pasts`.
    """

    def forward(
        self, encoder_attention_mask: Tensor, input_ids: Tensor, encoder_hidden_states: Tensor, pasts: list[Tensor],
        use_cache_branch: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        own, cross = (list(zip(pasts[i::4], pasts[i + 1 :: 4], strict=True)) for i in (0, 2))
        mask = input_ids.new_ones(input_ids.shape[0], own[0][0].shape[2] + input_ids.shape[1])
        call = self.call(mask, own, source_mask=encoder_attention_mask, cross_pasts=cross, use_past=use_cache_branch)
        logits = call.states(encoder_hidden_states, input_ids)
        return (logits, *(t for i in range(len(own)) for t in (*call.presents[i], *call.kept[i])))

    def example(self) -> tuple[Any, ...]:
        """Two rows in their first step, behind tokens that are there already."""
        source, mask = example_source(self.model)
        with torch.no_grad():
            hidden = states_of(self.model, source, mask)
        return mask, self.ids(2, 2), hidden, self.caches(2, 3, 4), torch.tensor([False])

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Rows, new tokens, and the slots of all caches may vary."""
        dim = torch.export.Dim
        batch, new, source = dim("batch_size"), dim("decoder_sequence_length"), dim("encoder_sequence_length")
        own, cross = dim("past_decoder_sequence_length"), dim("past_encoder_sequence_length")
        layer = [{0: batch, 2: own}] * 2 + [{0: batch, 2: cross}] * 2
        return {0: batch, 1: source}, {0: batch, 1: new}, {0: batch, 1: source}, layer * len(self.found.sites), {}


class SpeechEncoder(_Behind):
    """`forward(audio_features)` returns the states, and keys and values of them for each layer of the decoder."""

    def forward(self, audio_features: Tensor) -> tuple[Tensor, ...]:
        hidden = states_of(self.model, audio_features)
        ids = hidden.new_zeros((hidden.shape[0], 1), dtype=torch.int64)
        call = self.call(torch.ones_like(ids), None)
        call.states(hidden, ids)  # of which nothing is used but keys and values
        return (hidden, *(t for i in range(len(self.tables)) for t in call.cross.fresh[i]))

    def example(self) -> tuple[Tensor, ...]:
        """Two rows."""
        return example_source(self.model)

    def dynamic_shapes(self) -> tuple[Any]:
        """Only the number of rows may vary."""
        return ({0: torch.export.Dim("batch_size")},)


class SpeechDecoder(_Behind):
    """The decoder of a model from speech to text.

    `forward(input_ids, past_sequence_length, pasts, cross)` returns the logits, and keys and values of own tokens by layer.
    `past_sequence_length` [1] says how many slots of `pasts` are filled, which may be buffers with room to spare.
    """

    def forward(
        self, input_ids: Tensor, past_sequence_length: Tensor, pasts: list[Tensor], cross: list[Tensor]
    ) -> tuple[Tensor, ...]:
        own, given = (list(zip(flat[::2], flat[1::2], strict=True)) for flat in (pasts, cross))
        call = self.call(unpadded(past_sequence_length, input_ids, pasts[0]), own, cross_pasts=given)
        unused = cross[0].new_zeros(input_ids.shape[0], 1, self.model.get_encoder().config.d_model)  # type: ignore[operator]
        return (call.states(unused, input_ids), *call.flat())

    def example(self) -> tuple[Any, ...]:
        """Two rows behind three tokens."""
        caches = self.caches(2, 3, self.model.get_encoder().config.max_source_positions)  # type: ignore[operator]
        own = [t for i, t in enumerate(caches) if i % 4 < 2]
        return self.ids(2, 2), torch.tensor([3], dtype=torch.int32), own, [t for i, t in enumerate(caches) if i % 4 >= 2]

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Rows, new tokens and slots may vary."""
        dim = torch.export.Dim
        batch, new, past = dim("batch_size"), dim("sequence_length"), dim("past_sequence_length")
        count = 2 * len(self.found.sites)
        return {0: batch, 1: new}, {}, [{0: batch, 2: past}] * count, [{0: batch}] * count
