"""normfuse: an optimizing compiler for trained PyTorch models.

import normfuse
fast = normfuse.optimize(model, example_inputs)
print(normfuse.report(fast))
"""

from typing import TYPE_CHECKING, Any

import normfuse.report as _report_module  # loads the module now: later it would take the place of the function of the same name

del _report_module, globals()["report"]

__version__ = "0.1.0"

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
    from normfuse.engines import bench
    from normfuse.errors import CaptureError, CheckFailed, ExportError, MissingExtra, NormfuseError, RewriteError, UsageError
    from normfuse.folded import fold
    from normfuse.quant.spec import ShiftQuant
    from normfuse.record import report
    from normfuse.report import Error, LayerQuantization, PassReport, Report, Site
    from normfuse.saved import load, save

_HOMES = {
    "bench": "normfuse.engines",
    "fold": "normfuse.folded",
    "optimize": "normfuse.api",
    **dict.fromkeys(("load", "save"), "normfuse.saved"),
    "report": "normfuse.record",
    "ShiftQuant": "normfuse.quant.spec",
    **dict.fromkeys(("Error", "LayerQuantization", "PassReport", "Report", "Site"), "normfuse.report"),
    **dict.fromkeys(
        ("CaptureError", "CheckFailed", "ExportError", "MissingExtra", "NormfuseError", "RewriteError", "UsageError"),
        "normfuse.errors",
    ),
}


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
