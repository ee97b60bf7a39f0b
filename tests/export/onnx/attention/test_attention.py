"""Every form of attention is the same function, at sizes other than the exported ones too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.export.onnx.inspect import op_counts
from normfuse.export.onnx.runtime import session
from normfuse.export.targets import ATTENTION_FORMS
from tests.export.models import AUTO, attention, exported, outputs, relative
from tests.export.quantized_models import Translated


def _masks(n):
    ragged = torch.ones(2, 1, n, n, dtype=torch.bool)
    ragged[0, :, :, n // 2 :] = False
    blind = torch.rand(2, 1, n, n) > 0.3
    blind[1, :, 2] = False  # a query that sees nothing
    return {"none": None, "bool": ragged, "blind": blind, "float": torch.randn(2, 4, n, n), "flat": torch.randn(n, n)}


class Forms:
    """A model that is captured and translated once, and asked in every form of its attention."""

    def __init__(self, folder, model, inputs, dynamic_shapes=None):
        self.translated, self.folder = Translated(model, inputs, dynamic_shapes=dynamic_shapes), folder
        self.sites, self.opened = {}, {}
        for form in ATTENTION_FORMS:
            file = folder / f"{form}.onnx"
            self.sites[form] = self.translated.attending(file, form)
            self.opened[form] = session(file, threads=1)

    def assert_like_the_model(self, *inputs, bound=1e-5):
        expected = self.translated.model(*inputs)
        for form, opened in self.opened.items():
            (got,) = self.translated.run(opened, *inputs)
            assert got.isfinite().all(), form
            assert relative(got, expected) < bound, form


EVERYWHERE = {form: {form: 1} for form in ATTENTION_FORMS}


@pytest.mark.parametrize("style", ["packed", "separate", "split", "interleaved", "eager"])
def test_every_way_to_make_heads(tmp_path, style):
    forms = Forms(tmp_path, attention(style), (torch.randn(2, 5, 32),), ({0: AUTO, 1: AUTO},))
    assert forms.sites == EVERYWHERE
    for batch, length in ((2, 5), (3, 9), (1, 2)):
        forms.assert_like_the_model(torch.randn(batch, length, 32))


@pytest.mark.parametrize("kind", ["bool", "blind", "float", "flat"])
def test_masks(tmp_path, kind):
    x, mask = torch.randn(2, 5, 32), _masks(5)[kind]
    forms = Forms(tmp_path, attention(), (x, mask))
    assert forms.sites == EVERYWHERE
    forms.assert_like_the_model(x, mask)


def test_scale_and_causal_with_varying_length(tmp_path):
    model = attention(is_causal=True, scale=0.7)
    forms = Forms(tmp_path, model, (torch.randn(2, 5, 32),), ({0: AUTO, 1: AUTO},))
    assert forms.sites == EVERYWHERE
    for length in (5, 11):  # scores so large that a weak mask would show through
        forms.assert_like_the_model(torch.randn(2, length, 32) * 30)


class Cross(nn.Module):
    def __init__(self, causal=False, groups=1):
        super().__init__()
        self.causal, self.groups = causal, groups

    def forward(self, q, kv):
        return F.scaled_dot_product_attention(q, kv, kv.flip(-1), is_causal=self.causal, enable_gqa=self.groups > 1)


@pytest.mark.parametrize("causal", [False, True])
def test_other_number_of_keys(tmp_path, causal):
    """A causal mask starts at the first key in torch; runtimes that align it to the last one must not be used."""
    inputs = (torch.randn(2, 4, 3, 8), torch.randn(2, 4, 7, 8))
    forms = Forms(tmp_path, Cross(causal), inputs, ({0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO}))
    forms.assert_like_the_model(torch.randn(3, 4, 5, 8), torch.randn(3, 4, 6, 8))


def test_grouped_queries(tmp_path):
    q, kv = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8)
    forms = Forms(tmp_path, Cross(groups=2), (q, kv))
    forms.assert_like_the_model(q, kv)
    assert not any("com.microsoft.MultiHeadAttention" in op_counts(tmp_path / f"{form}.onnx") for form in ATTENTION_FORMS)


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_the_form_that_is_asked_for_is_written(tmp_path, form):
    model, x = attention(), torch.randn(2, 5, 32)
    result = exported(model, (x,), tmp_path, attention=form, dynamic_shapes=({0: AUTO, 1: AUTO},))
    assert (result.attention, result.attention_sites) == (form, {form: 1})
    assert relative(outputs(result, x=x)["output"], model(x)) < 1e-5


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
