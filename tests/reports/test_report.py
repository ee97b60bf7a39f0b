"""The report as text, HTML and JSON."""

import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import UsageError
from normfuse.reports.answer import norms_in_words
from normfuse.reports.cards import cards
from normfuse.reports.chips import before_and_after
from normfuse.reports.html import page
from normfuse.reports.model import Block, Calibration, Error, Latency, NormFate, Origin, PassReport, Site
from normfuse.reports.norms import norm_reasons
from normfuse.reports.numbers import change, duration, magnitude, size
from normfuse.reports.report import Report
from normfuse.reports.text import compact, passes_in_rows, reasons, table

SITES = tuple(
    Site("affine_into_consumers", f"blocks.{i}.norm1", "a reader is not linear", f"blocks.{i}.act", "use a linear reader")
    for i in range(12)
)
STREAM = tuple(
    Site("layer_norm_is_rms_norm", f"norms.{i}", "its residual stream has no mean: the weights that write it are centered")
    for i in range(25)
)
REPORT = Report(
    passes=(
        PassReport("expose", seconds=0.002),
        PassReport(
            "affine",
            applied=(Site("affine_into_producer", "layer1.bn1", "into layer1.conv1"),),
            refused=(Site("affine_into_producer", "layer1.bn2", "conv2 feeds 2 consumers", "layer1.conv2"), *SITES),
            exact=Error(1e-15, 1.6e-16, "float64"),
            drift=Error(1e-6, 2.2e-7, "float32"),
            seconds=0.0094,
        ),
        PassReport(
            "mean_free",
            applied=STREAM,
            undone=(Site("layer_norm_is_rms_norm", "blocks.0.norm2", "exact error 2.0e-03"),),
            seconds=1.251,
        ),
        PassReport("select", seconds=0.003),
    ),
    exact=Error(2.2e-15, 3.2e-16, "float64"),
    drift=Error(1e-6, 2.0e-7, "float32"),
    norms_before={"batch_norm": 2, "layer_norm": 25},
    norms_after={"batch_norm": 1, "rms_norm": 25},
    parameters_before=4000,
    parameters_after=3000,
    bytes_before=16_000_000,
    bytes_after=12_000_000,
    notes=("the model was in training mode",),
    seconds=4.2,
    origin=Origin(
        "timm:vit_tiny",
        "random (seed 0)",
        "normfuse optimize timm:vit_tiny -o x.pt2",
        "2026-11-30 01:02",
        {"normfuse": "0.1.0", "torch": "2.14.1"},
        "a CPU, 2 cores",
    ),
    capture_seconds=0.8,
    verify_seconds=1.5,
)

words = st.text(max_size=300)
paths = st.one_of(words, st.from_regex(r"[a-z]{1,40}(\.[a-z0-9_]{1,40}){0,12}", fullmatch=True))
sites = st.builds(Site, rule=words, path=paths, note=words, blocker=paths, remedy=words)
errors = st.none() | st.builds(Error, st.floats(), st.floats(), st.sampled_from(["float64", "bfloat16"]))
counts = st.integers(0, 10**15)
norms = st.dictionaries(words, st.integers(0, 999), max_size=4)
some_sites = st.lists(sites, max_size=4).map(tuple)
some_words = st.lists(words, max_size=4).map(tuple)
times = st.floats(0, 1e6)
verdicts = st.sampled_from(["faster", "slower", "undecided"])
latencies = st.builds(Latency, words, words, times, times, times, times, times, st.integers(1, 64), verdicts)
reports = st.builds(
    Report,
    passes=st.lists(
        st.builds(PassReport, words, some_sites, some_sites, some_sites, errors, errors, st.floats(0, 1e6)), max_size=3
    ).map(tuple),
    exact=errors,
    drift=errors,
    norms_before=norms,
    norms_after=norms,
    parameters_before=counts,
    parameters_after=counts,
    bytes_before=counts,
    bytes_after=counts,
    notes=st.lists(words, max_size=3).map(tuple),
    seconds=st.floats(0, 1e6),
    origin=st.none() | st.builds(Origin, words, words, words, words, st.dictionaries(words, words, max_size=2), words),
    calibration=st.none() | st.builds(Calibration, counts, counts, words),
    capture_seconds=st.floats(0, 1e6),
    verify_seconds=st.floats(0, 1e6),
    norms=st.lists(st.builds(NormFate, paths, words, words), max_size=3).map(tuple),
    blocks=st.lists(st.builds(Block, some_words, some_words, some_words), max_size=3).map(tuple),
    latencies=st.lists(latencies, max_size=2).map(tuple),
)


