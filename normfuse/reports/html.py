"""A report as one HTML page: nothing is loaded, no script runs, every text is escaped."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import TYPE_CHECKING

from normfuse import __version__
from normfuse.reports.model import ReportData
from normfuse.reports.page import Page
from normfuse.reports.text import compact, part_in_short

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["page"]

_WIDE = ("kept in float because",)  # columns that hold sentences


def page(report: ReportData) -> str:
    """The report as a self-contained HTML page, light or dark as the reader's system is."""
    text: str = _template().render(page=Page.of(report), report=report)
    return text.strip() + "\n"


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files("normfuse.reports")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    known = {"compact": compact, "part_in_short": part_in_short, "wide": _WIDE, "version": __version__}
    environment.globals |= known | {"zip": functools.partial(zip, strict=True)}
    environment.globals["style"] = Markup((here / "page.css").read_text(encoding="utf-8"))  # ours, not the report's
    return environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
