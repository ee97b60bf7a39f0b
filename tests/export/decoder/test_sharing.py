"""Weights that an export does not hold twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import normfuse
from normfuse.app.language.options import DecoderOptions
from normfuse.app.language.steps import in_float32, optimized, untouched
from normfuse.errors import ExportError
from normfuse.export.decoder.blocks import Blocks
from normfuse.export.decoder.capture import cached
from tests.export.decoder.models import tiny


def _places(module: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in module.state_dict().values() if t.ndim == 2}


def test_weights_that_stay_as_they_are_are_the_models_own() -> None:
    model = tiny("llama", num_hidden_layers=1)
    captured = cached(model)
    fast = optimized(captured, DecoderOptions(verify="off"), Blocks(4), None)
    assert _places(fast) == _places(model)
    apart = normfuse.optimize(captured, captured.example(), dynamic_shapes=captured.dynamic_shapes(), verify="off")
    assert not _places(apart) & _places(model)


def test_whoever_writes_into_them_is_found() -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    with untouched(model):
        model.lm_head.weight.detach() + 1
    with pytest.raises(ExportError, match="LlamaForCausalLM were written into"), untouched(model), torch.no_grad():
        model.lm_head.weight.add_(1)


def test_halves_become_floats_in_place_where_that_is_allowed() -> None:
    model = tiny("llama", num_hidden_layers=1).to(torch.bfloat16)
    copied, _ = in_float32(model)
    assert copied is not model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    itself, notes = in_float32(model, in_place=True)
    assert itself is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert notes[0].startswith("the model is in bfloat16")
