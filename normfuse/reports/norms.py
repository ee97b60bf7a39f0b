"""Each norm of a report with its fate and the reason, alike ones together."""

from __future__ import annotations

from collections.abc import Iterable

from normfuse.reports.answer import kind_in_words
from normfuse.reports.model import NormFate, ReportData, Site
from normfuse.reports.text import Reason, reasons

__all__ = ["norm_reasons"]


def norm_reasons(report: ReportData) -> tuple[Reason, ...]:
    """Norms by fate and reason; `rule` of each entry is the fate, e.g. `LayerNorm → RMSNorm`."""
    applied, refused = _by_path(report.applied), _by_path(report.refused)
    return reasons(_told(norm, applied, refused) for norm in report.norms)


def _told(norm: NormFate, applied: dict[str, list[Site]], refused: dict[str, list[Site]]) -> Site:
    was = kind_in_words(norm.kind)
    if norm.now == norm.kind:
        why = [s.note for s in refused.get(norm.path, ()) if s.note]
        eased = "its gain or shift moved into other layers; " if norm.path in applied else ""
        return Site(f"{was} stays", norm.path, eased + ("; ".join(dict.fromkeys(why)) or "no rule is about it"))
    did = dict.fromkeys(
        f"scale and shift {s.note}" if s.rule.startswith("affine_into") else s.note for s in applied.get(norm.path, ()) if s.note
    )
    fate = f"{was} → {kind_in_words(norm.now)}" if norm.now else f"{was} folded away"
    return Site(fate, norm.path, "; ".join(did) or "it took part in a rewrite that is told at another place")


def _by_path(sites: Iterable[Site]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.path, []).append(site)
    return found
