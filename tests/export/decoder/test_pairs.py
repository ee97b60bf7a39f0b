"""Encoders and decoders: what is captured and refused, the two files, and that other readers write the same tokens."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

import normfuse
from normfuse import native
from normfuse.app.language.pair_generation import PairWriter, samples_in
from normfuse.errors import CaptureError, ExportError, UsageError
from normfuse.export.decoder.encdec import TextDecoder, encoder_decoder, states_of
from normfuse.export.decoder.encdec_proof import prove_pair
from normfuse.export.decoder.encdec_session import files_in
from normfuse.export.decoder.operator import cross_attention
from tests.cli_runner import Run, runner
from tests.export.decoder.models import VOCABULARY, prompts, tokenizer
from tests.export.decoder.pairs import SPEECH_KIND, TEXT_KINDS, tiny_pair, written
from tests.export.decoder.readers import genai_writes

_FRAMES = {"max_source_positions": 1500}  # genai takes 30 seconds alone, 3000 frames


def _folder(model: Any, folder: Path, **options: Any) -> Any:
    return normfuse.export.to_decoder(model, folder, threads=1, verify="off", **options)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "t5"
    made = _folder(tiny_pair("t5"), folder, tokenizer=tokenizer(), proof_tokens=12)
    assert made.proof.error < 1e-5
    assert made.proof.bindings == ("growing", "chunks", "right")
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "whisper"
    made = _folder(tiny_pair(SPEECH_KIND, **_FRAMES), folder, proof_tokens=12)
    assert made.proof.error < 1e-5
    assert made.proof.bindings == ("growing", "shared", "chunks", "batch")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with runner("nothing", "", tmp_path, monkeypatch, capsys) as run:
        yield run


# -- what is captured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_states_is_pytorchs(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) for n in (4, 6, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 0, 1, 0, 0]]) if masked else None
    seen = None if mask is None else mask[:, None, None] == 1
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=0.3)
    no = torch.tensor([False])
    found, *kept = cross_attention(query, key, value, None, None, None, mask, 0.3)
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-6)
    assert torch.equal(kept[0], key)
    again, *nothing = cross_attention(query, key + 1, value - 1, key, value, ~no, mask, 0.3)
    assert torch.equal(again, found)
    assert nothing[1].shape == (2, 3, 0, 8)
    first, *_ = cross_attention(query, key, value, key + 1, value - 1, no, mask, 0.3)
    assert torch.equal(first, found)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_steps_say_what_the_whole_says(kind: str) -> None:
    model = tiny_pair(kind)
    found = encoder_decoder(model)
    assert len(found.sites) == 3
    assert found.masked
    decoder = TextDecoder(model, found)
    source, mask = torch.randint(3, VOCABULARY, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    heads, width = found.cross
    pasts = [torch.zeros(2, heads, 0, width) for _ in range(12)]
    out = []
    with torch.no_grad():
        wanted = model(input_ids=source, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits
        hidden = states_of(model, source, mask)
        for start, end in ((0, 6), (6, 7), (7, 12)):
            logits, *presents = decoder(mask, ids[:, start:end], hidden, pasts, torch.tensor([start > 0]))
            pasts = [new if start == 0 or i % 4 < 2 else old for i, (new, old) in enumerate(zip(presents, pasts, strict=True))]
            out.append(logits)
    assert torch.allclose(torch.cat(out, 1), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_what_t5_adds_to_its_scores_is_a_table_by_distance() -> None:
    model: Any = tiny_pair("t5")
    tables = encoder_decoder(model).distances
    assert all(table is tables[0] for table in tables)
    wanted = model.decoder.block[0].layer[0].SelfAttention.compute_bias(300, 300)[0]
    table = tables[0]
    assert table is not None
    back = torch.arange(300)[:, None] - torch.arange(300)
    assert torch.equal(table[:, back.clamp(min=0)].tril(), wanted.tril())
    assert len({id(t) for t in encoder_decoder(tiny_pair("umt5")).distances}) == 3  # each layer has its own


def test_what_no_distance_tells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = transformers.models.t5.modeling_t5.T5Attention
    before = attention.compute_bias

    def odd(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found = before(self, *arguments, **keywords)
        return found + torch.arange(found.shape[3]) if self.is_decoder else found

    monkeypatch.setattr(attention, "compute_bias", odd)
    with pytest.raises(CaptureError, match=r"decoder\.block\.0 adds to its scores what no distance tells"):
        encoder_decoder(tiny_pair("t5"))


_HALVES = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "sizes", "error", "said"),
    [
        ("led", {**_HALVES, "attention_window": 8}, CaptureError, r"led\.decoder\.layers\.0\.self_attn \(LEDDecoderAttention\)"),
        ("prophetnet", {"hidden_size": 64, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
                        "num_encoder_layers": 1, "num_decoder_layers": 1}, CaptureError, r"prophetnet\.decoder\.layers\.0"),
        ("speech_to_text", _HALVES, UsageError, "only those of Whisper"),
        ("m2m_100", _HALVES, CaptureError, r"embed_positions \(M2M100SinusoidalPositionalEmbedding\) makes a longer table"),
    ],
)  # fmt: skip
def test_others_are_refused(kind: str, sizes: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        encoder_decoder(tiny_pair(kind, **sizes))


def test_arguments_that_are_wrong(tmp_path: Path) -> None:
    for kind, options, said in (
        ("t5", {"last_logits": True}, "starts with a token"), ("t5", {"max_length": 9000}, "2048 positions"),
        (SPEECH_KIND, {"prompts": [[1, 2]]}, "reads speech"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            _folder(tiny_pair(kind), tmp_path / "out", **options)
    model = tiny_pair("t5", decoder_start_token_id=None, bos_token_id=None)
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        _folder(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- the files -------------------------------------------------------------------------------------------------------------


def test_names_as_optimum_has_them(t5: Path) -> None:
    assert {p.name for p in t5.iterdir()} == {
        "config.json", "decoder_model_merged.onnx", "encoder_model.onnx", "generation_config.json", "normfuse.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    encoder, decoder = (onnx.load(t5 / f"{name}.onnx") for name in ("encoder_model", "decoder_model_merged"))

    def shown(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    sizes = ["batch_size", "encoder_sequence_length"]
    assert shown(encoder.graph.input) == {"input_ids": sizes, "attention_mask": sizes}
    assert shown(encoder.graph.output) == {"last_hidden_state": ["batch_size", "encoder_sequence_length", 64]}
    inputs, outputs = shown(decoder.graph.input), shown(decoder.graph.output)
    caches = [f"{i}.{part}.{kind}" for i in range(3) for part in ("decoder", "encoder") for kind in ("key", "value")]
    first = ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    assert list(inputs) == [*first, *(f"past_key_values.{name}" for name in caches), "use_cache_branch"]
    assert list(outputs) == ["logits", *(f"present.{name}" for name in caches)]
    assert inputs["past_key_values.2.decoder.key"] == ["batch_size", 4, "past_decoder_sequence_length", 16]
    assert outputs["present.2.encoder.value"] == ["batch_size", 4, "present_encoder_sequence_length", 16]
    onnx.checker.check_model(encoder)


def test_later_steps_do_not_make_keys_of_the_states(t5: Path) -> None:
    graph = onnx.load(t5 / "decoder_model_merged.onnx").graph
    choices = [node for node in graph.node if node.op_type == "If"]
    assert len(choices) == 3
    for choice in choices:
        branches = {a.name: [node.op_type for node in a.g.node] for a in choice.attribute}
        assert branches["then_branch"].count("MatMul") == 0
        assert branches["else_branch"].count("MatMul") == 2
    outside = sum(node.op_type == "MatMul" for node in graph.node)
    assert outside == 3 * (4 + 2 + 2) + 1  # own attention, the rest of that to the states, two of the network; the head


def test_a_wrong_pair_is_found(t5: Path) -> None:
    model: Any = tiny_pair("t5")
    with torch.no_grad():
        model.decoder.block[1].layer[0].SelfAttention.k.weight[:4] *= 1.5
    files = files_in(t5)
    assert files is not None
    with pytest.raises(ExportError, match=r"binding 'growing', source 1, token \d+: .* keys of layer 1 of the decoder"):
        prove_pair(files, model, list(prompts(9)), [0], tokens=24, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gqa", "portable"])
@pytest.mark.parametrize("kind", [*TEXT_KINDS, SPEECH_KIND])
def test_every_kind(kind: str, form: str, tmp_path: Path) -> None:
    """The proof is part of the export."""
    made = _folder(tiny_pair(kind), tmp_path / kind, attention=form, proof_tokens=24)
    assert made.proof.error < 1e-4
    assert made.proof.ties == 0


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the kernels are not built")
@pytest.mark.parametrize("kind", ["t5", SPEECH_KIND])
@pytest.mark.parametrize(("words", "least"), [("w8a8", 30), ("w4a8", 8), ("w4", 8)])
def test_quantized_pairs(kind: str, words: str, least: float, tmp_path: Path) -> None:
    bits = {"w8a8": (8, 8), "w4a8": (4, 8)}
    how: Any = normfuse.ShiftQuant(*bits[words], prefer="size") if words in bits else words
    made = _folder(tiny_pair(kind), tmp_path / "out", quantize=how, proof_tokens=24)
    assert made.proof.sqnr > least
    assert (words == "w4") == (not list(made.path.glob("libnormfuse*")))


# -- text ------------------------------------------------------------------------------------------------------------------


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_text_of_text(t5: Path, run: Run, tmp_path: Path) -> None:
    words, model = tokenizer(), tiny_pair("t5")
    ids = torch.tensor([words("Hello there")["input_ids"]])
    (wanted,) = written(model, 20, [0], input_ids=ids, attention_mask=torch.ones_like(ids))
    listed = ",".join(map(str, ids[0].tolist()))
    before_end = wanted[: wanted.index(2)] if 2 in wanted else wanted
    said = " ".join(map(str, before_end)) + " \n" if before_end else "\n"
    assert run("generate", str(t5), "--ids", listed, "--tokens", "20", "-q") == (0, said, "")
    code, out, err = run("generate", str(t5), "--prompt", "Hello there", "--tokens", "20")
    assert (code, out) == (0, words.decode(before_end, skip_special_tokens=True) + "\n")
    assert err.startswith("prompt 11 tokens")
    for arguments, told in (
        (("--prompt", ""), "empty"), (("--ids", "900"), "token 900"), (("--audio", "x.wav"), "reads text"),
        (("--prompt", "a", "--ids", "1"), "pass --prompt TEXT"),
    ):  # fmt: skip
        code, _, err = run("generate", str(t5), *arguments)
        assert (code, told in err) == (2, True), err
    shutil.copytree(t5, tmp_path / "broken")
    (tmp_path / "broken" / "normfuse.json").write_text("{}")
    assert run("generate", str(tmp_path / "broken"), "--prompt", "a")[0] == 2


def test_tokens_that_a_model_is_told_to_write(t5: Path, tmp_path: Path) -> None:
    shutil.copytree(t5, tmp_path / "told")
    file = tmp_path / "told" / "generation_config.json"
    free = list(PairWriter(t5, threads=1).tokens([5, 6, 7], 3))
    held = json.loads(file.read_text()) | {"forced_bos_token_id": 9, "bad_words_ids": [[free[0]], [8, 9]], "suppress_tokens": [11]}
    file.write_text(json.dumps(held))
    writer = PairWriter(tmp_path / "told", threads=1)
    assert writer.never == [11, free[0]]
    found = list(writer.tokens([5, 6, 7], 6))
    assert found[0] == 9
    assert free[0] not in found[1:]


@pytest.mark.slow
def test_from_the_command_line(run: Run, tmp_path: Path) -> None:
    source = _saved(tiny_pair("bart"), tmp_path / "hf")
    arguments = ("export", f"hf:{source}", "-o", "out", "--with-past", "--proof-tokens", "8", "--verify", "off")
    code, out, _ = run(*arguments)
    assert (code, "8 greedy tokens after 3 prompts" in out) == (0, True)
    code, _, err = run(*arguments)
    assert (code, "--force" in err) == (2, True)
    assert run(*arguments, "--force", "-q")[0] == 0
    code, _, err = run("export", f"hf:{source}", "-o", "other", "--with-past", "--last-logits")
    assert (code, "leave it out" in err) == (2, True)
    assert not (tmp_path / "other").exists()


# -- speech ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_genai_writes_the_same(whisper: Path) -> None:
    model, head = tiny_pair(SPEECH_KIND, **_FRAMES), [0, 5, 7]
    features = np.random.default_rng(0).standard_normal((2, 80, 3000)).astype(np.float32)
    wanted = written(model, 16, head, input_features=torch.from_numpy(features))
    for share in (True, False):
        for rows in (1, 2):
            found = genai_writes(whisper, features[:rows], head, 16, past_present_share_buffer=share)
            assert found == wanted[:rows]


def test_recordings(tmp_path: Path) -> None:
    samples = (0.5 * np.sin(np.arange(1600) * 0.3)).astype(np.float32)
    np.save(tmp_path / "a.npy", samples)
    assert np.array_equal(samples_in(tmp_path / "a.npy"), samples)

    def saved(name: str, values: Any, channels: int = 1, rate: int = 16000) -> Path:
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((channels, values.itemsize, rate, 0, "NONE", ""))
            file.writeframes(values.tobytes())
        return tmp_path / name

    coded = (samples * 32767).astype(np.int16)
    assert np.allclose(samples_in(saved("a.wav", coded)), samples, atol=1e-4)
    assert np.allclose(samples_in(saved("b.wav", np.stack([coded, coded], 1), 2)), samples, atol=1e-4)
    assert np.allclose(samples_in(saved("c.wav", (samples * 127 + 128).astype(np.uint8))), samples, atol=2e-2)
    (tmp_path / "d.wav").write_text("no")
    np.save(tmp_path / "e.npy", np.zeros((2, 2)))
    np.save(tmp_path / "f.npy", np.zeros(31 * 16000))
    for file, said in (
        (saved("g.wav", coded, rate=8000), "8000 samples"), (tmp_path / "d.wav", "no recording"),
        (tmp_path / "e.npy", r"shape \(2, 2\)"), (tmp_path / "f.npy", "31 seconds"), (tmp_path / "h.wav", "no recording"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            samples_in(file)


@pytest.mark.slow
def test_text_of_a_recording(tmp_path: Path, run: Run) -> None:
    model: Any = tiny_pair(SPEECH_KIND, max_source_positions=1500)
    model.generation_config.lang_to_id, model.generation_config.task_to_id = {"<|en|>": 5, "<|de|>": 6}, {"transcribe": 7}
    model.generation_config.no_timestamps_token_id = 8
    folder = tmp_path / "out"
    _folder(model, folder, proof_tokens=4)
    samples = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    np.save(tmp_path / "a.npy", samples)
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    features = extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    (wanted,) = written(model, 12, [0, 6, 7, 8], input_features=features)
    wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
    code, out, _ = run("generate", str(folder), "--audio", str(tmp_path / "a.npy"), "--language", "de", "--tokens", "12", "-q")
    assert (code, out.split()) == (0, [str(token) for token in wanted])
    code, _, err = run("generate", str(folder), "--audio", str(tmp_path / "a.npy"), "--language", "xx")
    assert (code, "the model knows de, en" in err) == (2, True)
    code, _, err = run("generate", str(folder), "--ids", "1,2")
    assert (code, "pass --audio" in err) == (2, True)
