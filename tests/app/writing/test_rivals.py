"""Who a folder of a decoder is measured against: names, and that each writes what the others write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

import normfuse
from normfuse.app.writing.rivals import Lengths, Named, engines, named, prepared
from normfuse.app.writing.writers import OPENED
from normfuse.benchmark import Comparison, Measurement, Schedule, Verdict
from normfuse.benchmark.machine import Machine
from normfuse.benchmark.written import Written
from normfuse.errors import UsageError
from tests.cli_runner import Run, runner
from tests.export.decoder.models import greedy, prompts, tiny, tokenizer

SIZE = Lengths(9, 4)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder, and the folder of a decoder that is made of it."""
    work = tmp_path_factory.mktemp("writing")
    model = tiny("llama", num_hidden_layers=1)
    model.save_pretrained(work / "hf")  # type: ignore[operator]
    tokenizer().save_pretrained(work / "hf")
    normfuse.export.to_decoder(model, work / "own", last_logits=True, proof_tokens=0, verify="off")
    return work / "hf", work / "own"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with runner("nothing", "", tmp_path, monkeypatch, capsys) as ready:
        yield ready


@pytest.mark.parametrize("kind", ["onnxruntime", "hf"])
def test_a_text_may_be_taken_back(kind: str, places: tuple[Path, Path]) -> None:
    """The same tokens again, and those that `generate` writes."""
    hf, own = places
    writer = OPENED[kind](f"hf:{hf}" if kind == "hf" else str(own), SIZE.room, 1)
    (prompt,) = prompts(9)
    writer.start(prompt)
    first = writer._token  # type: ignore[attr-defined]
    found = []
    for _ in range(2):
        writer.back(9)
        writer._token = first  # type: ignore[attr-defined]
        found.append([writer._token])  # type: ignore[attr-defined]
        for _ in range(3):
            writer.step()
            found[-1].append(writer._token)  # type: ignore[attr-defined]
    assert found == 2 * greedy(tiny("llama", num_hidden_layers=1), [prompt], 4)


def test_genai_reads_the_same_folder(places: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime_genai")
    _, own = places
    for engine in engines(named("genai", own), SIZE):
        call = engine.open(1)
        for _ in range(9):  # beyond the room: the text is taken back
            call()


def test_int4_is_made_without_us(places: tuple[Path, Path], tmp_path: Path) -> None:
    hf, own = places
    made = prepared(named(f"int4:{hf}", own), tmp_path)
    ops = [node.op_type for node in onnx.load(made.path / "model.onnx").graph.node]
    assert ops.count("MatMulNBits") == 8
    assert "GroupQueryAttention" in ops
    for engine in engines(made, SIZE):
        call = engine.open(1)
        for _ in range(5):
            call()


def test_names_that_are_wrong(places: tuple[Path, Path], tmp_path: Path) -> None:
    hf, own = places
    for text, said in (
        ("gena", "did you mean 'genai'"), (f"genai:{tmp_path}", "genai_config.json"), ("openvino:no.gguf", "there is no no.gguf"),
        (f"hf:{tmp_path}", "config.json"), (str(hf), "another folder of a decoder"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            named(text, own)
    assert named(str(own), own) == Named(str(own), "onnxruntime", own)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt-tokens", "250", "--new-tokens", "9"], "259 tokens, and .* knows 256 positions"),
        (["--quantize", "w8a8"], "--quantize is not for the folder of a decoder"),
        (["--engine", "eager"], "--engine is not for the folder"),
        (["--against", "gena"], "unknown rival 'gena'"),
    ],
)
def test_flags_that_are_wrong(flags: list[str], said: str, places: tuple[Path, Path], run: Run) -> None:
    code, _, err = run("bench", str(places[1]), *flags)
    assert code == 2
    assert re.search(said, err), err


def _compared(*seconds: float) -> list[Comparison]:
    """An engine that takes 10 ms against others that take `seconds`."""
    names = tuple(f"genai:a-folder-with-a-long-name-{i}" for i in range(len(seconds)) for _ in range(2))
    row = (*(s for s in seconds for _ in range(2)), 0.01)
    machine = Machine("a processor with a long name that nobody would ever print in full", 2, "Linux", "3.11", {})
    found = Measurement((*names, "own"), (row,) * 6, tuple((t,) * 6 for t in row), 1, (0,), 0.0, machine, Schedule())
    return [Comparison.of(found, a=2 * i, again=2 * i + 1, b=len(row) - 1) for i in range(len(seconds))]


def test_rates_stand_beside_the_speedups() -> None:
    found = Written(_compared(0.02, 0.04), _compared(0.02, 0.005), 100, 50)
    assert found.claim.verdict is Verdict.FAILS
    told = json.loads(json.dumps(found.to_dict()))
    assert told["measured"]["prefill"] == pytest.approx(1e4)
    assert told["measured"]["decode"] == pytest.approx(100)
    assert [row["decode"] for row in told["against"]] == pytest.approx([50, 200])
    assert told["against"][1]["decode_speedup"]["value"] == pytest.approx(0.5)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("prompt of 100 tokens, then 50", "4.00 [4.00, 4.00]  0.50 [0.50, 0.50]", "fails (genai"):
        assert part in text, text
