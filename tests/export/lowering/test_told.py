"""The reason of a pass is told of the site that it left, where that has no reason of its own."""

import pytest

from normfuse.export.lowering.told import _explained
from normfuse.reports.model import Form, Site

LEFT = [Site("norm_codes", "a", "it is read as floats", "b", "quantize b, too")]


@pytest.mark.parametrize(
    ("each", "why"),
    [
        (Form("norm", "a", "LayerNormalization"), "it is read as floats (b)"),
        (Form("norm", "c", "LayerNormalization"), ""),
        (Form("norm", "a", "arithmetic", "opset 20 has no RMSNormalization"), "opset 20 has no RMSNormalization"),
        (Form("norm", "a", "native NormQuantize"), ""),
    ],
)
def test_whose_reason_it_is(each, why):
    assert _explained(each, LEFT).why == why
