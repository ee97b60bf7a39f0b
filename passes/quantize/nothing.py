"""Quantization that was asked for and touched nothing is an error, with the reasons."""

from __future__ import annotations

import logging
from collections import Counter

from normfuse.errors import UsageError
from normfuse.reports.report import Report

__all__ = ["check_quantized"]

_SHOWN = 3
log = logging.getLogger(__name__)


def check_quantized(report: Report) -> None:
    """Complain where no layer was quantized. Where each was only measured to be slower, that is an answer, and a warning.

    Raises:
        UsageError: that is so for another reason; the message counts the reasons.
    """
    entries = [e for e in report.quantization if e.kind != "model"]
    if any(e.weight_bits is not None or (e.kind == "attention" and not e.kept) for e in entries):
        return
    if not entries:
        raise UsageError(
            "quantize= has quantized nothing: the model has no linear layer, convolution or embedding with weights; leave it out"
        )
    if all(e.measured for e in entries):
        log.warning("nothing is quantized: every layer is slower in integers on this machine; prefer='size' takes them anyway")
        return
    reasons = Counter(e.kept for e in entries)
    first = {e.kept: e.path for e in reversed(entries)}
    told = [f"{n} because {why} (the first is {first[why] or 'the model itself'})" for why, n in reasons.most_common(_SHOWN)]
    more = len(reasons) - len(told)
    raise UsageError(
        f"quantize= has quantized none of {len(entries)} layers: {'; '.join(told)}"
        f"{f'; {more} other reasons' if more > 0 else ''}. Leave quantize= out to go on in float"
    )
