"""normfuse: an optimizing compiler for trained PyTorch models.

import normfuse
fast = normfuse.optimize(model, example_inputs)
print(normfuse.report(fast))
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.9.0"

__all__ = [
    "CaptureError",
    "CheckFailed",
    "Error",
    "ExportError",
    "LayerQuantization",
    "MissingExtra",
    "NormfuseError",
    "PassReport",
    "Report",
    "RewriteError",
    "ShiftQuant",
    "Site",
    "UsageError",
    "__version__",
    "bench",
    "export",
    "fold",
    "load",
    "nn",
    "optimize",
    "passes",
    "report",
    "save",
]

if TYPE_CHECKING:
    from normfuse import export, nn, passes
    from normfuse.api import optimize
    from normfuse.app.engines import bench
    from normfuse.errors import CaptureError, CheckFailed, ExportError, MissingExtra, NormfuseError, RewriteError, UsageError
    from normfuse.folding.fold import fold
    from normfuse.pipeline.saved import load, save
    from normfuse.quant.spec import ShiftQuant
    from normfuse.reports.model import Error, LayerQuantization, PassReport, Site
    from normfuse.reports.record import report
    from normfuse.reports.report import Report

_HOMES = {
    "bench": "normfuse.app.engines",
    "fold": "normfuse.folding.fold",
    "optimize": "normfuse.api",
    **dict.fromkeys(("load", "save"), "normfuse.pipeline.saved"),
    "report": "normfuse.reports.record",
    "ShiftQuant": "normfuse.quant.spec",
    **dict.fromkeys(("Error", "LayerQuantization", "PassReport", "Site"), "normfuse.reports.model"),
    "Report": "normfuse.reports.report",
    **dict.fromkeys(
        ("CaptureError", "CheckFailed", "ExportError", "MissingExtra", "NormfuseError", "RewriteError", "UsageError"),
        "normfuse.errors",
    ),
}


if not TYPE_CHECKING:  # where names are known, so that a misspelt one is found

    def __getattr__(name: str) -> Any:
        """Public names load on first use, so that `normfuse --help` need not wait for PyTorch."""
        import importlib

        if name in ("export", "nn", "passes"):
            return importlib.import_module(f"normfuse.{name}")
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'normfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
