"""The table of quantized layers in the report: text of any width, HTML, JSON."""

import dataclasses
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfuse.reports.html import page
from normfuse.reports.model import Calibration, Error, LayerQuantization, PassReport
from normfuse.reports.report import Report
from normfuse.reports.text import layer_cells, table

LAYERS = (
    LayerQuantization(
        "blocks.0.mlp.fc1", "linear", (64, 16), 4, 8, "dynamic", (10, 4, 0, 2), 21.37, 0.0, 4352, 700, 1.51, True,
        sensitivity=((8, 40.0), (4, 21.0)),
    ),
    LayerQuantization("wte", "embedding", (100, 16), 8, bytes_before=6400, bytes_after=2000),
    LayerQuantization("blocks.0.mlp.fc2", "linear", (16, 64), 8, 6, "static", (64,), 30.0, 0.0123, 4160, 1100, 2.0, False),
    LayerQuantization("head", "linear", (10, 16), bytes_before=680, bytes_after=680, kept="kept in float by keep='head'"),
    LayerQuantization("outputs", "model", sqnr=19.96, bytes_before=16000, bytes_after=4480),
)  # fmt: skip
REPORT = Report(passes=(PassReport("shiftquant", quantization=LAYERS, sqnr=19.5),))

words = st.text(max_size=40)
numbers = st.none() | st.floats(allow_nan=False)
layers = st.builds(
    LayerQuantization,
    path=words,
    kind=st.sampled_from(["linear", "conv2d", "embedding", "attention", "model"]),
    shape=st.lists(st.integers(0, 9999), max_size=4).map(tuple),
    weight_bits=st.none() | st.integers(2, 8),
    activation_bits=st.none() | st.integers(2, 8),
    activations=st.sampled_from(["", "static", "dynamic"]),
    groups=st.lists(st.integers(0, 99999), max_size=8).map(tuple),
    sqnr=numbers,
    clipped=st.none() | st.floats(0, 1),
    bytes_before=st.integers(0, 10**12),
    bytes_after=st.integers(0, 10**12),
    speedup=st.none() | st.floats(0, 1e6),
    measured=st.booleans(),
    kept=words,
    sensitivity=st.lists(st.tuples(st.integers(2, 8), st.floats(allow_nan=False)), max_size=5).map(tuple),
)
reports = st.lists(layers, max_size=5).map(lambda found: Report(passes=(PassReport("shiftquant", quantization=tuple(found)),)))


def test_each_layer_is_a_line() -> None:
    lines = table(REPORT, 80).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("quantized 3"))
    assert lines[start] == "quantized 3 of 4 layers: 16 kB → 4.48 kB (-72.0 %)"
    rows = [line.split() for line in lines[start + 2 : start + 6]]
    assert rows[0] == ["blocks.0.mlp.fc1", "w4a8", "10/4/0/2", "21.4", "dB", "0.00", "%", "700", "B", "0.16", "1.51x"]
    assert rows[1] == ["wte", "w8", "-", "-", "-", "2", "kB", "0.31", "-"]
    assert rows[2] == ["blocks.0.mlp.fc2", "w8a6s", "64", "30.0", "dB", "1.23", "%", "1.1", "kB", "0.26", "≈2.00x"]
    assert rows[3] == ["outputs", "-", "-", "20.0", "dB", "-", "4.48", "kB", "0.28", "-"]
    assert "head" not in "".join(lines)  # its reason stands among the refusals


def test_one_sqnr_leads_and_says_what_it_was_measured_on() -> None:
    calibrated = dataclasses.replace(REPORT, calibration=Calibration(128, 16, "images.npz"), exact=Error(1, 4.7e-16, "float64"))
    text = table(dataclasses.replace(calibrated, drift=Error(0, 0, "float32")), 200)
    assert "quantized   3 of 4 layers (1 W4A8, 1 W8, 1 W8A6); outputs: 20.0 dB against the original (SQNR), on 128 " in text
    assert "samples of images.npz" in text
    assert "19.5 dB" not in text  # of the pass, on other inputs
    assert "drift" not in text  # of what is meant to be the same function, which this is not
    assert "exact       4.7e-16 relative" in text
    assert "images.npz" in page(calibrated)
    alone = dataclasses.replace(REPORT, passes=(PassReport("shiftquant", quantization=LAYERS[:-1]),))
    assert "the SQNR of the outputs was not measured" in table(alone, 200)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Calibration(1, 1, "random data"), "random data (1 sample)"),
        (Calibration(4, 2, "the example inputs"), "the example inputs (4 samples)"),
        (Calibration(1280, 5, "images.npz"), "1,280 samples of images.npz"),
    ],
)
def test_calibration_in_words(found: Calibration, said: str) -> None:
    assert str(found) == said


def test_without_quantization_there_is_no_table() -> None:
    assert "quantized" not in table(Report(), 80)
    assert "Quantization" not in page(Report())


def test_html_tells_reasons_and_sensitivities() -> None:
    text = page(REPORT)
    assert "kept in float by keep=&#39;head&#39;" in text
    assert "<th>8 bits</th><th>4 bits</th>" in text or "<th>4 bits</th><th>8 bits</th>" in text
    assert "40.0 dB" in text


@given(reports)
def test_json_comes_back_as_it_was(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


@given(reports, st.integers(20, 200))
def test_no_line_is_wider_than_asked(report: Report, width: int) -> None:
    assert all(len(line) <= width for line in table(report, width).splitlines())


@given(reports)
def test_html_closes_what_it_opens(report: Report) -> None:
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Parser().feed(page(report))
    assert not opened


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(LayerQuantization)])
def test_every_field_is_documented(field: str) -> None:
    assert field in (LayerQuantization.__doc__ or "")


def test_cells_are_those_of_the_head() -> None:
    assert {len(layer_cells(layer)) for layer in LAYERS} == {8}
