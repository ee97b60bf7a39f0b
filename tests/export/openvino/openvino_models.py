"""Small models of real architectures, and files of them in OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse.export import to_openvino
from normfuse.export.openvino.result import OpenVinoExported
from normfuse.export.openvino.runtime import opened
from tests.zoo_entry import randomise_norms

STATIC = normfuse.ShiftQuant(weight_bits=8, groups=1, activations="static", prefer="size", rounding="nearest")


def vit() -> tuple[nn.Module, Any]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)
    return randomise_norms(model.eval()), (torch.randn(2, 3, 64, 64),)


def resnet() -> tuple[nn.Module, Any]:
    import timm

    torch.manual_seed(0)
    return randomise_norms(timm.create_model("resnet18", num_classes=10).eval()), (torch.randn(1, 3, 64, 64),)


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    ids = torch.arange(24).reshape(2, 12) % 50
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return randomise_norms(BertModel(config).eval()), {"input_ids": ids, "attention_mask": mask}


def llama() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
        use_cache=False,
    )  # fmt: skip
    return randomise_norms(LlamaModel(config).eval()), {"input_ids": torch.arange(12).reshape(1, 12)}


MODELS = {"vit": vit, "resnet": resnet, "bert": bert, "llama": llama}


def written(gm: nn.Module, folder: Path, **options: Any) -> OpenVinoExported:
    return to_openvino(gm, folder / "model.xml", threads=1, progress=False, **options)


def outputs(path: Path, **feeds: Tensor) -> dict[str, Tensor]:
    return opened(path, threads=1).outputs(feeds)
