"""An exported program through passes: the same inputs, outputs and numbers, and what the report says of its sites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normfuse.export import to_onnx
from normfuse.export.lowering.graphs import graph_of, with_graph
from normfuse.export.lowering.lowering import lowered
from normfuse.export.onnx.program import program
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Refuse
from normfuse.ir.passes import Pass, Rewriting
from tests.export.models import attention
from tests.export.quantized_models import exported, quantized

pytest.importorskip("onnxruntime")


class Several(nn.Module):
    """A parameter that is read twice, one that nobody reads, a buffer, an output that is an input, sizes that vary."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.idle = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4), persistent=False)

    def forward(self, input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return input * self.w + self.shift + self.w, other


class Doubled(Pass):
    """Every constant is twice as large."""

    name = "doubled"

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        for node in graph:
            constant = graph.constant(node)
            if isinstance(constant, Constant) and node.users:
                new = graph.emit_constant(constant * 2, node)
                node.replace_all_uses_with(new)
                work.done(self.name, node)


class Failing(Pass):
    """Breaks the graph, and then fails."""

    name = "failing"

    def rewrite(self, work: Rewriting) -> None:
        output = work.graph.fx.output_node()
        work.graph.fx.erase_node(output)
        raise RuntimeError("it is broken")


def test_there_and_back() -> None:
    inputs = (torch.randn(3, 4), torch.randn(2))
    found = program(Several().eval(), inputs, ({0: torch.export.Dim.AUTO}, None)).exported
    again = with_graph(found, graph_of(found))
    for size in (3, 7):
        given = (torch.randn(size, 4), torch.randn(2))
        for a, b in zip(found.module()(*given), again.module()(*given), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert again.graph_signature.user_inputs == found.graph_signature.user_inputs


def test_new_constants_are_inputs_of_the_program() -> None:
    model, inputs = Several().eval(), (torch.randn(3, 4), torch.randn(2))
    found = lowered(program(model, inputs).exported, (Doubled(),)).exported
    got, _ = found.module()(*inputs)
    torch.testing.assert_close(got, 2 * (inputs[0] * model.w + model.shift + model.w))


def test_a_pass_that_fails_is_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    inputs = (torch.randn(3, 4), torch.randn(2))
    found = program(Several().eval(), inputs).exported
    got = lowered(found, (Failing(),))
    assert [p.name for p in got.passes] == ["failing"]
    assert "taken back" in caplog.text
    assert got.failures == ("the pass failing failed and was taken back (RuntimeError: it is broken)",)
    for a, b in zip(found.module()(*inputs), got.exported.module()(*inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


class Told(Pass):
    """Does one thing, and leaves another."""

    def __init__(self, name: str) -> None:
        self.name = name

    def rewrite(self, work: Rewriting) -> None:
        node = work.graph.fx.output_node()
        work.done(self.name, node, f"{self.name} did it")
        work.refuse(self.name, node, Refuse(f"{self.name} did not"))


def test_what_one_of_several_passes_says() -> None:
    got = lowered(program(Several().eval(), (torch.randn(3, 4), torch.randn(2))).exported, (Told("a"), Told("b")))
    assert [note.rpartition(": ")[2] for note in got.notes("b")] == ["b did it", "b did not"]
    assert got.notes("c") == ()


def test_the_result_says_what_each_site_became(tmp_path: Path) -> None:
    model, _ = quantized("vision")
    file = exported(model, None, tmp_path, form="native", attention="native", verify=False)
    said = {(f.kind, f.path): f.form for f in file.forms}
    assert said[("attention", "block")] == "native"
    assert said[("norm", "block.norm1")] == "native NormQuantize"
    assert said[("norm", "norm")] == "RMSNormalization"
    assert said[("quantized", "block.up")] == "native ShiftQuantMatMulQuantize"
    assert len(said) == 10
    assert "--explain" not in str(file)
    old = exported(model, None, tmp_path, form="integer", opset=20, verify=False)
    assert "3 of 10 sites plainer than wanted" in str(old)
    assert "opset 20 has no RMSNormalization (would help: opset 23 or newer)" in old.explained
    plain = to_onnx(nn.ReLU().eval(), tmp_path / "m.onnx", example_inputs=(torch.randn(2, 3),), force=True, verify=False)
    assert plain.explained == "no attention, norm or quantized layer is in the file"


class Spelled(nn.Module):
    """Norms of kinds that no runtime has an operator for, and a quotient that is none."""

    def forward(self, x: Tensor) -> Tensor:
        x = x / torch.sqrt((x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()) * (1 / 9) + 1e-6)
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.abs().mean(-1, keepdim=True) * 1.25 + 1e-6)
        x = x / (x.abs().mean(-1, keepdim=True) * 1.25).clamp_min(1e-3)
        return x / x.exp().mean(-1, keepdim=True)


def test_norms_that_are_spelled_out_are_named(tmp_path: Path) -> None:
    file = to_onnx(Spelled().eval(), tmp_path / "m.onnx", example_inputs=(torch.randn(2, 8),), verify=False)
    assert [(f.kind, f.form, f.why.split()[-1]) for f in file.forms] == [
        ("norm", "arithmetic", "CRMSNorm"), ("norm", "arithmetic", "L1Norm"), ("norm", "arithmetic", "L1Norm"),
    ]  # fmt: skip


def test_why_attention_is_plainer(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 5, 32), torch.randn(5, 5)
    for asked, options, form, words in (
        ("qkv", {}, "qkv", ""),
        ("qkv", {"opset": 21}, "decomposed", "1.21"),
        ("mha", {"dtype": "fp16"}, "mha", ""),
    ):
        file = to_onnx(
            attention().eval(), tmp_path / "m.onnx", example_inputs=(x, mask), attention=asked, force=True, verify=False, **options
        )
        (site,) = (f for f in file.forms if f.kind == "attention")
        assert (site.kind, site.form) == ("attention", form)
        assert words in site.why
