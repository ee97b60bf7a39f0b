"""`normfuse.save` and `normfuse.load`: an optimized module and its report in one file, which runs nothing when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx, nn

from normfuse.capture.canonical import canonical_module
from normfuse.capture.capture import program_shapes
from normfuse.errors import UsageError
from normfuse.ir.graph import Graph
from normfuse.pt2 import load_program, read_report, save_program
from normfuse.reports.record import Record, record
from normfuse.reports.report import Report
from normfuse.surroundings import undisturbed

__all__ = ["load", "save"]


def save(gm: nn.Module, path: str | Path, *, force: bool = False) -> None:
    """Write what `normfuse.optimize` returned, quantized or not, as a `.pt2` file with its report inside.

    It is a saved `torch.export.ExportedProgram`: `torch.export.load` and the command line read it too. It holds the graph, the
    weights, the example inputs, what may vary in them, and the report.

    Args:
        gm: a module that `normfuse.optimize` made from example inputs.
        path: of the file; it appears whole or not at all.
        force: replace a file that exists.

    Raises:
        UsageError: `gm` is no such module, or the file exists or cannot be written.
        ExportError: the module was traced without example inputs, so that there is no program to save.
    """
    if not isinstance(gm, fx.GraphModule) or record(gm) is None:
        raise UsageError(f"save: {type(gm).__name__} {_instead(gm)}")
    save_program(gm, path, force=force)


def _instead(gm: Any) -> str:
    if isinstance(gm, nn.Module) and record(gm) is not None:
        return (
            "has the classes of the original model, whose code no file holds: write torch.save(model.state_dict(), path) and "
            "normfuse.report(model).to_json(path), and load both into a model made in the same way"
        )
    return "is not what normfuse.optimize returned: pass that module, or use torch.export.save for another program"


def load(path: str | Path, *, trust: bool = False) -> fx.GraphModule:
    """The module in a file of `normfuse.save`, with its report and the conditions on its inputs.

    Nothing that the file says is run while it is read; see docs/security.md.

    Args:
        path: of the file.
        trust: let PyTorch read the file as it does, also parts of it that could run code.

    Returns:
        What was saved: `normfuse.report` works on it, and exports and `optimize` take it as they took the saved one. A program
        that somebody else saved comes without a report.

    Raises:
        UsageError: there is no such file, it is no saved program, or it could run code and `trust` is off.
        CaptureError: this version of torch cannot read it.
    """
    with undisturbed():
        program = load_program(path, trust=trust)
        text = read_report(path)
        gm = Graph.of(canonical_module(program)).to_module()
    args, kwargs = program.example_inputs or ((), {})
    report = Report() if text is None else Report.from_json(text)
    return Record(tuple(args), dict(kwargs), bool(args or kwargs), program_shapes(program), report).attach(gm)
