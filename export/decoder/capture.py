"""A causal language model of transformers as a module with flat caches: tensors in, tensors out.

Models of transformers call their attention through an interface, and get their masks through another one. Both are ours while the
model is called: attention becomes one operator (`normfuse.export.decoder.operator`), and a mask is a token that stands for a
function of positions, which is *evaluated*: only what is causal, or causal within a window, is taken. The cache that the model
is given only hands keys and values on. What goes around the interfaces is refused by the name of its layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import CaptureError, UsageError
from normfuse.export.decoder.call import Call, Site, compared, layers_of, stumbled, text_config
from normfuse.export.decoder.interfaces import ROUTES
from normfuse.export.decoder.operator import newest, positions
from normfuse.extras import need

__all__ = ["CausalModel", "cached", "check_kind"]


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
        pairs = list(zip(pasts[::2], pasts[1::2], strict=True))
        call = Call(self.model, self.route, attention_mask, [site.window for site in self.sites], pairs)
        with self._newest(attention_mask):
            logits = call(**_keywords(self.model, input_ids, attention_mask))
        return (logits, *call.flat())

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
    ids = torch.arange(8)[None] % text_config(model).vocab_size
    call = Call(model, route, torch.ones_like(ids), [0] * layers_of(model))
    try:
        logits = call(**_keywords(model, ids, call.attention_mask))
    except CaptureError:
        raise
    except Exception as e:
        raise stumbled(call, e) from e
    sites = call.sites()
    compared(model, logits, model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits, sites)
    return sites


def _keywords(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """What a causal model is called with, besides its cache."""
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": None}
    if "position_ids" in inspect.signature(model.forward).parameters:
        found["position_ids"] = positions(mask, ids)
    return found


def check_kind(model: nn.Module, *, behind_encoder: bool = False) -> None:
    """Complain about anything that is no causal language model of transformers.

    Args:
        behind_encoder: a decoder behind an encoder may be one as well.

    Raises:
        UsageError: see above; the message says what it is instead.
    """
    transformers = need("transformers", extra="hf")
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(f"{type(model).__name__} is no model of transformers: a decoder is made of a causal language model")
    if model.config.is_encoder_decoder and not behind_encoder:
        raise UsageError(f"{type(model).__name__} has an encoder and a decoder: it is no causal language model")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UsageError(f"{type(model).__name__} generates no text: it is no causal language model")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"{type(model).__name__} keeps no keys and values: it takes no past_key_values")