def test_table_reads_as_documented() -> None:
    assert table(REPORT) == (
        """\
timm:vit_tiny
weights: random (seed 0)
command: normfuse optimize timm:vit_tiny -o x.pt2
normfuse 0.1.0, torch 2.14.1; a CPU, 2 cores; 2026-11-30 01:02 UTC

changed     25 LayerNorm → 25 RMSNorm, all on the residual stream; 1 of 2
            BatchNorm folded away
exact       3.2e-16 relative, 2.2e-15 absolute (float64)
drift       2.0e-07 relative, 1.0e-06 absolute (float32)
size        16 MB → 12 MB (-25.0 %)
parameters  4,000 → 3,000 (-25.0 %)
stayed      1 BatchNorm; the reasons stand below

taken back: failed verification
  layer_norm_is_rms_norm: exact error 2.0e-03
      at blocks.0.norm2

stayed, and why
  affine_into_consumers: a reader is not linear (12 times)
      at blocks.{0-11}.norm1
      blocked by blocks.{0-11}.act
      to unblock: use a linear reader
  affine_into_producer: conv2 feeds 2 consumers
      at layer1.bn2
      blocked by layer1.conv2

notes
  - the model was in training mode

rules applied: layer_norm_is_rms_norm 25, affine_into_producer 1
pass          applied  refused   undone      exact      drift         time
capture             -        -        -          -          -       800 ms
affine              1       13        -    1.6e-16    2.2e-07         9 ms
mean_free          25        -        1          -          -       1.25 s
2 others            -        -        -          -          -         5 ms
verification        -        -        -          -          -        1.5 s
whole              26       13        1    3.2e-16    2.0e-07        4.2 s"""
    )
    assert str(REPORT) == table(REPORT, 80)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param({}, {}, "the model has no norm of a known kind", id="none"),
        pytest.param({"layer_norm": 3}, {"layer_norm": 3}, "no norm", id="unchanged"),
        pytest.param({"layer_norm": 29}, {"layer_norm": 24, "rms_norm": 5}, "5 of 29 LayerNorm → 5 RMSNorm", id="some"),
        pytest.param({"batch_norm": 49, "group_norm": 2}, {"group_norm": 2}, "49 BatchNorm folded away", id="folded"),
        pytest.param({"layer_norm": 2}, {"crms_norm": 2}, "2 LayerNorm → 2 CrmsNorm", id="another kind"),
        pytest.param({"unified_norm": 2}, {"unified_norm": 0}, "2 UnifiedNorm folded away", id="a layer of ours"),
        pytest.param({}, {"rms_norm": 1}, "1 RMSNorm more than before", id="more"),
    ],
)
def test_changed_norms_in_words(before: dict[str, int], after: dict[str, int], expected: str) -> None:
    assert norms_in_words(Report(norms_before=before, norms_after=after)) == expected


def test_zero_rows_share_one_line_and_all_times_add_up() -> None:
    rows = passes_in_rows(REPORT)
    assert [name for name, _ in rows] == ["capture", "affine", "mean_free", "2 others", "verification", "whole"]
    assert sum(p.seconds for p in REPORT.passes) == pytest.approx(sum(p.seconds for _, p in rows[1:4]))


def test_reasons_that_differ_in_places_and_numbers_are_one() -> None:
    found = reasons(
        Site("r", f"blocks.{i}.norm", f"stages.{i}.conv_dw (conv2d) has {40 * 2**i} groups: none sees all", f"stages.{i}.conv_dw")
        for i in range(5)
    )
    assert [r.note for r in found] == ["stages.{0-4}.conv_dw (conv2d) has 40, 80, 160 and 2 more groups: none sees all"]
    assert found[0].count == 5
    other = reasons([Site("r", "a", "blocks.1 is left"), Site("r", "b", "blocks.1 is right")])
    assert len(other) == 2


def test_older_json_is_still_read() -> None:
    data = json.loads(REPORT.to_json())
    for key in ("origin", "calibration", "capture_seconds", "verify_seconds", "norms", "blocks", "latencies"):
        del data[key]
    back = Report.from_json(json.dumps(data))
    assert back.passes == REPORT.passes
    assert back.origin is None


