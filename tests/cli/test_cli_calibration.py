"""`--calibration` of what people have: folders of images, texts with the tokenizer, data sets on disk; labels are left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli_runner import Run, runner

Image = pytest.importorskip("PIL.Image")

MODELS = """
import torch
from torch import nn

class Net(nn.Sequential):
    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}

def build():
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), (torch.randn(2, 3, 8, 8),)

def silent():
    return nn.Sequential(*build()[0]), build()[1]

class Two(nn.Module):
    def forward(self, x, y):
        return x + y

def two():
    return Two(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))

def bytes_and_labels():
    for _ in range(3):
        yield torch.randint(0, 256, (2, 3, 8, 8)).float(), torch.tensor([0, 1])
"""
Q = ("verify", "models:build", "--quantize", "w8a8,static,prefer=size")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with runner("models", MODELS, tmp_path, monkeypatch, capsys) as found:
        yield found


def pictures(folder: Path, count: int = 5) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file)


def test_a_folder_of_images_is_prepared_as_the_model_wants_it(run: Run) -> None:
    pictures(Path("photos"))
    (Path("photos") / ".hidden.png").write_text("no image")
    (Path("photos") / "notes.txt").write_text("no image either")
    code, out, err = run(*Q, "--calibration", "photos")
    assert (code, err) == (0, "")
    assert "on 4 samples of photos" in " ".join(out.split())  # two batches of two
    assert "are they prepared" not in " ".join(out.split())
    code, out, _ = run(*Q, "--calibration", "photos", "--calibration-samples", "3")
    assert code == 0
    assert "on 2 samples of photos" in " ".join(out.split())


def test_data_in_another_range_than_the_example_are_told(run: Run) -> None:
    pictures(Path("photos"))
    code, out, _ = run(*Q, "--calibration", "photos", "--preprocess", "bytes")
    assert code == 0
    told = " ".join(out.split())
    assert "calibration: its values of input go from" in told
    assert "are they prepared as the model wants them?" in told
    code, out, _ = run(*Q, "--calibration", "models:bytes_and_labels")
    assert code == 0
    assert "are they prepared as the model wants them?" in " ".join(out.split())
    assert "only the first entry of each batch" in " ".join(out.split())


MISTAKES = [
    ("models:build", ("--calibration", "empty"), "there are no images in the folder empty"),
    ("models:build", ("--calibration", "broken"), "bad.png cannot be read as an image"),
    ("models:build", ("--calibration", "one"), "one holds 1 images, and one batch of the example inputs has 2"),
    ("models:silent", ("--calibration", "photos"), "models:silent does not say how images are prepared for it: pass --preprocess"),
    ("models:build", ("--calibration", "photos", "--preprocess", "imagnet"), "did you mean 'imagenet'"),
    ("models:two", ("--calibration", "photos"), "images are for a model that takes one image"),
    ("models:build", ("--calibration", "lines.txt"), "texts need the tokenizer of a Hugging Face folder"),
    ("models:build", ("--preprocess", "unit", "--allow-random-calibration"), "--preprocess is about --calibration"),
]


@pytest.mark.parametrize(("source", "arguments", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else None)
def test_mistakes_are_one_line(run: Run, source: str, arguments: tuple[str, ...], message: str) -> None:
    pictures(Path("photos"))
    pictures(Path("one"), 1)
    Path("empty").mkdir()
    Path("broken").mkdir()
    for i in range(2):
        (Path("broken") / f"{i}bad.png").write_text("hello")
    Path("lines.txt").write_text("one\ntwo\n")
    code, out, err = run("verify", source, *Q[2:], *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog sat on mat".split()
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_texts_go_through_the_tokenizer(run: Run, bert: Path) -> None:
    Path("lines.txt").write_text("the cat sat on the mat\na dog\n\nthe dog sat\nthe cat\nmat\n")
    static = ("--quantize", "w8a8,static,prefer=size", "--batch", "2", "--seq", "6")
    code, out, err = run("verify", f"hf:{bert}", *static, "--calibration", "lines.txt")
    assert code == 0, err
    assert "on 4 samples of lines.txt" in " ".join(out.split())
    Path("lines.jsonl").write_text('{"text": "the cat"}\n{"text": "a dog"}\n')
    code, out, err = run("verify", f"hf:{bert}", *static, "--calibration", "lines.jsonl")
    assert code == 0, err
    assert "on 2 samples of lines.jsonl" in " ".join(out.split())
    Path("broken.jsonl").write_text('{"words": "the cat"}\n')
    code, _, err = run("verify", f"hf:{bert}", *static, "--calibration", "broken.jsonl")
    assert code == 2
    assert "with the entry 'text'" in err


def data_set(columns: dict[str, Any], **features: object) -> Any:
    """A data set whose fingerprint is stated: what computes one pickles all of pyarrow, which not every release of it survives."""
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    inferred = datasets.Features.from_arrow_schema(arrow.table(columns).schema) | features
    table = arrow.table(columns).cast(datasets.Features(inferred).arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(inferred)), fingerprint="stated")


def test_data_sets_on_disk(run: Run, bert: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures(Path("photos"), 8)
    images = [{"bytes": f.read_bytes(), "path": f.name} for f in sorted(Path("photos").rglob("*.png"))]
    classes = datasets.ClassLabel(names=["cat", "dog"])
    split = [data_set({"image": images[i : i + 4], "label": [0, 1, 0, 1]}, image=datasets.Image(), label=classes) for i in (0, 4)]
    datasets.DatasetDict({"train": split[0], "validation": split[1]}).save_to_disk("pictures")
    code, out, err = run(*Q, "--calibration", "pictures")
    assert code == 0, err
    assert "on 4 samples of pictures" in " ".join(out.split())
    data_set({"text": ["the cat", "a dog", "the dog sat"]}).save_to_disk("lines")
    code, out, err = run("verify", f"hf:{bert}", *Q[2:], "--batch", "2", "--seq", "6", "--calibration", "lines")
    assert code == 0, err
    data_set({"input": np.random.default_rng(0).standard_normal((5, 3, 8, 8)).tolist()}).save_to_disk("arrays")
    code, out, err = run(*Q, "--calibration", "arrays")
    assert code == 0, err
    assert "on 4 samples of arrays" in " ".join(out.split())
    data_set({"other": [1, 2]}).save_to_disk("other")
    code, _, err = run(*Q, "--calibration", "other")
    assert code == 2
    assert "other holds other; expected an image, a text, or the model's inputs input" in err


def test_a_data_set_without_the_library_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    Path("set").mkdir()
    (Path("set") / "state.json").write_text("{}")
    code, _, err = run(*Q, "--calibration", "set")
    assert code == 2
    assert "datasets" in err
