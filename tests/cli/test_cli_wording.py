"""What the command line says in its own words: remedies, columns, the speed of a quantized file."""

import dataclasses
from pathlib import Path

import pytest

from normfuse.benchmark import Comparison
from normfuse.cli.columns import columns, differences
from normfuse.cli.exporting.speed import Speed
from normfuse.cli.wording import in_options, report_in_options
from normfuse.reports.model import LayerQuantization, PassReport, Site
from normfuse.reports.report import Report
from tests.benchmark.test_bench import measurement


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("x.onnx exists already; pass force=True (on the command line --force) to replace it", "pass --force to replace it"),
        ("pass example_inputs", "pass --shape or --input"),
        ("pass example inputs or calibration=", "pass --calibration DATA, --shape or --input"),
        ("pass example_inputs=(tensor, ...) or a dict of keyword inputs", "pass --shape or --input"),
        ("pass dynamic_shapes= if sizes vary", "pass --dynamic AXIS if sizes vary"),
        ("prefer='size' quantizes it all the same", "--quantize ...,prefer=size quantizes it all the same"),
        ("pass --calibration DATA", "pass --calibration DATA"),
        ("form='qdq': use form='native' or form='integer'", "--form qdq: use --form native or --form integer"),
        ("runtime='1.16': files are written for", "--runtime 1.16: files are written for"),
        ("attention='attention23' needs opset 23", "--attention attention23 needs opset 23"),
        ("int4_initializers=True: INT4 needs", "--int4: INT4 needs"),
        (
            "quantize with ShiftQuant(activations='static') and calibration data, or use",
            "pass --quantize ...,static and --calibration DATA, or use",
        ),
        ("quantize with ShiftQuant(groups=1), or use", "pass --quantize ...,groups=1, or use"),
        ("use nn.LayerNorm modules", "use nn.LayerNorm modules"),
    ],
)
def test_remedies_are_options(said: str, expected: str) -> None:
    assert expected in in_options(said)
    assert in_options(in_options(said)) == in_options(said)


def test_a_whole_report_is_said_in_options() -> None:
    site = Site("r", "a", "no shapes: pass example_inputs", remedy="pass example_inputs")
    layer = LayerQuantization("a", "linear", kept="kept in float by keep='a'")
    found = report_in_options(
        Report(passes=(PassReport("p", (site,), (site,), quantization=(layer,)),), notes=("pass calibration=",))
    )
    assert found.refused[0] == Site("r", "a", "no shapes: pass --shape or --input", remedy="pass --shape or --input")
    assert found.quantization[0].kept == "kept in float by --keep 'a'"
    assert found.notes == ("pass --calibration DATA",)


def test_columns_show_what_differs_in_80_letters() -> None:
    rows = differences({"Add": 3, "Conv": 2}, {"Add": 3, "Gemm": 1, "Conv": 4})
    assert rows == [("Conv", "2", "4"), ("Gemm", "-", "1")]
    lines = columns(("", "a.onnx", "b.onnx"), [*rows, ("x" * 90, "y" * 90, "z" * 90)])
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["Conv", "2", "4"]


SLOW = Comparison.of(measurement([0.1] * 9, [0.1] * 9, [0.2] * 9))
FAST = Comparison.of(measurement([0.1] * 9, [0.1] * 9, [0.05] * 9))


def test_slower_file_says_so_and_points_to_what_makes_it_fast() -> None:
    speed = Speed(Path("q.onnx"), SLOW, FAST, native=True)
    text = str(speed)
    assert speed.slower
    assert "stock ONNX Runtime: SLOWER than the float original here" in text
    assert "200 ms against 100 ms, 0.500 [0.500, 0.500] times as fast" in text
    assert "with normfuse's library: faster than it" in text
    assert "the lines below register the library" in text
    assert max(map(len, text.splitlines())) <= 80


def test_slower_file_without_ops_of_ours_names_the_other_form() -> None:
    assert "export --form native" in str(Speed(Path("q.onnx"), SLOW))
    assert "form native" not in str(Speed(Path("q.onnx"), FAST))


def test_what_cannot_be_told_or_was_not_measured_is_said() -> None:
    long = Speed(Path("q.onnx"), why_not="the float original failed: " + "no kernels for it " * 9)
    assert max(map(len, str(long).splitlines())) <= 80
    busy = dataclasses.replace(SLOW, itself=dataclasses.replace(SLOW.itself, low=0.5, high=2.0))
    assert not Speed(Path("q.onnx"), busy).slower
    assert "not to be told from" in str(Speed(Path("q.onnx"), busy))
    unmeasured = Speed(Path("q.onnx"), native=True, why_not="torch cannot export it")
    assert "not measured: torch cannot export it" in str(unmeasured)
    assert "the lines below register the library" in str(unmeasured)
    assert unmeasured.to_dict() == {"stock": None, "library": None, "slower": False, "why_not": "torch cannot export it"}
