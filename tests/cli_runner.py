"""The command line in this process, in a folder with models of its own."""

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from normfuse.cli import main

__all__ = ["Run", "runner"]

Run = Callable[..., tuple[int, str, str]]


@contextmanager
def runner(
    module: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Yields what runs the command in `folder`, where `module` holds `source`; (exit code, standard output, standard error)."""
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, module, raising=False)
    levels = {name: logging.getLogger(name).level for name in ("normfuse", "torch", "onnxscript", "transformers", "timm")}
    handler = signal.getsignal(signal.SIGTERM)

    def run(*args: str) -> tuple[int, str, str]:
        code = main(args)
        out = capsys.readouterr()
        return code, out.out, out.err

    with warnings.catch_warnings():
        yield run
    signal.signal(signal.SIGTERM, handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
