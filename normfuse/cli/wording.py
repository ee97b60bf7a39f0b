"""What the library says in Python, said as options of the command line: remedies, notes and errors."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normfuse.reports.model import PassReport, Site
from normfuse.reports.report import Report

__all__ = ["in_options", "report_in_options"]

#: Tried from the top: what is longer stands first.
_SPELT = (
    (r"force=True \(on the command line --force\)", "--force"),
    (r"pass calibration=, or activations=\"dynamic\"", "pass --calibration DATA, or leave `static` out of --quantize"),
    (r"pass other data: calibration=", "pass other data with --calibration"),
    (r"pass calibration= or example inputs", "pass --calibration DATA, --shape or --input"),
    (
        r"pass example[ _]inputs(?:=\(tensor, \.\.\.\) or a dict of keyword inputs)? or calibration=",
        "pass --calibration DATA, --shape or --input",
    ),
    (r"pass example_inputs=\(tensor, \.\.\.\) or a dict of keyword inputs", "pass --shape or --input"),
    (r"pass example[ _]inputs", "pass --shape or --input"),
    (r"pass calibration=(?![\w\[])", "pass --calibration DATA"),
    (r"pass dynamic_shapes(?:=| to normfuse\.optimize)?", "pass --dynamic AXIS"),
    (r"\bquantize='([^']*)'", r"--quantize \1"),
    (r"\bkeep= of normfuse\.ShiftQuant", "--keep PATTERN"),
    (r"\boverrides= of normfuse\.ShiftQuant", "overrides= in Python"),
    (r"pass verify=False", "pass --verify off"),
    (r"pass quantize=normfuse\.ShiftQuant\(\) to normfuse\.optimize", "pass --quantize"),
    (r"prefer='(\w+)'", r"--quantize ...,prefer=\1"),
    (r"\b(embedding_bits|sqnr_budget|size_budget|finetune_steps)=(\d[\d.]*|None)", r"--quantize ...,\1=\2"),
    (r"\bkeep='([^']*)'", r"--keep '\1'"),
    (r"\bopset=(\d+)", r"--opset \1"),
    (
        r"(quantize with )?ShiftQuant\(activations='static'\) and calibration data",
        "pass --quantize ...,static and --calibration DATA",
    ),
    (r"quantize with ShiftQuant\((\w+)=(\w+)\)", r"pass --quantize ...,\1=\2"),
    (r"\bint4_initializers=True\b", "--int4"),
    (r"\b(form|runtime|attention)='([^']*)'", r"--\1 \2"),
    (r"\bmax_length=(-?\d+)", r"--max-length \1"),
    (r"\bproof_tokens=(-?\d+)", r"--proof-tokens \1"),
    (r"\btop_(p|k)=(-?[\d.]+)", r"--top-\1 \2"),
    (r"\btemperature=(\S+):", r"--temperature \1:"),
    (r"\blast_logits=True\b", "--last-logits"),
    (r"pass trust=True", "pass --trust"),
    (r"normfuse\.optimize\b", "normfuse optimize"),
)
_COMPILED = tuple((re.compile(pattern), said) for pattern, said in _SPELT)


def in_options(text: str) -> str:
    """`pass example_inputs` becomes `pass --shape or --input`, and so on."""
    for pattern, said in _COMPILED:
        text = pattern.sub(said, text)
    return text


def report_in_options(report: Report) -> Report:
    """The report with its reasons, remedies and notes in the words of the command line."""

    def said(sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(dataclasses.replace(s, note=in_options(s.note), remedy=in_options(s.remedy)) for s in sites)

    def of(p: PassReport) -> PassReport:
        layers = tuple(dataclasses.replace(layer, kept=in_options(layer.kept)) for layer in p.quantization)
        return dataclasses.replace(p, applied=said(p.applied), refused=said(p.refused), undone=said(p.undone), quantization=layers)

    return dataclasses.replace(report, passes=tuple(map(of, report.passes)), notes=tuple(map(in_options, report.notes)))
