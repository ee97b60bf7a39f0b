"""Forms by table: what was fastest when it was measured, so that one model always gives one file.

Latency of the plain form over that of each other, fp32, ONNX Runtime 1.32, two cores (benchmarks/results/latency-*.json):

    model             batch  width   attention23    mha    qkv
    ViT-tiny              1    192         0.912  1.044  1.008    also with UnifiedNorm: 0.922, 1.044, 1.022
    DINOv2-small          1    384         1.019  1.001  1.017
    ViT-B/16              1    768         0.995  1.013  1.006
    ViT-B/16              8    768         1.002  1.000  1.031
    BERT, 128             1    768         0.993  0.991  1.001
    GPT-2, 128            1    768         0.998  1.007  1.007
    Llama-shaped, 128     1                0.997  0.973     -     rotary positions, shared keys

`qkv` never lost where it is possible at all. `mha` wins in narrow models, and loses where its operands must be copied first.
"""

from __future__ import annotations

from normfuse.export.lowering.attention.forms import AttentionForms, forms_in, widest
from normfuse.export.lowering.lowering import Lowered
from normfuse.export.targets import NATIVE_ATTENTION

__all__ = ["attention_by_table", "layers_by_table"]

_NARROW = 192


def attention_by_table(program: Lowered, forms: tuple[str, ...], opset: int) -> str:
    """One of `forms`, the plain one first, for the attentions of a program, which stays as it is."""
    if NATIVE_ATTENTION in forms:  # offered where the layers around it are in the kernels, too
        return NATIVE_ATTENTION
    if not {"qkv", "mha"} <= set(forms):
        return forms[0]
    trial = program.then([AttentionForms("qkv", opset)])
    got = [form for _, form in forms_in(trial.exported.graph.nodes)]
    if 2 * got.count("qkv") < len(got) or not got:
        return forms[0]
    return "mha" if widest(program.exported.graph.nodes) <= _NARROW else "qkv"


def layers_by_table(forms: tuple[str, ...]) -> str | None:
    """One of the forms of quantized layers, the plain one first; None without any.

    With static scales ONNX Runtime makes integer kernels of whole stretches of `qdq`; `integer` rounds to floats between any two.
    """
    return "qdq" if "qdq" in forms else next(iter(forms), None)