def test_notebooks_show_the_page_in_a_frame() -> None:
    shown = REPORT._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "25 LayerNorm → 25 RMSNorm" in shown
    assert shown.count("<") == 2  # the page itself is escaped


def test_title_of_the_page_is_the_model() -> None:
    assert "<title>timm:vit_tiny · normfuse</title>" in page(REPORT)
    assert "normfuse optimize timm:vit_tiny -o x.pt2" in page(REPORT)


def test_empty_report_says_so() -> None:
    text = table(Report())
    assert text.startswith("changed     the model has no norm of a known kind\n")
    assert text.endswith("\nno pass ran")
    assert "exact       not measured" in text
    assert "refused" not in text


@pytest.mark.parametrize("width", [pytest.param(w, id=str(w)) for w in (20, 30, 58, 59, 80, 200)])
def test_long_paths_are_broken_not_cut(width: int) -> None:
    path = "x" * 300
    report = Report(passes=(PassReport("p" * 300, refused=(Site("r" * 300, path, "n" * 300, "b" * 300, "m" * 300),)),))
    lines = table(report, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "".join(line.strip() for line in lines).count("x" * 300) == 1


@given(reports, st.integers(20, 300))
def test_no_line_is_wider_than_asked(report: Report, width: int) -> None:
    assert all(len(line) <= width for line in table(report, width).split("\n"))


def test_a_width_that_cannot_hold_a_word_is_an_error() -> None:
    with pytest.raises(UsageError, match="at least 20 columns, not 19"):
        table(REPORT, 19)


@given(reports)
def test_json_comes_back_as_it_was(report: Report) -> None:
    back = Report.from_json(report.to_json())
    assert back == report or _has_nan(report)  # NaN is not equal to itself
    assert repr(back) == repr(report)


def _has_nan(report: Report) -> bool:
    found = [report.exact, report.drift, *(e for p in report.passes for e in (p.exact, p.drift))]
    return any(math.isnan(v) for e in found if e is not None for v in (e.max_abs, e.max_rel))


def test_json_file_is_the_returned_text(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert REPORT.to_json(path) + "\n" == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "passes": [{"nme": 1}]}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not the JSON of a normfuse report"):
        Report.from_json(text)


class _Page(HTMLParser):
    """Tags that are opened and closed, attributes, and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _parse(report: Report) -> _Page:
    parser = _Page()
    parser.feed(page(report))
    parser.close()
    assert parser.open == []
    return parser


@given(reports)
def test_html_is_well_formed_whatever_the_names_are(report: Report) -> None:
    parsed = _parse(report)
    assert parsed.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert parsed.attributes <= {"lang", "charset", "name", "content", "class", "style", "data-head"}


def test_html_escapes_and_shows_everything(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>"
    report = dataclasses.replace(
        REPORT,
        passes=(PassReport(evil, (Site(evil, evil, evil),), (Site(evil, evil, evil, evil, evil),), (Site(evil, evil, evil),)),),
        norms_before={evil: 1},
        notes=(evil,),
    )
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "://" not in text  # nothing is loaded
    assert _parse(report).text.count(evil) == 15


@pytest.mark.parametrize(
    ("latencies", "said"),
    [
        pytest.param((), "not measured", id="none"),
        pytest.param((Latency("a", "b", 2.0, 4.0, 2.0, 1.9, 2.1, 2, "faster"),), "2 times as fast", id="faster"),
        pytest.param((Latency("a", "b", 4.0, 2.0, 0.5, 0.4, 0.6, 1, "slower"),), "SLOWER: 0.5 times as fast", id="slower"),
        pytest.param((Latency("a", "b", 4.0, 4.2, 1.05, 0.9, 1.2),), "undecided: about 1.05 times as fast", id="undecided"),
    ],
)
def test_how_fast_is_the_third_answer(latencies: tuple[Latency, ...], said: str) -> None:
    *_, fast = cards(dataclasses.replace(REPORT, latencies=latencies))
    assert (fast.question, fast.answer) == ("How fast", said)
    for bar in fast.bars:
        assert 0 <= bar.left <= bar.left + bar.width <= 100
        assert 0 < bar.one < 100
    assert said in _parse(dataclasses.replace(REPORT, latencies=latencies)).text


def test_blocks_mark_what_is_gone_and_what_is_new() -> None:
    block = Block(("blocks.0",), ("layer_norm", "linear", "linear", "gelu"), ("rms_norm", "linear", "normfuse::shiftquant_linear"))
    before, after = before_and_after(block)
    assert [(c.text, c.tone) for c in before] == [
        ("LayerNorm", "norm gone"), ("linear", ""), ("linear", "gone"), ("gelu", "gone"),
    ]  # fmt: skip
    assert [(c.text, c.tone) for c in after] == [("RMSNorm", "norm new"), ("linear", ""), ("linear in integers", "int new")]


def test_each_norm_has_its_fate_and_its_reason() -> None:
    norms = (*(NormFate(f"norms.{i}", "layer_norm", "rms_norm") for i in range(25)),
             NormFate("layer1.bn1", "batch_norm"), NormFate("layer1.bn2", "batch_norm", "batch_norm"))  # fmt: skip
    found = {(r.rule, r.count): r.note for r in norm_reasons(dataclasses.replace(REPORT, norms=norms))}
    assert found == {
        ("LayerNorm → RMSNorm", 25): "its residual stream has no mean: the weights that write it are centered",
        ("BatchNorm folded away", 1): "scale and shift into layer1.conv1",
        ("BatchNorm stays", 1): "conv2 feeds 2 consumers",
    }


def test_html_lists_what_the_text_lists() -> None:
    text = _parse(REPORT).text
    for expected in (
        "blocks.{0-11}.norm1",
        "conv2 feeds 2 consumers",
        "use a linear reader",
        "3.2e-16",
        "25 LayerNorm → 25 RMSNorm",
        "4.2 s",
    ):
        assert expected in text


def test_reasons_group_equal_refusals_largest_first() -> None:
    first, second = reasons(REPORT.refused)
    assert (first.count, len(first.paths), len(first.blockers)) == (12, 12, 12)
    assert (second.count, second.blockers) == (1, ("layer1.conv2",))


@pytest.mark.parametrize(
    ("given_paths", "expected"),
    [
        pytest.param(["a.0.n", "a.1.n", "a.2.n"], ("a.{0-2}.n",), id="range"),
        pytest.param(["a.0.n", "a.1.n"], ("a.0.n", "a.1.n"), id="two-stay"),
        pytest.param(["a.5", "a.3", "a.9", "a.4"], ("a.{3-5,9}",), id="gaps-and-order"),
        pytest.param(["a.00", "a.01", "a.02"], ("a.00", "a.01", "a.02"), id="leading-zeros"),
        pytest.param(["a", "a", "b"], ("a", "b"), id="repeated"),
        pytest.param(["layer1.0.bn1", "layer1.0.bn2", "layer1.0.bn3", "stem"], ("layer1.0.bn{1-3}", "stem"), id="attached"),
    ],
)
def test_compact_keeps_every_number(given_paths: list[str], expected: tuple[str, ...]) -> None:
    assert compact(given_paths) == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        pytest.param(duration(0.0004), "0 ms", id="nothing"),
        pytest.param(duration(0.9994), "999 ms", id="below-a-second"),
        pytest.param(duration(0.9996), "1 s", id="a-second"),
        pytest.param(duration(12.34), "12.3 s", id="seconds"),
        pytest.param(duration(192), "3 min 12 s", id="minutes"),
        pytest.param(duration(7500), "2 h 5 min", id="hours"),
        pytest.param(size(0), "0 B", id="no-bytes"),
        pytest.param(size(999_600), "1 MB", id="round-up-to-mega"),
        pytest.param(size(3 * 10**12), "3 TB", id="tera"),
        pytest.param(magnitude(None), "-", id="not-measured"),
        pytest.param(magnitude(Error(0, 0, "float64")), "0", id="zero"),
        pytest.param(magnitude(Error(math.inf, math.inf, "float64")), "inf", id="infinite"),
        pytest.param(change(0, 5), "0 → 5", id="from-nothing"),
        pytest.param(change(7, 7), "7, unchanged", id="unchanged"),
        pytest.param(change(200, 150), "200 → 150 (-25.0 %)", id="smaller"),
        pytest.param(change(100_000, 99_999), "100,000 → 99,999", id="hardly-smaller"),
        pytest.param(change(14_800_000, 14_770_000, size), "14.8 MB (-0.2 %)", id="as-large-as-it-is-shown"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected
