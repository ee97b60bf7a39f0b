"""How the folder of a language model is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

from normfuse.api import Verify
from normfuse.errors import UsageError, did_you_mean
from normfuse.export.decoder.forms import FORMS, DecoderAttention
from normfuse.export.onnx.writer.save import MAX_PROTO
from normfuse.passes import PassName

__all__ = ["DecoderKeywords", "DecoderOptions"]

Padding = Literal["both", "right"]
_PADDING: tuple[str, ...] = get_args(Padding)


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """How a folder is written.

    Attributes:
        attention: `gqa` (GroupQueryAttention of ONNX Runtime), `portable` (standard ops alone) or `native` (normfuse's own, faster
            on a CPU unless a layer's cache is larger than what the processor keeps); default: `native` where weights are for
            normfuse's kernels and these are built, so that a folder holds them anyway, else `gqa`. A model with an encoder has
            the first two alone.
        padding: `both`: rows may be padded on either side; `right` leaves out what padding on the left costs, 8 to 16 % of the
            attention of a chunk behind a long past.
        last_logits: logits of each row's newest token alone, [batch, 1, vocabulary]; a prompt then costs less.
        max_length: slots of the cache unless a reader asks otherwise; default: as many as the model has positions, at most
            4096.
        proof_tokens: greedy tokens that are compared after each prompt; 0 compares nothing.
        tolerance: bound on the error of the logits, relative to the largest.
        threads: of ONNX Runtime for the proof; default: the CPUs of this process.
        in_place: a model in half precision itself becomes float32, so that its weights are not held twice; else it is copied.
        external_data_above: weights above this many bytes go to a second file.
        passes, verify: see `normfuse.optimize`; with weights in blocks the default passes leave gains of norms where they are.
    """

    attention: DecoderAttention | None = None
    padding: Padding = "both"
    last_logits: bool = False
    max_length: int | None = None
    proof_tokens: int = 64
    tolerance: float = 1e-3
    threads: int | None = None
    in_place: bool = False
    external_data_above: int = MAX_PROTO
    passes: Sequence[PassName] | None = None
    verify: Verify = "end"

    def __post_init__(self) -> None:
        if self.attention is not None and self.attention not in FORMS:
            hint = did_you_mean(self.attention, FORMS)
            raise UsageError(f"attention={self.attention!r}: expected {', '.join(FORMS)} in a folder of a decoder{hint}")
        if self.padding not in _PADDING:
            raise UsageError(f"padding={self.padding!r}: expected {' or '.join(_PADDING)}{did_you_mean(self.padding, _PADDING)}")
        if self.proof_tokens < 0:
            raise UsageError(f"proof_tokens={self.proof_tokens}: expected 0 or more")


class DecoderKeywords(TypedDict, total=False):
    """The fields of `DecoderOptions`."""

    attention: DecoderAttention | None
    padding: Padding
    last_logits: bool
    max_length: int | None
    proof_tokens: int
    tolerance: float
    threads: int | None
    in_place: bool
    external_data_above: int
    passes: Sequence[PassName] | None
    verify: Verify
