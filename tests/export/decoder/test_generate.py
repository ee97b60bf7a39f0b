"""The command line: a Hugging Face folder in, text out; and what it says of what does not fit."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers

from normfuse.app.generation import Sampling
from tests.cli_runner import Run, runner
from tests.export.decoder.models import greedy, tiny, tokenizer


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with runner("nothing", "", tmp_path, monkeypatch, capsys) as run:
        yield run


@pytest.fixture(scope="module")
def folder(hf_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from normfuse.cli import main

    made = tmp_path_factory.mktemp("generate") / "out"
    arguments = ("--with-past", "--last-logits", "--proof-tokens", "8", "-q")
    assert main(("export", f"hf:{hf_llama}", "-o", str(made), *arguments)) == 0
    return made


def test_text_is_the_models(folder: Path, run: Run) -> None:
    words = tokenizer()
    wanted = greedy(tiny("llama"), [words("Hello there")["input_ids"]], 20)[0]
    code, out, err = run("generate", str(folder), "--prompt", "Hello there", "--tokens", "20")
    assert code == 0
    assert out == words.decode(wanted) + "\n"
    assert err.startswith("prompt 11 tokens")
    assert "written 20 tokens" in err
    ids = ",".join(map(str, words("Hello there")["input_ids"]))
    assert run("generate", str(folder), "--ids", ids, "--tokens", "20", "-q") == (0, " ".join(map(str, wanted)) + " \n", "")


def test_draws_repeat_with_their_seed(folder: Path, run: Run) -> None:
    def drawn(seed: int) -> str:
        code, out, _ = run("generate", str(folder), "--prompt", "Hi", "--temperature", "2", "--seed", str(seed), "--json")
        assert code == 0
        return str(json.loads(out)["text"])

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_draws_follow_the_logits() -> None:
    logits, generator = np.log(np.array([0.1, 0.6, 0.05, 0.25])), np.random.default_rng(0)
    drawn = [Sampling(1.0).choose(logits, generator) for _ in range(2000)]
    assert np.allclose(np.bincount(drawn) / 2000, [0.1, 0.6, 0.05, 0.25], atol=0.04)
    assert {Sampling(1.0, top_p=0.8).choose(logits, generator) for _ in range(200)} == {1, 3}
    assert {Sampling(1.0, top_k=1).choose(logits, generator) for _ in range(50)} == {1}
    assert Sampling().choose(logits, generator) == 1


def test_prompts_that_do_not_fit(folder: Path, run: Run, tmp_path: Path) -> None:
    for arguments, said in (
        ((str(folder),), "pass --prompt TEXT"), ((str(folder), "--prompt", ""), "empty"),
        ((str(folder), "--prompt", "a" * 300), "256 positions"),
        ((str(folder), "--ids", "1,x"), "expected numbers"), ((str(folder), "--ids", "900"), "token 900"),
        ((str(folder), "--prompt", "a", "--top-p", "2"), "--top-p 2"),
        ((str(tmp_path / "no"), "--prompt", "a"), "no folder of a decoder"),
    ):  # fmt: skip
        code, _, err = run("generate", *arguments)
        assert (code, said in err) == (2, True), err
    shutil.copytree(folder, tmp_path / "broken")
    for content in ('{"model": {}}', '{"model": {"context_length": 256, "eos_token_id": "end", "decoder": {}}}'):
        (tmp_path / "broken" / "genai_config.json").write_text(content)
        code, _, err = run("generate", str(tmp_path / "broken"), "--prompt", "a")
        assert (code, "genai_config.json is broken" in err) == (2, True), err


def test_a_file_that_is_no_decoder(folder: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "other", [x], [y])
    onnx.save(
        onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "other/model.onnx"
    )
    code, _, err = run("generate", str(tmp_path / "other"), "--prompt", "a")
    assert (code, "is no decoder" in err) == (2, True)
    (tmp_path / "other" / "normfuse.json").write_text('{"runtime": "9.0"}')
    code, _, err = run("generate", str(tmp_path / "other"), "--prompt", "a")
    assert (code, "needs ONNX Runtime 9.0" in err) == (2, True)


def test_sources_that_do_not_fit(hf_llama: Path, run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tiny("llama").save_pretrained(bare)  # type: ignore[operator]
    encoder = tmp_path / "bert"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(encoder)
    before = sorted(p.name for p in tmp_path.iterdir())
    for source, arguments, said in (
        (f"hf:{bare}", (), "no tokenizer"), (f"hf:{encoder}", ("--no-tokenizer",), "causal language model"),
        (f"hf:{hf_llama}", ("--max-length", "300"), "--max-length"), (f"hf:{hf_llama}", ("--int4",), "--int4"),
        (f"hf:{hf_llama}", ("--target", "tensorrt"), "--target"), (f"hf:{hf_llama}", ("--quantize", "int3"), "w3a8"),
        ("timm:resnet18", (), "hf:DIR"), (f"hf:{tmp_path / 'no'}", (), "config.json"),
    ):  # fmt: skip
        code, _, err = run("export", source, "-o", "out", "--with-past", *arguments)
        assert (code, said in err) == (2, True), err
        assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    code, _, err = run("export", f"hf:{hf_llama}", "-o", "x.onnx", "--last-logits")
    assert (code, "--with-past" in err) == (2, True)


def test_a_full_disk_leaves_nothing(hf_llama: Path, run: Run, tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # bytes of a file; the model has 450,000
    try:
        code, _, err = run("export", f"hf:{hf_llama}", "-o", "out", "--with-past", "--verify", "off")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "cannot write out" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
