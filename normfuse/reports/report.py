"""The report that a user holds: its text, its page and its JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError
from normfuse.reports.html import page
from normfuse.reports.model import (
    Block,
    Calibration,
    Error,
    Latency,
    LayerQuantization,
    NormFate,
    Origin,
    Part,
    PassReport,
    ReportData,
    Site,
)  # fmt: skip
from normfuse.reports.text import table

__all__ = ["Report"]

_WIDTH = 80


@dataclass(frozen=True)
class Report(ReportData):
    """What `optimize` did; `str(report)` is a table of at most 80 columns. Its attributes are those of `ReportData`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: numbers, strings, lists and dictionaries."""
        return {"schema": 1, **dataclasses.asdict(self)}

    def to_json(self, path: str | Path | None = None, *, indent: int = 2) -> str:
        """The report as JSON text; written to `path` as well when one is given."""
        text = json.dumps(self.to_dict(), indent=indent)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote: `Report.from_json(report.to_json()) == report`."""
        try:
            data = json.loads(text)
            if data.pop("schema") != 1:
                raise ValueError("unknown schema")
            return _report(data)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UsageError(f"this is not the JSON of a normfuse report: {e}") from e

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML page that needs no network."""
        Path(path).write_text(page(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page of `to_html` in a frame of its own, for notebooks."""
        return f'<iframe srcdoc="{escape(page(self))}" style="width: 100%; height: 32rem; border: 0"></iframe>'

    def __str__(self) -> str:
        return table(self, width=_WIDTH)


def _report(data: dict[str, Any]) -> Report:
    passes = tuple(_pass_report(p) for p in data.pop("passes"))
    exact, drift = _error(data.pop("exact")), _error(data.pop("drift"))
    parts = tuple(_part(p) for p in data.pop("parts", ()))
    origin, calibration = data.pop("origin", None), data.pop("calibration", None)
    return Report(
        passes, exact, drift, notes=tuple(data.pop("notes")), parts=parts,
        origin=None if origin is None else Origin(**origin),
        calibration=None if calibration is None else Calibration(**calibration),
        files=tuple(data.pop("files", ())),
        norms=tuple(NormFate(**norm) for norm in data.pop("norms", ())),
        blocks=tuple(Block(**{name: tuple(value) for name, value in block.items()}) for block in data.pop("blocks", ())),
        latencies=tuple(Latency(**latency) for latency in data.pop("latencies", ())), **data,
    )  # fmt: skip


def _part(data: dict[str, Any]) -> Part:
    report = data.pop("report")
    return Part(report=None if report is None else _report(report), **data)


def _error(data: dict[str, Any] | None) -> Error | None:
    return None if data is None else Error(**data)


def _pass_report(data: dict[str, Any]) -> PassReport:
    applied, refused, undone = (tuple(Site(**site) for site in data.pop(k)) for k in ("applied", "refused", "undone"))
    exact, drift = _error(data.pop("exact")), _error(data.pop("drift"))
    layers = tuple(_layer(layer) for layer in data.pop("quantization", ()))
    return PassReport(applied=applied, refused=refused, undone=undone, exact=exact, drift=drift, quantization=layers, **data)


def _layer(data: dict[str, Any]) -> LayerQuantization:
    shape, groups, sensitivity = (tuple(data.pop(k)) for k in ("shape", "groups", "sensitivity"))
    return LayerQuantization(shape=shape, groups=groups, sensitivity=tuple((b, v) for b, v in sensitivity), **data)
