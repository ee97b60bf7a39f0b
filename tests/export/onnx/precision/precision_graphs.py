"""Graphs in half precision for tests: made, converted with every promise checked, run, and compared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.export.lowering.attention.forms import AttentionForms
from normfuse.export.lowering.lowering import lowered
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.precision import to_precision
from normfuse.export.onnx.program import program
from normfuse.export.targets import target_named
from normfuse.passes.attention.eager import EagerAttention

onnx = pytest.importorskip("onnx")
for _part in ("onnx.parser", "onnx.reference"):
    pytest.importorskip(_part)
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

pytestmark = pytest.mark.filterwarnings("ignore")

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
MIXED = {"BatchNormalization", "Cast", "If", "Loop", "Resize"}
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def exported(module, inputs, *, opset=23, form="decomposed", dynamic=None):
    found = program(module.eval(), inputs, dynamic)
    formed = lowered(found.exported, (EagerAttention(), AttentionForms(form, opset))).exported
    model = finished(translated(dataclasses.replace(found, exported=formed), opset), found, target_named("tensorrt"), opset)
    return model, {k: v.numpy() for k, v in found.feeds(found.flat_inputs()).items()}


def graph(body, *, inputs="float[2,8] x", outputs="float[2,8] y", opset=21, weights=(), functions="", domains=""):
    """A model from the text form of ONNX; `weights` are arrays w0, w1, ..."""
    text = f'<ir_version: 10, opset_import: ["": {opset}{domains}]> g ({inputs}) => ({outputs}) {{ {body} }} {functions}'
    proto = onnx.parser.parse_model(text)
    for i, w in enumerate(weights):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(w), f"w{i}"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"/blocks/{i}/{node.op_type}"
    return model


def session_of(proto):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, feeds):
    opened = session_of(ir.to_proto(model))
    return opened.run(None, {k: v for k, v in feeds.items() if k in {i.name for i in opened.get_inputs()}})


def converted(model, dtype="fp16", **options):
    """A converted copy, checked: valid, strongly typed, names unique, no cast without a use."""
    copy = model.clone()
    notes = to_precision(copy, dtype, **options)
    proto = ir.to_proto(copy)
    onnx.checker.check_model(proto, full_check=True)
    again = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    nodes = list(again.graph.all_nodes())
    for node in nodes:
        floats = {v.dtype for v in node.inputs if v is not None and v.dtype in FLOATS}
        assert len(floats) <= 1 or node.op_type in MIXED or node.domain, (node.name, floats)
        if node.op_type == "Cast":
            before = node.inputs[0].producer()
            assert node.inputs[0].dtype != node.outputs[0].dtype, node.name
            assert before is None or before.op_type != "Cast" or before.inputs[0].dtype != node.outputs[0].dtype, node.name
    assert len({n.name for n in nodes}) == len(nodes)
    casts = [(n.inputs[0], n.outputs[0].dtype) for n in nodes if n.op_type == "Cast"]
    assert len(set(casts)) == len(casts)
    return copy, notes


def dtypes(model):
    """The dtype that each node computes in, by op type; of several nodes of a type, the dtypes in order."""
    found: dict = {}
    for node in model.graph.all_nodes():
        floats = [v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in FLOATS]
        if floats and node.op_type != "Cast":
            found.setdefault(node.op_type, []).append(floats[0].name)
    return found


def evaluated(model, feeds):
    """Every node in the dtype that it says: ONNX Runtime computes half in float32 on the CPU, between casts that it drops."""
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def errors(model, feeds, low):
    """max |low − full| / max |full| for each float output"""
    pairs = zip(run(low, feeds), run(model, feeds), strict=True)
    return [float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max()) for a, b in pairs if b.dtype == np.float32]


def small_inputs(model, rng):
    return {v.name: rng.standard_normal(tuple(v.shape.dims)).astype(np.float32) for v in model.graph.inputs}


class Rms(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        h = x.float()
        return self.gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-12)).to(x.dtype)


class Big(nn.Module):
    """Norms of activations around 600, whose squares no half holds."""

    def __init__(self, *norms):
        super().__init__()
        self.inner, self.norms, self.outer = nn.Linear(16, 32), nn.ModuleList(norms), nn.Linear(32, 16)

    def forward(self, x):
        x = self.inner(x) * 600
        return tuple(self.outer(norm(x)) for norm in self.norms)
