"""Latency of whole models in half precision: as they are, compiled, optimized, and with normfuse's kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from benchmarks.gpu.asked import Asked
from benchmarks.gpu.clock import DEVICE, compare
from normfuse.app.cuda import on_device, to_device
from normfuse.app.random_norms import randomise_norms
from normfuse.errors import NormfuseError
from normfuse.export.kernels import KERNELS, with_kernels

__all__ = ["measure"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NORMS = tuple(k for k in KERNELS if k != "rms_norm_linear")

Given = tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]


def measure(asked: Asked) -> list[dict[str, Any]]:
    """One row a model and dtype."""
    from benchmarks.gpu.tables import model_line

    rows = []
    for name, build, dtypes in _models(asked.quick):
        for dtype in dtypes:
            if asked.late(f"{name}, {dtype}"):
                continue
            try:
                torch.manual_seed(0)
                rows.append({"name": name, "dtype": dtype, **_row(build(), DTYPES[dtype], 4 * asked.seconds)})
            except (NormfuseError, ImportError, RuntimeError) as e:  # one model that does not fit is not the end
                rows.append({"name": name, "dtype": dtype, "timings": {}, "failed": {"all": " ".join(str(e).split())[:300]}})
            asked.keep(rows[-1])
            print(model_line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    return rows


def _models(quick: bool) -> Iterator[tuple[str, Callable[[], Given], tuple[str, ...]]]:
    yield "vit_base_patch16_224, 8 images", lambda: _vit(8), ("fp16",)
    if not quick:
        yield "Llama, 12 layers of 1024, 512 tokens", lambda: _llama(512), ("bf16",)
        yield "GPT-2 small, 512 tokens", lambda: _gpt2(512), ("fp16",)
        yield "vit_base_patch16_224, 1 image", lambda: _vit(1), ("fp16", "bf16")


def _vit(batch: int) -> Given:
    import timm

    return timm.create_model("vit_base_patch16_224"), (torch.randn(batch, 3, 224, 224),)


def _gpt2(tokens: int) -> Given:
    import transformers

    config = transformers.GPT2Config(use_cache=False)
    return transformers.GPT2LMHeadModel(config), _ids(tokens)


def _llama(tokens: int) -> Given:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), _ids(tokens)


def _ids(tokens: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 1000, (1, tokens)), "use_cache": False, "return_dict": False}


def _row(given: Given, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Timings by engine, and how far each one's output is from the original's in float32."""
    model, inputs = randomise_norms(given[0], seed=0).eval().requires_grad_(False), given[1]
    expected = _outputs(_call(copy.deepcopy(model).to(DEVICE), to_device(inputs, DEVICE)))[0].float()
    model = model.to(dtype)
    inputs = torch.utils._pytree.tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)
    fast = normfuse.optimize(model, inputs, verify="off")  # held against the original below, and in the tests
    norms, kernels = with_kernels(fast, _NORMS), with_kernels(fast)
    there = to_device(inputs, DEVICE)
    modules = {
        "eager": model.to(DEVICE), "optimized": on_device(fast, DEVICE), "norm kernels": on_device(norms, DEVICE),
        "all kernels": on_device(kernels, DEVICE),
    }  # fmt: skip
    torch._dynamo.reset()
    calls: dict[str, nn.Module | Callable[..., Any]] = {**modules}
    calls |= {f"{name}, compiled": torch.compile(modules[name], dynamic=False) for name in ("eager", "optimized")}
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for name, module in modules.items():
            found = _outputs(_call(module, there))[0].float()
            errors[name] = float((found - expected).abs().max() / expected.abs().max())
        # weights of a whole model do not fit into the cache: one copy is enough
        timings, failed = compare({n: lambda i, c=c: _call(c, there) for n, c in calls.items()}, 1, seconds)  # type: ignore[misc]
    return {"timings": {t.name: t.to_dict() for t in timings}, "failed": failed, "errors": errors}


def _call(module: Any, inputs: Any) -> Any:
    with torch.inference_mode():
        return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def _outputs(result: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, Tensor)]
