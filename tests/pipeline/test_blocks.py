"""Blocks and norms of a report, before and after."""

import pytest

import normfuse
from normfuse.pipeline.blocks import block_of
from normfuse.reports.model import Block, NormFate
from normfuse.reports.report import Report
from tests.zoo import ZOO


def _report(name: str) -> Report:
    entry = ZOO[name]
    return normfuse.report(normfuse.optimize(entry.build(), entry.args, verify="off"))


@pytest.mark.parametrize(
    ("path", "block"),
    [
        pytest.param("blocks.3.attn.qkv", "blocks.3", id="transformer"),
        pytest.param("blocks.3", "blocks.3", id="operator of the block itself"),
        pytest.param("layer1.0.conv1", "layer1.0", id="ResNet"),
        pytest.param("layers.0.blocks.1.norm", "layers.0.blocks.1", id="Swin"),
        pytest.param("features.1.2.conv.0", "features.1.2", id="stage and block"),
        pytest.param("head.fc", "head", id="no number"),
        pytest.param("0", "", id="a Sequential at the root"),
        pytest.param("add (model.py:3)", "", id="at the root, by its line"),
    ],
)
def test_blocks_are_numbered_modules_that_hold_others(path: str, block: str) -> None:
    holders = {"blocks", "blocks.3", "layer1.0", "layers.0", "layers.0.blocks", "layers.0.blocks.1", "features.1", "features.1.2"}
    assert block_of(path, holders) == block


def test_blocks_that_are_alike_stand_together_before_and_after() -> None:
    report = _report("preln_vit")
    repeated = [b for b in report.blocks if len(b.paths) > 1]
    assert repeated
    for block in repeated:
        assert block.before.count("layer_norm") == block.after.count("rms_norm") == 2
        assert "layer_norm" not in block.after
    kept = sum(len(b.paths) * (b.before.count("layer_norm") + b.before.count("rms_norm")) for b in report.blocks)
    assert kept == sum(report.norms_before.values())


def test_layers_outside_of_blocks_are_one_block() -> None:
    blocks = _report("resnet").blocks
    assert all(isinstance(b, Block) for b in blocks)
    assert sum(b.before.count("batch_norm") * len(b.paths) for b in blocks) == _report("resnet").norms_before["batch_norm"]


@pytest.mark.parametrize("name", ["resnet", "preln_gpt", "postln_bert", "hand_written_norms", "unified_vit"])
def test_norms_are_those_that_are_counted(name: str) -> None:
    report = _report(name)
    before = [norm.kind for norm in report.norms]
    assert {kind: before.count(kind) for kind in set(before)} == {k: n for k, n in report.norms_before.items() if n}
    left = [norm.now for norm in report.norms if norm.now]
    assert {kind: left.count(kind) for kind in set(left)} == {k: n for k, n in report.norms_after.items() if n}


def test_a_norm_that_is_gone_says_so() -> None:
    assert all(norm == NormFate(norm.path, "batch_norm") for norm in _report("cnn_bn").norms)
