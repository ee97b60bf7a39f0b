"""Models in float64, float16 and bfloat16, exported as they are and run: `python -m benchmarks.dtypes`.

Each is compared with the same model in float32, before it was converted: floats by max |difference| / max |expected|, W4A8 by its
SQNR beside that of W4A8 of the float32 model.
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import normfuse
from normfuse import native
from normfuse.export import to_onnx
from normfuse.export.onnx.compare import TOLERANCE, sqnr

__all__ = ["DTYPES", "SUBJECTS", "Row", "feeds", "main", "measured", "run"]

DTYPES = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
W4A8 = normfuse.ShiftQuant(weight_bits=4, activation_bits=8, prefer="size")


def _lively(model: nn.Module) -> nn.Module:
    """Norms that look trained."""
    with torch.no_grad():
        for module in model.modules():
            if "norm" not in type(module).__name__.lower():
                continue
            for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if name in ("running_mean", "bias"):
                    value.normal_(std=0.3)
                elif name in ("running_var", "weight"):
                    value.uniform_(0.5, 1.5)
    return model.eval()


def vit(small: bool = False) -> tuple[nn.Module, Any]:
    import timm

    size = 32 if small else 224
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 20} if small else {}
    return _lively(timm.create_model("vit_tiny_patch16_224", **options)), (torch.randn(2, 3, size, size),)


def resnet(small: bool = False) -> tuple[nn.Module, Any]:
    import torchvision

    size = 32 if small else 224
    return _lively(torchvision.models.resnet18(num_classes=20)), (torch.randn(2, 3, size, size),)


def _decoder(small: bool) -> dict[str, Any]:
    return {
        "vocab_size": 500, "hidden_size": 32 if small else 128, "intermediate_size": 64 if small else 256,
        "num_hidden_layers": 1 if small else 4, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
    }  # fmt: skip


def qwen2(small: bool = False) -> tuple[nn.Module, Any]:
    import transformers

    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_decoder(small)))
    return _lively(model), {"input_ids": torch.randint(0, 500, (2, 8 if small else 32))}


def gemma(small: bool = False) -> tuple[nn.Module, Any]:
    import transformers

    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(head_dim=16, **_decoder(small)))
    return _lively(model), {"input_ids": torch.randint(0, 500, (2, 8 if small else 32))}


SUBJECTS: dict[str, Callable[[bool], tuple[nn.Module, Any]]] = {
    "ViT-tiny": vit,
    "ResNet-18": resnet,
    "Qwen2": qwen2,
    "Gemma": gemma,
}
"""Models in float32, and their inputs; a small form for tests."""


@dataclass(frozen=True)
class Row:
    """One export.

    Attributes:
        computes: dtype of the outputs of the file.
        error: max |difference| / max |expected| against the float32 model.
        sqnr: against the float32 model, in dB.
        reference: the SQNR of W4A8 of the float32 model; None for floats.
        bound: on `error` for floats; for W4A8 the SQNR is to be within a decibel and a half of `reference`.
    """

    subject: str
    dtype: str
    quantized: bool
    computes: str
    error: float
    sqnr: float
    reference: float | None
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound if self.reference is None else self.sqnr >= self.reference - 1.5

    def __str__(self) -> str:
        form = "W4A8" if self.quantized else "float"
        held = f"{self.bound:.0e}" if self.reference is None else f"{self.reference - 1.5:.1f} dB"
        found = f"{self.error:.1e}" if self.reference is None else f"{self.sqnr:.1f} dB"
        return (
            f"| {self.subject} | {self.dtype} | {form} | {self.computes} | {found} | {held} | {'yes' if self.right else '**no**'} |"
        )


def in_dtype(values: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def _called(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    found: Tensor = out.logits if hasattr(out, "logits") else out
    return found


def feeds(session: Any, inputs: Any) -> dict[str, Any]:
    """Arrays as a user without PyTorch has them, in the dtypes that the file asks for."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64}
    values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    return {i.name: v.numpy().astype(kinds[i.type]) for i, v in zip(session.get_inputs(), values, strict=False)}


def run(file: Path, inputs: Any) -> np.ndarray[Any, Any]:
    """The first output of the file in ONNX Runtime, with our kernels where they are built."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if native.available():
        options.register_custom_ops_library(str(native.path()))
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, feeds(session, inputs))[0]
    return found


def measured(
    subject: str, dtype: str, *, quantized: bool, small: bool = False, reference: float | None = None, asked: Any = None
) -> Row:
    """Export one model in `dtype` as it is, or in the dtype that is `asked` for, and compare it with the float32 one."""
    torch.manual_seed(0)
    model, inputs = SUBJECTS[subject](small)
    want = _called(model, inputs)
    options: dict[str, Any] = {"quantize": W4A8} if quantized else {}
    if quantized and reference is None:
        reference = sqnr([want], [_called(normfuse.optimize(model, inputs, **options), inputs)])
    narrow = copy.deepcopy(model).to(DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        gm = normfuse.optimize(narrow, in_dtype(inputs, DTYPES[dtype]), **options)
        to_onnx(gm, file, dtype=asked, attention="decomposed", progress=False)
        got = run(file, inputs)
    return _row(subject, dtype, got, want, reference if quantized else None)


def _row(subject: str, dtype: str, got: np.ndarray[Any, Any], want: Tensor, reference: float | None) -> Row:
    have = torch.from_numpy(got).double()
    error = float((have - want.double()).abs().max() / want.abs().max())
    # the reference itself is in float32, which is all that a float64 file can be held to
    bound = TOLERANCE[torch.float32] if dtype == "float64" else TOLERANCE[DTYPES[dtype]]
    return Row(subject, dtype, reference is not None, str(got.dtype), error, sqnr([want.double()], [have]), reference, bound)


def _command_line(subject: str, *, quantized: bool, reference: float | None) -> Row:
    """A folder with a bfloat16 checkpoint, from the command line."""
    torch.manual_seed(0)
    model, inputs = SUBJECTS[subject](False)
    want = _called(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).bfloat16().save_pretrained(folder)  # type: ignore[operator]
        file = Path(folder, "model.onnx")
        command = [sys.executable, "-m", "normfuse", "export", f"hf:{folder}", "-o", str(file), "--dynamic", "batch,seq"]
        subprocess.run([*command, *(["--quantize", "w4a8"] if quantized else []), "-q"], check=True, capture_output=True)
        options: dict[str, Any] = dict(inputs)
        options["attention_mask"] = torch.ones_like(inputs["input_ids"])
        got = run(file, options)
    return _row(f"{subject}, `hf:` folder", "bfloat16", got, want, reference if quantized else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the small models of the tests")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| model | dtype | form | file | error | bound | right |\n|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    for subject in SUBJECTS:
        reference: float | None = None
        for quantized in (False, True):
            for dtype in DTYPES:
                rows.append(measured(subject, dtype, quantized=quantized, small=args.small, reference=reference))
                reference = rows[-1].reference if quantized else None
                print(rows[-1], flush=True)
            if subject == "Qwen2" and not args.small:
                rows.append(_command_line(subject, quantized=quantized, reference=reference))
                print(rows[-1], flush=True)
    wrong = [r for r in rows if not r.right or math.isnan(r.error)]
    print(f"{len(rows) - len(wrong)} of {len(rows)} right")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
