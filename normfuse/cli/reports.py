"""Writing `--report` files."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from normfuse.errors import UsageError
from normfuse.files import atomic, check_target

if TYPE_CHECKING:
    from normfuse.reports.report import Report

__all__ = ["check_report", "report_option", "write_report"]

report_option = click.option(
    "--report", "report_path", type=click.Path(path_type=Path), help="Write the report there as well (.html or .json)."
)


def check_report(path: Path | None, *, force: bool) -> None:
    """Complain about a report that could not be written, before any work is done."""
    if path is None:
        return
    if path.suffix not in (".html", ".json"):
        raise UsageError(f"--report {path}: expected a name that ends in .html or .json")
    check_target(path, force=force)


def write_report(report: "Report", path: Path | None, *, force: bool) -> None:
    """Write the report as HTML or JSON, by the path's suffix; without a path nothing."""
    if path is None:
        return
    with atomic(path, force=force) as partial:
        if path.suffix == ".html":
            report.to_html(partial)
        else:
            report.to_json(partial)
