"""What stands around a call is kept out of it: other threads, autocast, inference mode, torch's own log of failed captures."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["undisturbed"]

_ONE_AT_A_TIME = threading.RLock()  # torch.export patches classes of the whole process


@contextmanager
def undisturbed() -> Iterator[None]:
    """Capture inside of this: one thread at a time, whatever mode the caller is in.

    A model is captured as it is called by itself: its result is the same under `autocast`, and tensors that are made under
    `inference_mode` could never be trained or captured again.
    """
    with _ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_quiet())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")  # an LSTM's own bookkeeping
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what it also raises, and prints the graph as far as it came; TORCH_LOGS gets both back.

    Inside of another one it does nothing: who listens to one of these loggers in between goes on hearing it.
    """
    import torch.export._trace as tracing

    if os.environ.get("TORCH_LOGS") or vars(tracing).get("print") is _nothing:
        yield
        return
    levels = {log: log.level for log in _loggers()}
    held = vars(tracing).get("print", print)
    for log in levels:
        log.setLevel(logging.CRITICAL)
    vars(tracing)["print"] = _nothing
    try:
        yield
    finally:
        vars(tracing)["print"] = held
        for log, level in levels.items():
            log.setLevel(level)


def _loggers() -> list[logging.Logger]:
    """torch's root and those below with a level of their own.

    The hundreds of others ask it, and each change of a level is a walk over all loggers of the process.
    """
    known = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith("torch.")]
    return [logging.getLogger("torch"), *(log for log in known if isinstance(log, logging.Logger) and log.level)]


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Prints nothing."""
