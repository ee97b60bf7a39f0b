"""Weights in blocks: what is stored, and what ONNX Runtime makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from normfuse.export.decoder.blocks import BLOCK, Blocks, block_weights, parse_blocks


def _halves(pairs: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    return np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:-1], -1)[..., :count]


def _expanded(weight: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    stored = block_weights(weight, bits)
    codes = stored.codes if bits == 8 else _halves(stored.codes, BLOCK)
    zeros = 128 if stored.zeros is None else _halves(stored.zeros, codes.shape[1])[..., None].astype(np.float32)
    values: NDArray[np.float32] = (codes.astype(np.float32) - zeros) * stored.scales[..., None]
    return values.reshape(weight.shape).astype(np.float32)


@pytest.mark.parametrize(("bits", "wanted"), [(4, 21.0), (8, 44.0)])
def test_weights_keep_what_their_bits_can_hold(bits: int, wanted: float) -> None:
    weight = np.random.default_rng(0).normal(size=(96, 256)).astype(np.float32)
    error = _expanded(weight, bits) - weight
    assert 10 * np.log10((weight**2).sum() / (error**2).sum()) > wanted


def test_the_scale_is_searched() -> None:
    """Never worse than the scale that just holds the largest weight."""
    weight = np.random.default_rng(0).standard_t(3, size=(64, 128)).astype(np.float32)
    blocks = weight.reshape(64, -1, BLOCK)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1) / -8
    plain = (np.clip(np.rint(blocks / peak), -8, 7) * peak - blocks).reshape(weight.shape)
    assert ((_expanded(weight, 4) - weight) ** 2).sum() < 0.96 * (plain**2).sum()


def test_rows_of_zeros_stay_zeros() -> None:
    assert not _expanded(np.zeros((2, BLOCK), np.float32), 4).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_reads_them(bits: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(48, 96)).astype(np.float32), random.normal(size=(3, 96)).astype(np.float32)
    weight += random.normal(size=(48, 1)).astype(np.float32)
    stored = block_weights(weight, bits)
    parts = {"codes": stored.codes, "scales": stored.scales} | ({} if stored.zeros is None else {"zeros": stored.zeros})
    facts = {"N": 48, "K": 96, "bits": bits, "block_size": BLOCK, "accuracy_level": 0}
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", *parts], ["y"], domain="com.microsoft", **facts)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 48])],
        [onnx.numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    y = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.allclose(y, x @ _expanded(weight, bits).T, atol=1e-4)


def test_a_grid_that_is_not_around_zero_is_found() -> None:
    random = np.random.default_rng(0)
    codes, zeros = random.integers(0, 16, (8, 4, BLOCK)), random.integers(0, 16, (8, 4, 1))
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (0.1 * (codes - zeros)).reshape(8, -1).astype(np.float32)
    assert np.allclose(_expanded(weight, 4), weight, atol=1e-6)


def test_words() -> None:
    assert parse_blocks("w4") == Blocks(4)
    assert parse_blocks("w8") == Blocks(8)
    assert parse_blocks("w4a8") is None
