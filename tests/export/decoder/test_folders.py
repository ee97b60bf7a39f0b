"""Folders of tiny models: what they hold, that a wrong one is found, and that other readers write the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import normfuse
from normfuse import native
from normfuse.app.generation import Writer
from normfuse.errors import ExportError, UsageError
from normfuse.export.decoder import proof
from normfuse.export.decoder.layout import cache_names
from normfuse.export.decoder.proof import prove
from tests.export.decoder.models import KINDS, VOCABULARY, greedy, prompts, tiny, tokenizer
from tests.export.decoder.readers import genai_tokens

built = pytest.mark.skipif(not native.available(), reason="the kernels are not built")


def _written(model: Any, folder: Path, **options: Any) -> Any:
    return normfuse.export.to_decoder(model, folder, threads=1, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "llama"
    made = _written(tiny("llama"), folder, tokenizer=tokenizer(), proof_tokens=12, max_length=100)
    assert made.proof.error < 1e-5
    assert made.proof.bindings == ("growing", "shared", "chunks", "left", "right")
    assert made.rotated == 2
    assert str(made).count("\n") == 5
    return folder


def test_what_stands_in_a_folder(llama: Path) -> None:
    names = {p.name for p in llama.iterdir()}
    assert names == {
        "config.json", "genai_config.json", "generation_config.json", "model.onnx", "normfuse.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((llama / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    genai = json.loads((llama / "genai_config.json").read_text())
    assert genai["search"]["max_length"] == 100
    assert genai["search"]["past_present_share_buffer"]
    model = genai["model"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("decoder", 256, VOCABULARY)
    assert (model["pad_token_id"], model["eos_token_id"], model["bos_token_id"]) == (0, 2, 1)
    assert (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"]) == (2, 16)
    assert json.loads((llama / "normfuse.json").read_text())["runtime"] == "1.23"


def test_names_order_and_sizes_of_the_file(llama: Path) -> None:
    graph = onnx.load(llama / "model.onnx").graph

    def shown(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    inputs, outputs = shown(graph.input), shown(graph.output)
    assert list(inputs) == ["input_ids", "attention_mask", *cache_names(2, "past_key_values")]
    assert list(outputs) == ["logits", *cache_names(2, "present")]
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert outputs["present.1.value"] == ["batch_size", 2, "present_sequence_length", 16]
    assert outputs["logits"] == ["batch_size", "sequence_length", VOCABULARY]
    assert {v.type.tensor_type.elem_type for v in (*graph.input[:2],)} == {onnx.TensorProto.INT64}
    ops = [node.op_type for node in graph.node]
    assert ops.count("GroupQueryAttention") == 2
    assert "Transpose" not in ops
    assert "CumSum" not in ops


@pytest.mark.parametrize("share", [True, False])
def test_genai_writes_the_same(llama: Path, share: bool) -> None:
    model, two, more = tiny("llama"), prompts(17, 9), prompts(6)[0]
    wanted = greedy(model, two, 16)
    assert genai_tokens(llama, two[:1], 16, past_present_share_buffer=share) == wanted[:1]
    assert genai_tokens(llama, two, 16, past_present_share_buffer=share) == wanted
    assert genai_tokens(llama, two[:1], 16, past_present_share_buffer=share, chunk_size=5) == wanted[:1]
    head = [*wanted[0][:8], *more]
    continued = genai_tokens(llama, two[:1], 16, more=more, past_present_share_buffer=share)
    assert continued == [head + greedy(model, [two[0] + head], 8)[0]]


def test_a_wrong_file_is_found(llama: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[:4] *= 1.5  # type: ignore[union-attr, index, operator]
    with pytest.raises(ExportError, match=r"binding 'growing', prompt 1, token \d+: .* it starts at the keys of layer 1"):
        prove(llama / "model.onnx", model, prompts(9), tokens=24, threads=1)


def test_a_wrong_folder_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = proof._followed

    def late(cache: Any, first: Any, tokens: Any) -> Any:
        cache.mask[:, :1] = 0  # as if the first token were padding
        return followed(cache, first, tokens)

    monkeypatch.setattr(proof, "_followed", late)
    with pytest.raises(ExportError, match="token 2"):
        _written(tiny("llama", num_hidden_layers=1), tmp_path / "out", proof_tokens=8, verify="off")
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_wrong(tmp_path: Path) -> None:
    model = tiny("llama")
    for options, said in (
        ({"max_length": 300}, "256 positions"), ({"attention": "flash"}, "gqa, portable, native"),
        ({"padding": "no"}, "both or right"),
        ({"quantize": "q4"}, "did you mean w4a8"), ({"proof_tokens": -1}, "0 or more"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            _written(model, tmp_path / "out", **options)
    with pytest.raises(TypeError, match=r"to_decoder\(\) got an unexpected keyword argument 'pading'; did you mean 'padding'"):
        _written(model, tmp_path / "out", pading="right")
    with pytest.raises(UsageError, match="training mode"):
        _written(tiny("llama").train(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@built
@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_attention_of_our_kernels(kind: str, tmp_path: Path) -> None:
    """Windows, caps and rotations in it; queries, keys and values of one projection are read where they lie."""
    made = _written(tiny(kind), tmp_path / kind, attention="native", proof_tokens=8, verify="off")
    assert made.proof.error < 1e-5
    assert (made.attention, made.rotated) == ("native", 0 if kind == "gpt2" else 2)
    assert len(list(made.path.glob("libnormfuse*"))) == 1
    nodes = [node for node in onnx.load(made.path / "model.onnx").graph.node if node.op_type.startswith("CachedAttention")]
    assert len(nodes) == 2
    assert all((node.input[0] == node.input[1]) == (kind == "gpt2") for node in nodes)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gqa", "portable", pytest.param("native", marks=built)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, form: str, tmp_path: Path) -> None:
    """The proof is part of the export; genai reads what no part of ours does."""
    made = _written(tiny(kind), tmp_path / kind, attention=form, proof_tokens=24, last_logits=form != "portable")
    assert made.proof.error < 1e-4
    assert made.proof.ties == 0
    two = prompts(17, 9)
    wanted = greedy(tiny(kind), two, 16)
    for share in (True, False):
        assert genai_tokens(made.path, two, 16, past_present_share_buffer=share) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("words", ["w4", "w8"])
def test_blocks_agree_in_all_bindings(words: str, tmp_path: Path) -> None:
    made = _written(tiny("llama", initializer_range=0.05), tmp_path / "out", quantize=words, proof_tokens=24)
    assert made.proof.sqnr > {"w4": 10, "w8": 30}[words]
    ops = [node.op_type for node in onnx.load(made.path / "model.onnx").graph.node]
    assert ops.count("MatMulNBits") == 15
    assert "MatMul" not in ops


@pytest.mark.slow
@built
def test_layers_of_our_kernels_run_in_genai(tmp_path: Path) -> None:
    model, spec = tiny("llama", initializer_range=0.05), normfuse.ShiftQuant(weight_bits=8, activation_bits=8, prefer="size")
    made = _written(model, tmp_path / "out", quantize=spec, proof_tokens=24)
    assert made.proof.sqnr > 25
    assert made.quantized == "W8A8 in 17 of 17 layers (native)"
    (library,) = made.path.glob("libnormfuse*")
    config = json.loads((made.path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == library.name
    own = [list(Writer(made.path, threads=1).tokens(row, 12)) for row in prompts(17)]
    for share in (True, False):
        assert genai_tokens(made.path, prompts(17), 12, past_present_share_buffer=share) == own


@pytest.mark.slow
def test_halves_are_written_in_float32(tmp_path: Path) -> None:
    made = _written(tiny("llama").to(torch.bfloat16), tmp_path / "out", proof_tokens=8)
    assert made.notes[0].startswith("the model is in bfloat16")


@pytest.mark.slow
def test_padding_on_the_right_alone(tmp_path: Path) -> None:
    made = _written(tiny("llama"), tmp_path / "out", proof_tokens=8, padding="right")
    assert "left" not in made.proof.bindings
    assert "Expand" not in [node.op_type for node in onnx.load(made.path / "model.onnx").graph.node]


def test_gains_stay_apart_from_weights_in_blocks(tmp_path: Path) -> None:
    """A gain in a weight would spread what shares a scale."""
    model = tiny("llama")
    for p in model.parameters():
        if p.ndim == 1:
            p.data.uniform_(0.2, 5.0)
    gains = {p.detach().numpy().tobytes() for name, p in model.named_parameters() if "layernorm" in name}
    _written(model, tmp_path / "llama", quantize="w4", proof_tokens=4)
    kept = {onnx.numpy_helper.to_array(t).tobytes() for t in onnx.load(tmp_path / "llama" / "model.onnx").graph.initializer}
    assert len(gains) == 4
    assert gains <= kept
