"""Every form of attention is the same function, at sizes other than the exported ones too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.export.targets import ATTENTION_FORMS
from tests.export.models import AUTO, attention, exported, outputs, relative


def _masks(n):
    ragged = torch.ones(2, 1, n, n, dtype=torch.bool)
    ragged[0, :, :, n // 2 :] = False
    blind = torch.rand(2, 1, n, n) > 0.3
    blind[1, :, 2] = False  # a query that sees nothing
    return {"none": None, "bool": ragged, "blind": blind, "float": torch.randn(2, 4, n, n), "flat": torch.randn(n, n)}


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("style", ["packed", "separate", "split", "interleaved", "eager"])
def test_every_way_to_make_heads(tmp_path, style, form):
    model, x = attention(style), torch.randn(2, 5, 32)
    result = exported(model, (x,), tmp_path, attention=form, dynamic_shapes=({0: AUTO, 1: AUTO},))
    assert result.attention_sites == {form: 1}
    for batch, length in ((2, 5), (3, 9), (1, 2)):
        x = torch.randn(batch, length, 32)
        assert relative(outputs(result, x=x)["output"], model(x)) < 1e-5


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("kind", ["bool", "blind", "float", "flat"])
def test_masks(tmp_path, form, kind):
    model, x, mask = attention(), torch.randn(2, 5, 32), _masks(5)[kind]
    result = exported(model, (x, mask), tmp_path, attention=form)
    assert result.attention_sites == {form: 1}
    got = outputs(result, x=x, mask=mask)["output"]
    assert got.isfinite().all()
    assert relative(got, model(x, mask)) < 1e-5


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_scale_and_causal_with_varying_length(tmp_path, form):
    model = attention(is_causal=True, scale=0.7)
    result = exported(model, (torch.randn(2, 5, 32),), tmp_path, attention=form, dynamic_shapes=({0: AUTO, 1: AUTO},))
    assert result.attention_sites == {form: 1}
    for length in (5, 11):
        x = torch.randn(2, length, 32) * 30  # scores so large that a weak mask would show through
        assert relative(outputs(result, x=x)["output"], model(x)) < 1e-5


class Cross(nn.Module):
    def __init__(self, causal=False, groups=1):
        super().__init__()
        self.causal, self.groups = causal, groups

    def forward(self, q, kv):
        return F.scaled_dot_product_attention(q, kv, kv.flip(-1), is_causal=self.causal, enable_gqa=self.groups > 1)


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_other_number_of_keys(tmp_path, form, causal):
    """A causal mask starts at the first key in torch; runtimes that align it to the last one must not be used."""
    model, q, kv = Cross(causal).eval(), torch.randn(2, 4, 3, 8), torch.randn(2, 4, 7, 8)
    result = exported(model, (q, kv), tmp_path, attention=form, dynamic_shapes=({0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO}))
    q, kv = torch.randn(3, 4, 5, 8), torch.randn(3, 4, 6, 8)
    assert relative(outputs(result, q=q, kv=kv)["output"], model(q, kv)) < 1e-5


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_grouped_queries(tmp_path, form):
    model, q, kv = Cross(groups=2).eval(), torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8)
    result = exported(model, (q, kv), tmp_path, attention=form)
    assert relative(outputs(result, q=q, kv=kv)["output"], model(q, kv)) < 1e-5
    assert "com.microsoft.MultiHeadAttention" not in result.ops


def test_scores_that_are_read_elsewhere_stay(tmp_path):
    class Watched(nn.Module):
        def forward(self, q, k, v):
            p = (q @ k.transpose(-2, -1)).softmax(-1)
            return p @ v, p

    q = torch.randn(2, 4, 5, 8)
    result = exported(Watched().eval(), (q, q + 1, q - 1), tmp_path, attention="mha")
    assert result.attention_sites == {}
    assert result.ops["Softmax"] == 1


def test_a_linear_that_is_read_elsewhere_is_still_exact(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            y = self.qkv(x)
            q, k, v = y.reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), y

    model, x = Shared().eval(), torch.randn(2, 5, 32)
    result = exported(model, (x,), tmp_path, attention="qkv")
    got = outputs(result, x=x)
    for have, want in zip(got.values(), model(x), strict=True):
        assert relative(have, want) < 1e-5


def test_auto_takes_the_table(tmp_path):
    """Narrow models get `mha`, wide ones `qkv`, and no stopwatch has a say."""
    x = torch.randn(2, 5, 32)
    result = exported(attention(), (x,), tmp_path)
    assert (result.attention, result.ratios) == ("mha", {})
    (tmp_path / "wide").mkdir()
    wide = exported(attention(width=64), (torch.randn(2, 5, 256),), tmp_path / "wide")
    assert (wide.attention, wide.attention_sites) == ("qkv", {"qkv": 1})


def test_tuning_measures_once_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "cache"))
    inputs = (torch.randn(2, 5, 32),)
    result = exported(attention(), inputs, tmp_path, tune=True)
    assert set(result.ratios) == set(ATTENTION_FORMS)
    assert result.ratios["decomposed"] == 1
    assert result.attention == "decomposed" or result.ratios[result.attention] > 1
    assert result.attention in str(result)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    monkeypatch.setattr("normfuse.export.onnx.choice.candidates.fastest", None)  # what is known is not measured again
    again = exported(attention(), inputs, tmp_path, tune=True, force=True)
    assert (again.attention, again.ratios) == (result.attention, result.ratios)
    with pytest.raises(TypeError):
        exported(attention(), (torch.randn(3, 5, 32),), tmp_path, tune=True, force=True)  # another shape is another question


def test_float64_attention_stays_standard(tmp_path):
    result = exported(attention().double(), (torch.randn(2, 5, 32, dtype=torch.float64),), tmp_path, attention="qkv")
    assert result.attention_sites == {"decomposed": 1}
    assert result.error.max_rel < 1e-9
