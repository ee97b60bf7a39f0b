"""One model gives one file: each model in all forms, exported in two processes with other seeds of Python's hashes, byte by byte.

python -m benchmarks.reproducible [MODEL ...]        exit 1 if two files differ
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["MODELS", "differences", "main"]


def _mlp() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 8)), (torch.randn(3, 24),)


def _timm(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options), (torch.randn(2, 3, size, size),)

    return make


def _torchvision(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=10), (torch.randn(2, 3, 64, 64),)

    return make


def _text(kind: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import transformers

        config = getattr(transformers, f"{kind}Config")(vocab_size=99, num_attention_heads=4, **options)
        model = getattr(transformers, f"{kind}Model")(config)
        return model, {"input_ids": torch.randint(0, 99, (2, 12))}

    return make


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
#: A module and its example inputs, by name; weights follow from the seed.
MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": _mlp,
    "vit": _timm("vit_tiny_patch16_224", img_size=64, depth=2),
    "swin": _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 2, 1)),
    "resnet": _timm("resnet10t"),
    "convnext": _timm("convnext_atto"),
    "mobilenet": _torchvision("mobilenet_v3_small"),
    "densenet": _timm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    "bert": _text("Bert", **_SMALL),
    "gpt2": _text("GPT2", n_embd=64, n_layer=2, n_head=4),
    "qwen2": _text("Qwen2", num_key_value_heads=2, **_SMALL),
}


def _kinds() -> Iterator[tuple[str, dict[str, Any] | None, list[dict[str, Any]]]]:
    """Label, spec of the quantization, and the options of each file."""
    yield "float", None, [{}, {"target": "portable"}, {"target": "tensorrt"}, {"opset": 17}]
    yield "w4a8", {"weight_bits": 4}, [{"form": "native"}, {"form": "integer"}, {"form": "weight_only", "target": "portable"}]
    static = {"weight_bits": 8, "groups": 1, "activations": "static"}
    yield "w8a8 static", static, [{"form": "native"}, {"form": "qdq"}, {"form": "qdq", "target": "tensorrt"}]


def _written(name: str, folder: Path, only: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """What was written, and the hash of its bytes; `only`: these labels."""
    import normfuse
    from normfuse.export import to_onnx

    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    for kind, spec, every in _kinds():
        files = {" ".join([kind, *map(str, options.values())]): options for options in every}
        files = {label: options for label, options in files.items() if not only or label in only}
        if not files:
            continue
        quantize = None if spec is None else normfuse.ShiftQuant(**spec, prefer="size")  # "speed" asks a stopwatch
        fast = normfuse.optimize(model, inputs, quantize=quantize, calibration=None if spec is None else [inputs])
        for label, options in files.items():
            path = folder / f"{name}-{label}.onnx"
            try:
                to_onnx(fast, path, progress=False, **options)
            except normfuse.NormfuseError as e:
                yield label, f"refused: {e}"
                continue
            yield label, hashlib.sha256(path.read_bytes()).hexdigest()


def _in_a_process(name: str, seed: str, folder: Path, only: tuple[str, ...]) -> dict[str, str]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "benchmarks.reproducible", "--write", name, str(folder), *only]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-1500:]}")
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


def differences(name: str, folder: Path, only: tuple[str, ...] = ()) -> tuple[int, int, list[str]]:
    """How many files there are, how many were refused, and the labels of those that differ; files stay in `folder`.

    Args:
        only: files with these labels.
    """
    found = []
    for seed in ("1", "2"):
        (folder / seed).mkdir(parents=True, exist_ok=True)
        found.append(_in_a_process(name, seed, folder / seed, only))
    first, second = found
    refused = sum(digest.startswith("refused: ") for digest in first.values())
    return len(first) - refused, refused, [label for label in first if first[label] != second.get(label)]


def main(arguments: list[str]) -> int:
    """0 where all files are the same, 1 where one differs, 2 for a model that there is not."""
    if arguments[:1] == ["--write"]:
        for label, digest in _written(arguments[1], Path(arguments[2]), tuple(arguments[3:])):
            print(f"{label}\t{digest}")
        return 0
    unknown = [name for name in arguments if name not in MODELS]
    if unknown:
        print(f"no model is called {unknown[0]!r}: expected some of {', '.join(MODELS)}", file=sys.stderr)
        return 2
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments or MODELS:
            count, refused, differ = differences(name, Path(folder, name))
            print(
                f"{name}: {count} files ({refused} refused), {'the same bytes' if not differ else 'DIFFER: ' + ', '.join(differ)}",
                flush=True,
            )
            bad += bool(differ)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
