"""What a quantized file says of itself, and what that asks of it."""

from pathlib import Path

from normfuse.errors import CheckFailed
from normfuse.export.targets import folder_of

__all__ = ["least_sqnr"]


def least_sqnr(path: str) -> float | None:
    """The SQNR in dB that the file at `path` must have against the model that it was made of; None for one that is not quantized.

    A file states the SQNR that was measured when its model was quantized. On other inputs it may have less: 10 dB, as much as a
    file may lose against its module, and never more than half of what is stated.

    Raises:
        CheckFailed: the file is quantized and states none.
    """
    from normfuse.export.onnx.compare import MARGIN, MIN_SQNR

    quantized, stated = _of_program(path) if Path(path).suffix == ".pt2" else _of_file(path)
    if not quantized:
        return None
    if stated is None:
        raise CheckFailed(
            f"{path} is quantized and does not state its SQNR, so that there is nothing to hold it to: pass --tolerance, a bound "
            "on the relative error"
        )
    return max(0.0, min(MIN_SQNR, max(stated - MARGIN, stated / 2)))


def _of_file(path: str) -> tuple[bool, float | None]:
    folder = folder_of(path)
    facts = {} if folder is None else folder.facts(Path(path))
    stated = facts.get("normfuse.sqnr")  # "29.7 dB"
    return "normfuse.form" in facts or stated is not None, None if stated is None else float(stated.removesuffix("dB"))


def _of_program(path: str) -> tuple[bool, float | None]:
    from normfuse.pt2 import read_report
    from normfuse.reports.report import Report

    text = read_report(path)
    if text is None:
        return False, None
    report = Report.from_json(text)
    return bool(report.quantization), report.sqnr
