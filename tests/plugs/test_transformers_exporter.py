"""normfuse as a backend of transformers.exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse.errors import UsageError
from tests.zoo_entry import randomise_norms

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.exporters.auto", reason="this transformers has no exporters")
pytest.importorskip("onnxscript")

from normfuse.plugs import transformers_exporter as plug  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def encoder() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16))
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    return randomise_norms(model).eval(), {"input_ids": ids, "attention_mask": mask}


def vision() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3))
    return randomise_norms(model).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}


def test_it_is_found_by_its_name() -> None:
    auto = transformers.exporters.AutoHfExporter
    assert type(auto.from_config({"export_format": "normfuse"})) is plug.NormfuseExporter


def test_the_export_answers_as_the_model_and_comes_back(tmp_path: Path) -> None:
    from transformers.exporters.base import ExportedModel

    model, inputs = vision()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    exported = plug.NormfuseExporter().export(model, inputs, {})
    wanted = model(**inputs)
    found = exported(**inputs)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plug.reports()[-1].norms_after["rms_norm"] == 5
    exported.save_pretrained(tmp_path)
    again = ExportedModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, found.logits, rtol=0, atol=0)


@pytest.mark.slow
def test_sizes_that_vary_and_a_padding_mask() -> None:
    model, inputs = encoder()
    exported = plug.NormfuseExporter().export(model, inputs, plug.NormfuseConfig(dynamic=True))
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    for call in (inputs, {"input_ids": ids, "attention_mask": mask}):
        wanted, found = model(**call), exported(**call)
        torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["auto", "integer"])
def test_quantized_layers_run(form: Any) -> None:
    model, inputs = vision()
    exported = plug.NormfuseExporter().export(model, inputs, {"quantize": "w8a8,prefer=size", "form": form})
    with torch.inference_mode():
        wanted, found = model(**inputs).logits, exported(**inputs).logits
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantizer": object()}, "pass quantize="),
        ({"target": "openvino"}, "this backend runs in ONNX Runtime"),
        ({"opset": 99}, "opset 99 is not supported"),
        ({"dtype": "fp17"}, "unknown dtype 'fp17'"),
        ({"passes": ("afine",)}, "afine"),
    ],
)
def test_mistakes_are_said(given: dict[str, Any], message: str) -> None:
    model, inputs = vision()
    with pytest.raises(UsageError, match=message):
        plug.NormfuseExporter().export(model, inputs, given)


def test_a_cache_is_sent_elsewhere() -> None:
    model, inputs = vision()
    with pytest.raises(UsageError, match=r"past is a cache, .* --with-past"):
        plug.NormfuseExporter().export(model, {**inputs, "past": transformers.DynamicCache()}, {})
