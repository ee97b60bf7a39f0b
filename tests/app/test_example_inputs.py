"""What a model is called with on the command line."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normfuse.app.example_inputs import inputs_for, parse_shape, read_inputs
from normfuse.app.source_options import Options
from normfuse.app.sources import load_source
from normfuse.errors import UsageError
from tests.evil import Evil


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder that holds `mine.py`."""
    (tmp_path / "mine.py").write_text("from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 4))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        pytest.param("1x3x8x8", (None, (1, 3, 8, 8), None), id="sizes"),
        pytest.param("7", (None, (7,), None), id="one size"),
        pytest.param("ids=2x5:int64", ("ids", (2, 5), "int64"), id="all parts"),
    ],
)
def test_shapes_are_read(text: str, parsed: tuple[Any, ...]) -> None:
    assert parse_shape(text) == parsed


@pytest.mark.parametrize("text", ["", "1x", "axb", "1,3", "x=1x2:complex64", "1x2:", "=3", "-1x3"])
def test_shapes_that_cannot_be_read_are_errors(text: str) -> None:
    with pytest.raises(UsageError, match="--shape"):
        parse_shape(text)


def test_stated_shapes_make_inputs() -> None:
    found = load_source("mine:build", Options(shapes=("5x4",)))
    assert found.args[0].shape == (5, 4)
    assert found.args[0].dtype is torch.float32
    named = inputs_for(nn.Identity(), Options(shapes=("input=5x4:float64",)))[1]  # type: ignore[index]
    assert named["input"].dtype is torch.float64


def test_stated_masks_hold_padding() -> None:
    class Masked(nn.Module):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return mask

    named = inputs_for(Masked(), Options(shapes=("mask=2x8:int64",)))[1]  # type: ignore[index]
    assert named["mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8]


class Converts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.l(x.float()))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64"])
def test_inputs_of_another_dtype_are_told_where_the_model_does_not_take_them(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"--shape: input input is {dtype}, the model computes in float32, .*give it as float32"):
        load_source("mine:build", Options(shapes=(f"2x4:{dtype}",)))
    (x,), _ = inputs_for(Converts(), Options(shapes=(f"2x4:{dtype}",)))  # type: ignore[misc]
    assert x.dtype is getattr(torch, dtype)  # never converted silently


def test_input_file_of_another_dtype_is_told() -> None:
    np.save("wide.npy", np.zeros((2, 4)))
    with pytest.raises(UsageError, match=r"--input wide.npy: input input is float64, the model computes in float32"):
        load_source("mine:build", Options(input=Path("wide.npy")))


def test_inputs_that_no_memory_holds_are_an_error() -> None:
    for sizes in ("99999999999x99999999999", "1000000x1000000"):
        with pytest.raises(UsageError, match=f"--shape {sizes}: .* GiB of values do not fit"):
            load_source("mine:build", Options(shapes=(sizes,)))


def test_stated_ids_are_known_to_the_embedding() -> None:
    model = nn.Sequential(nn.Embedding(6, 2))
    (ids,), _ = inputs_for(model, Options(shapes=("4x50:int64",)))  # type: ignore[misc]
    assert ids.dtype is torch.int64
    assert set(ids.unique().tolist()) == set(range(6))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"shapes": ("1x4", "input=1x4")}, id="half named"),
        pytest.param({"shapes": ("input=1x4", "input=1x4")}, id="named twice"),
        pytest.param({"shapes": ("image=1x4",)}, id="unknown name"),
        pytest.param({"batch": 0}, id="empty batch"),
    ],
)
def test_impossible_inputs_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        load_source("mine:build", Options(**options))


def test_flags_that_contradict_are_errors() -> None:
    with pytest.raises(UsageError, match="one of them"):
        Options(shapes=("1x4",), input=Path("x.npz"))
    with pytest.raises(UsageError, match="--batch"):
        Options(shapes=("1x4",), batch=2)


def test_inputs_are_read_from_files() -> None:
    x, y = torch.randn(2, 4), torch.arange(3)
    np.savez("named.npz", input=x.numpy())
    np.savez("placed.npz", x.numpy(), y.numpy())
    np.save("one.npy", x.numpy())
    torch.save((x, y), "two.pt")
    torch.save(x, "one.pt")
    from safetensors.torch import save_file

    save_file({"input": x}, "named.safetensors")
    for name in ("named.npz", "named.safetensors"):
        found = read_inputs(Path(name))
        assert isinstance(found, dict)
        assert torch.equal(found["input"], x)
    for name in ("one.npy", "one.pt"):
        (only,) = read_inputs(Path(name))
        assert torch.equal(only, x)
    for name in ("placed.npz", "two.pt"):
        first, second = read_inputs(Path(name))
        assert torch.equal(first, x)
        assert torch.equal(second, y)
    assert torch.equal(load_source("mine:build", Options(input=Path("named.npz"))).kwargs["input"], x)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("x.csv", b"1,2", "expected .npz", id="other kind"),
        pytest.param("x.npz", b"no archive", "cannot be read", id="damaged"),
        pytest.param("x.pt", pickle.dumps(Evil()), "cannot be read as tensors", id="malicious pickle"),
        pytest.param("x.npy", None, "does not exist", id="missing"),
    ],
)
def test_input_files_that_cannot_be_read_are_errors(name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_inputs(Path(name))
    assert not Path("pwned").exists()


def test_input_file_of_objects_is_refused() -> None:
    np.save("objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):
        read_inputs(Path("objects.npy"))
    assert not Path("pwned").exists()
