"""A page as a Jupyter notebook: its text, its Python, its commands. The tests run the same blocks (tests/test_docs.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["notebook"]

_FENCE = re.compile(
    r"(?P<not_run><!-- not run: [^\n]*-->\s*)?^```(?P<language>python|console|sh)\n(?P<body>.*?)^```\n", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+://)[^)]*\)")  # links of the site lead nowhere from a notebook


def notebook(markdown: str) -> str:
    """The notebook's JSON. Blocks that no test can run stay text."""
    cells = [_cell(kind, text, i) for i, (kind, text) in enumerate(_cells(markdown))]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


def _cells(markdown: str) -> Iterator[tuple[str, str]]:
    text, end = "", 0
    for found in _FENCE.finditer(markdown):
        text += markdown[end : found.start()]
        end = found.end()
        if found["not_run"]:
            text += found[0].removeprefix(found["not_run"])
            continue
        yield "markdown", text
        text = ""
        yield "code", _code(found["language"], found["body"])
    yield "markdown", text + markdown[end:]


def _code(language: str, body: str) -> str:
    if language == "python":
        return body
    if language == "sh":
        return f"%%bash\n{body}"
    return "\n".join(f"!{line}" for line in re.findall(r"^\$ (.*)", body, re.MULTILINE))


def _cell(kind: str, text: str, index: int) -> dict[str, Any]:
    text = _LINK.sub(r"\2", text).strip("\n") if kind == "markdown" else text.strip("\n")
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{index}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
