"""The page of a report in a real browser: both widths, both themes. Skipped where Chromium is not installed."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import normfuse
from normfuse.reports.html import page
from normfuse.reports.model import Latency
from normfuse.reports.report import Report
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (apt-get install chromium)"),
]

SCREENS = {390: 844, 1280: 800}  # a telephone and a small laptop
FLOAT = "the float original in ONNX Runtime"
LATENCIES = (
    Latency("the file in ONNX Runtime with normfuse's library", FLOAT, 6.6, 14.2, 2.14, 2.13, 2.18, 2, "faster"),
    Latency("the file in stock ONNX Runtime", FLOAT, 17.1, 14.2, 0.83, 0.81, 0.86, 2, "slower"),
)
MEASURE = """
<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const shown = frame.contentDocument, root = shown.documentElement;
    const answers = [...shown.querySelectorAll(".answers .card")].map(card => card.getBoundingClientRect().bottom);
    return {width: frame.width, needs: root.scrollWidth, bottom: Math.max(...answers), answers: answers.length,
            back: frame.contentWindow.getComputedStyle(shown.body).backgroundColor};
  });
  document.body.dataset.found = JSON.stringify(found);
};
</script>
"""


def _chromium(*arguments: str) -> str:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _optimized(name: str, quantize: normfuse.ShiftQuant | None = None) -> Report:
    entry = ZOO[name]
    fast = normfuse.optimize(entry.build(), entry.args, quantize=quantize)
    return dataclasses.replace(normfuse.report(fast), latencies=LATENCIES)


REPORTS = {
    "vit": lambda: _optimized("preln_vit"),
    "resnet-w8a8": lambda: _optimized("resnet", normfuse.ShiftQuant(weight_bits=8, activation_bits=8, prefer="size")),
    "decoder": lambda: _optimized("preln_gpt"),
}


@pytest.mark.parametrize("name", list(REPORTS))
def test_first_screen_answers_in_both_widths_and_themes(name: str, tmp_path: Path) -> None:
    shown = html.escape(page(REPORTS[name]()))
    frames = "".join(
        f'<iframe width="{width}" height="{height}" style="border: 0" srcdoc="{shown}"></iframe>'
        for width, height in SCREENS.items()
    )
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}{MEASURE}</body>", encoding="utf-8")
    backs = []
    for preferred in (0, 1):  # dark, light
        text = _chromium(f"--blink-settings=preferredColorScheme={preferred}", "--dump-dom", (tmp_path / "frames.html").as_uri())
        found = re.search(r'data-found="([^"]*)"', text)
        assert found is not None
        for screen in json.loads(html.unescape(found[1])):
            width = int(screen["width"])
            assert screen["needs"] <= width, "nothing is cut off, and nothing scrolls sideways"
            assert screen["answers"] == 3
            assert screen["bottom"] <= SCREENS[width], "what changed, how exact, how fast: without scrolling"
            backs.append(screen["back"])
    dark, light = set(backs[:2]), set(backs[2:])
    assert len(dark) == len(light) == 1
    assert dark != light


def test_a_picture_is_taken(tmp_path: Path) -> None:
    REPORTS["vit"]().to_html(tmp_path / "report.html")
    picture = tmp_path / "report.png"
    _chromium("--window-size=390,844", f"--screenshot={picture}", (tmp_path / "report.html").as_uri())
    with Image.open(picture) as taken:
        assert taken.size == (390, 844)
        assert len(taken.convert("L").getcolors() or range(257)) > 16  # it is not one empty sheet
