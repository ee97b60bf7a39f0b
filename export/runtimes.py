"""Which ONNX Runtime reads a file: by its opset, the version of its format, and the kernels that it needs.

Found by running: `.ci/runtimes`, whose table stands in docs/support.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from normfuse.errors import UsageError

__all__ = ["OLDEST", "Release", "format_of", "newest_opset", "parse_runtime", "reads", "spelled_runtime"]

Release = tuple[int, int]


@dataclass(frozen=True)
class _Reads:
    """What the CPU provider of a release reads, and of all later ones."""

    since: Release
    opset: int
    ir: int


_READS = (_Reads((1, 17), 20, 9), _Reads((1, 18), 21, 10), _Reads((1, 21), 22, 10), _Reads((1, 23), 23, 11))
#: The oldest release that files are written for: the first with the threads that the kernel library needs.
OLDEST = _READS[0].since

# The version of the format that came with each opset. An older reader refuses a newer one, whatever is in it.
_FORMATS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


def format_of(opset: int) -> int:
    """IR version of a file of `opset`: the one that came with it, as low as readers of the opset may be old."""
    return _FORMATS[opset]


def parse_runtime(text: str) -> Release:
    """ "1.20" or "1.20.1" as a release.

    Raises:
        UsageError: it is no release, or an older one than files are written for.
    """
    found = re.fullmatch(r"([0-9]+)\.([0-9]+)(?:\.[0-9]+)?", text) if isinstance(text, str) else None
    if found is None:
        raise UsageError(f"runtime={text!r}: expected a release of ONNX Runtime, e.g. '1.20'")
    release = (int(found[1]), int(found[2]))
    if release < OLDEST:
        raise UsageError(f"runtime={text!r}: files are written for ONNX Runtime {spelled_runtime(OLDEST)} and newer")
    return release


def spelled_runtime(release: Release) -> str:
    """(1, 20) as "1.20"."""
    return f"{release[0]}.{release[1]}"


def newest_opset(release: Release) -> int:
    """The newest opset that `release` reads."""
    return max(r.opset for r in _READS if r.since <= release)


def reads(opset: int, ir: int) -> Release:
    """The oldest release that reads this opset in this version of the format."""
    return next(r.since for r in _READS if opset <= r.opset and ir <= r.ir)
