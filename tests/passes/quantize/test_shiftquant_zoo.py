"""Quantization of models as strangers bring them: near the float model, told layer by layer, as handy as any other module."""

import copy
import inspect
import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import normfuse
from normfuse import ShiftQuant
from normfuse.errors import UsageError
from tests.passes.quantize.quantized import draw, entries, ids, made, operators, sqnr
from tests.zoo import ZOO

W8A8 = ShiftQuant(weight_bits=8, exponents="range", prefer="size")
NEAR = 25.0  # dB, of the outputs

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


@dataclass(frozen=True)
class Case:
    """A model with example inputs of batch 2; `gone`: layers that are constants, or others, once the graph is captured."""

    build: Any
    example: Any
    kept: dict[str, int] = field(default_factory=dict)  # reason: how many layers
    gone: tuple[str, ...] = ()
    dynamic: Any = None


def of_zoo(name, **options):
    entry = ZOO[name]
    if not entry.kwargs:
        return pytest.param(lambda: Case(entry.build(), entry.args, **options), id=name)
    forward = type(entry.build()).forward
    example = dict(list(inspect.signature(forward).bind(None, *entry.args, **entry.kwargs).arguments.items())[1:])
    return pytest.param(lambda: Case(entry.build(), example, **options), id=name)


def depthwise_and_uneven_same():
    """As in MobileNets that come from TensorFlow: "same" padding that is larger at the right and below."""
    layers = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 8, (2, 4), padding="same"), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(200, 5),
    )  # fmt: skip
    return Case(made(lambda: layers), (draw(2, 4, 10, 10),), {"1 input channels a group are too few": 1})


def parametrized():
    layers = [parametrizations.weight_norm(nn.Linear(8, 16)), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(16, 8))]
    return Case(made(nn.Sequential, *layers), (draw(2, 3, 8),))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(30, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, tokens):
        return {"scores": self.head(self.lstm(self.embed(tokens))[0]), "length": tokens.shape[1]}


def recurrent():
    return Case(made(Recurrent), {"tokens": ids(2, 7, high=30)}, {"there is no integer form of lstm": 1})


def transformer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    gone = ("layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj")  # read by the attention itself, which has their paths
    return Case(made(nn.TransformerEncoder, layer, 2, enable_nested_tensor=False), (draw(2, 5, 16),), gone=gone)


def mobilenet():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.mobilenetv3.MobileNetV3(
        [[{"block_type": "ir", "dw_kernel_size": 3, "stride": 2, "exp_ratio": 2.0, "out_chs": 16, "se_ratio": 0.25,
           "pw_kernel_size": 1, "act_layer": None, "noskip": False, "s2d": 0}]],
        num_classes=6, stem_size=8, num_features=24, pad_type="same",
    )  # fmt: skip
    return Case(made(lambda: model), (draw(2, 3, 24, 24),), {"1 input channels a group are too few": 1})


def swin():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return Case(
        made(
            timm.models.swin_transformer.SwinTransformer,
            img_size=32, patch_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4, num_classes=6,
        ),
        (draw(2, 3, 32, 32),),
    )  # fmt: skip


def gpt2():
    """Its linears are `Conv1D`: the weight stands as (in, out); one table is embedding and head."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False, bos_token_id=1, eos_token_id=2
    )
    dynamic = {"input_ids": {0: torch.export.Dim("batch")}}
    return Case(made(transformers.GPT2LMHeadModel, config), {"input_ids": ids(2, 6, high=60)}, dynamic=dynamic)


def whisper():
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder
    return Case(made(encoder, config), (draw(2, 8, 20),), gone=("embed_positions",))


BATCH = {0: torch.export.Dim("batch")}
CASES = [
    of_zoo("conv1d_bn", dynamic=(BATCH,)),
    of_zoo("densenet", dynamic=(BATCH,)),
    of_zoo("gamma_zero"),
    of_zoo("hand_written_norms"),
    of_zoo("encoder_decoder"),
    pytest.param(depthwise_and_uneven_same, id="uneven same"),
    pytest.param(parametrized, id="parametrized"),
    pytest.param(recurrent, id="LSTM"),
    pytest.param(transformer, id="nn.Transformer"),
    pytest.param(mobilenet, id="timm MobileNet"),
    pytest.param(swin, id="timm Swin"),
    pytest.param(gpt2, id="GPT-2"),
    pytest.param(whisper, id="Whisper encoder"),
]


def call(model, example):
    with torch.no_grad():
        found = model(**example) if isinstance(example, dict) else model(*example)
    return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


def longer(example):
    """The same inputs in a batch of three."""
    return torch.utils._pytree.tree_map(lambda t: torch.cat([t, t[:1].flip(-1)]), example)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (of_zoo("grouped_depthwise"), "input channels a group are too few for integers"),
        (of_zoo("conv_transpose"), "there is no integer form of conv_transpose"),
    ],
)
def test_a_model_of_which_no_layer_can_be_quantized_is_an_error(case, why):
    case = case.values[0]()
    with pytest.raises(UsageError, match=rf"none of 3 layers: \d because .*{why}"):
        normfuse.optimize(case.build, case.example, quantize=W8A8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights")
def test_quantized(case):
    case = case()
    model, example = case.build, case.example
    fast = normfuse.optimize(model, example, dynamic_shapes=case.dynamic, quantize=W8A8)
    report = normfuse.report(fast)
    expected, found = call(model, example), call(fast, example)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
    assert all(torch.equal(e, f) or sqnr(e.double(), f.double()) > NEAR for e, f in zip(expected, found, strict=True))
    assert not report.undone

    rows = entries(report)
    layers = {name for name, m in model.named_modules() if isinstance(m, WEIGHTED)}
    assert layers - set(case.gone) <= {e.path for e in rows}
    assert sum(not e.kept for e in rows) == sum("shiftquant" in name for name in operators(fast))
    reasons = {reason: sum(e.kept.startswith(reason) for e in rows) for reason in case.kept}
    assert reasons == case.kept
    assert sum(map(bool, (e.kept for e in rows))) == sum(case.kept.values())

    stored = io.BytesIO()
    torch.save(fast, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(stored, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(found, call(twin, example), strict=True))

    if case.dynamic is not None:
        more = longer(example)
        assert all(sqnr(a, b) > NEAR for a, b in zip(call(model, more), call(fast, more), strict=True))
