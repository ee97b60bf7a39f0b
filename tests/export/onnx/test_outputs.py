"""Names of outputs, whatever class holds them; and errors of an export, which are one line."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import normfuse
from normfuse.errors import ExportError, NormfuseError
from normfuse.export import to_onnx
from normfuse.ir.trees import named_leaves

pytest.importorskip("onnx")


@dataclass
class Pair(OrderedDict):  # type: ignore[type-arg]
    """As the output classes of diffusers are made and registered: a pytree without a function for keys."""

    sample: Any = None
    extra: Any = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is not None:
                self[f.name] = getattr(self, f.name)


@dataclass
class Plain:
    left: Any
    right: Any


Point = namedtuple("Point", ["x", "y"])

pytree.register_pytree_node(
    Pair, pytree._dict_flatten, lambda v, c: Pair(**pytree._dict_unflatten(v, c)), serialized_type_name="tests.Pair"
)
pytree.register_pytree_node(
    Plain, lambda p: ([p.right, p.left], None), lambda v, c: Plain(v[1], v[0]), serialized_type_name="tests.Plain"
)


def test_leaves_are_named_after_keys_fields_and_places() -> None:
    value = [Pair(sample=1, extra={"a": Point(2, (3, 4))}), Plain(5, 6)]
    assert {".".join(p): v for p, v in named_leaves(value)} == {
        "0.sample": 1, "0.extra.a.x": 2, "0.extra.a.y.0": 3, "0.extra.a.y.1": 4, "1.left": 5, "1.right": 6,
    }  # fmt: skip
    assert [v for _, v in named_leaves(value)] == pytree.tree_leaves(value)


class Gives(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.make(y, y + 1)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        pytest.param(lambda a, b: Pair(sample=a, extra=b), ("sample", "extra"), id="output-class"),
        pytest.param(lambda a, b: Pair(extra=Plain(a, b)), ("extra.right", "extra.left"), id="nested"),
        pytest.param(lambda a, b: Point(a, b), ("x_out", "y"), id="named-tuple"),  # the input is called x
        pytest.param(lambda a, b: {"hidden": (a, b)}, ("hidden.0", "hidden.1"), id="mapping"),
    ],
)
def test_outputs_of_any_class_have_names(make: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    made = to_onnx(normfuse.optimize(Gives(make).eval(), (torch.randn(2, 4),)), tmp_path / "m.onnx", progress=False)
    assert made.outputs == names


class Unknown:
    def __init__(self, a: Tensor) -> None:
        self.a = a


def test_an_output_of_an_unknown_class_is_refused_in_one_line() -> None:
    with pytest.raises(NormfuseError, match="Unknown") as e:
        normfuse.optimize(Gives(lambda a, b: Unknown(a)).eval(), (torch.randn(2, 4),))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400


def test_models_of_diffusers_export(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    made = to_onnx(normfuse.optimize(model, (torch.randn(1, 3, 8, 8), torch.tensor([3]))), tmp_path / "m.onnx", progress=False)
    assert made.outputs == ("sample_out",)


class Bounded(nn.Module):
    """One value between the same tensors, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("lo", torch.tensor(-1.0))
        self.register_buffer("hi", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.q(torch.clamp(x, self.lo, self.hi)) + self.k(torch.clamp(x, self.lo, self.hi))


def test_bounds_that_are_tensors(tmp_path: Path) -> None:
    made = to_onnx(normfuse.optimize(Bounded().eval(), (torch.randn(2, 3, 8),)), tmp_path / "m.onnx", progress=False)
    assert made.error is not None
    assert made.error.max_rel < 1e-5


def test_an_operator_without_a_form_is_named_with_its_module(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), odd=Inner())).eval()
    with pytest.raises(ExportError, match=r"no ONNX form of prims\.bessel_j0") as e:
        to_onnx(model, tmp_path / "m.onnx", example_inputs=(torch.randn(2, 4),), progress=False)
    assert "\n" not in str(e.value)
    assert "(in odd)" in str(e.value)


def test_experts_are_exported_with_their_own_rows(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    made = to_onnx(
        normfuse.optimize(model, {"input_ids": ids}), tmp_path / "m.onnx", target="portable", attention="decomposed", progress=False
    )
    assert made.error is not None
    assert made.error.max_rel < 1e-5
    made = to_onnx(
        normfuse.optimize(model.bfloat16(), {"input_ids": ids}), tmp_path / "half.onnx", target="portable", progress=False
    )
    assert made.error is not None
    assert made.error.max_rel < 1e-5
    assert "bfloat16" in made.notes[0]
