"""Calls as they should not be: each is one clear line that says what was wrong and what to do, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant, export
from normfuse.errors import NormfuseError

X = torch.ones(2, 8)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()


class _Fast:
    """Optimized once, for all that only looks at arguments."""

    made: Any = None

    def __call__(self) -> Any:
        if self.made is None:
            type(self).made = normfuse.optimize(mlp(), (X,), verify="off")
        return self.made


fast = _Fast()
Misuse = tuple[str, Callable[[], Any], str]
MISUSES: list[Misuse] = [
    # what is optimized
    ("no model", lambda: normfuse.optimize(lambda x: x, (X,)), "expected a torch.nn.Module"),
    ("a path", lambda: normfuse.optimize("model.pt2", (X,)), "expected a torch.nn.Module"),
    ("a class", lambda: normfuse.optimize(nn.Linear, (X,)), "expected a torch.nn.Module"),
    ("a state dict", lambda: normfuse.optimize(mlp().state_dict(), (X,)), "expected a torch.nn.Module"),
    ("inputs: a number", lambda: normfuse.optimize(mlp(), 3), "a tuple of inputs or a dictionary"),
    ("inputs: too many", lambda: normfuse.optimize(mlp(), (X, X)), "does not run"),
    ("inputs: another width", lambda: normfuse.optimize(mlp(), (torch.ones(2, 9),)), "does not run on the example inputs"),
    ("inputs: integers", lambda: normfuse.optimize(mlp(), (torch.ones(2, 8, dtype=torch.int64),)), "int64"),
    ("inputs: an unknown name", lambda: normfuse.optimize(mlp(), {"y": X}), "y"),
    # choices
    ("verify", lambda: normfuse.optimize(mlp(), (X,), verify="ends"), "did you mean 'end'"),
    ("a pass", lambda: normfuse.optimize(mlp(), (X,), passes=["afine"]), "did you mean 'affine'"),
    ("passes: a string", lambda: normfuse.optimize(mlp(), (X,), passes="affine"), "expected a list of names"),
    ("passes: a number", lambda: normfuse.optimize(mlp(), (X,), passes=[3]), "neither a name nor a pass"),
    ("passes: a class", lambda: normfuse.optimize(mlp(), (X,), passes=[normfuse.passes.L1]), "pass an object of it"),
    ("quantize: words", lambda: normfuse.optimize(mlp(), (X,), quantize="w4a8,sttic"), "did you mean 'static'"),
    ("quantize: int8", lambda: normfuse.optimize(mlp(), (X,), quantize="int8"), "did you mean w8a8"),
    ("quantize: a number", lambda: normfuse.optimize(mlp(), (X,), quantize=8), "expected a normfuse.ShiftQuant"),
    ("quantize: a class", lambda: normfuse.optimize(mlp(), (X,), quantize=ShiftQuant), "without ()"),
    ("static without data", lambda: normfuse.optimize(mlp(), (X,), quantize="w8a8,static"), "pass calibration="),
    # calibration
    ("calibration: a tensor", lambda: normfuse.optimize(mlp(), (X,), quantize="w8a8", calibration=X), "iterable of batches"),
    ("calibration: empty", lambda: normfuse.optimize(mlp(), (X,), quantize="w8a8", calibration=[]), "no batch"),
    ("calibration: a shape", lambda: normfuse.optimize(mlp(), (X,), quantize="w8a8", calibration=[(X[:, :5],)]), "batch 0"),
    ("calibration: NaN", lambda: normfuse.optimize(mlp(), (X,), quantize="w8a8", calibration=[(X * float("nan"),)]), "holds NaN"),
    # a specification
    ("bits", lambda: ShiftQuant(weight_bits=16), "from 2 to 8"),
    ("bits: a text", lambda: ShiftQuant(weight_bits="4"), "an integer"),
    ("activations", lambda: ShiftQuant(activations="dynamik"), "did you mean 'dynamic'"),
    ("keep", lambda: ShiftQuant(keep=3), "patterns of module paths"),
    ("overrides: a name", lambda: ShiftQuant(overrides={"head": {"bits": 8}}), "cannot be set for a layer"),
    ("overrides: no dictionary", lambda: ShiftQuant(overrides=8), "{pattern: {field: value}}"),
    # files
    ("target", lambda: export.to_onnx(fast(), "x.onnx", target="onnxruntim"), "did you mean 'onnxruntime'"),
    ("opset", lambda: export.to_onnx(fast(), "x.onnx", opset=9), "opset 9"),
    ("dtype", lambda: export.to_onnx(fast(), "x.onnx", dtype="fp17"), "unknown dtype 'fp17'"),
    ("attention", lambda: export.to_onnx(fast(), "x.onnx", attention="mhaa"), "did you mean 'mha'"),
    ("form", lambda: export.to_onnx(fast(), "x.onnx", form="intger"), "did you mean 'integer'"),
    ("a form without quantized layers", lambda: export.to_onnx(fast(), "x.onnx", form="qdq"), "no quantized layers"),
    ("runtime", lambda: export.to_onnx(fast(), "x.onnx", runtime="newest"), "newest"),
    ("a keyword", lambda: export.to_onnx(fast(), "x.onnx", optset=17), "did you mean 'opset'"),  # type: ignore[call-arg]
    ("a folder that is not there", lambda: export.to_onnx(fast(), "nowhere/x.onnx"), "does not exist"),
    ("a file that is there", lambda: export.to_onnx(fast(), "there.onnx"), "exists already"),
    ("no inputs are known", lambda: export.to_onnx(mlp(), "x.onnx"), "example"),
    ("flavour", lambda: export.EngineOptions(flavour="rtx"), "unknown flavour"),
    ("plugins", lambda: export.EngineOptions(plugins=("rms_nrm",)), "did you mean 'rms_norm'"),
    # the result
    ("another size", lambda: fast()(torch.ones(3, 8)), "dynamic_shapes"),
    ("another dtype", lambda: fast()(X.double()), "float64"),
    ("one input too many", lambda: fast()(X, X), "positional inputs"),
    ("an unknown input", lambda: fast()(y=X), "input y is not one"),
    ("a report of another module", lambda: normfuse.report(mlp()), "no report"),
    ("save: another module", lambda: normfuse.save(mlp(), "x.pt2"), "what normfuse.optimize returned"),
    ("load: no file", lambda: normfuse.load("nowhere.pt2"), "nowhere.pt2"),
    ("load: another file", lambda: normfuse.load("there.onnx"), "there.onnx"),
    # the rest
    ("fold: verify", lambda: normfuse.fold(mlp(), (X,), verify="ends"), "did you mean 'end'"),
    ("convert", lambda: normfuse.nn.convert(mlp(), "unifed"), "did you mean 'unified'"),
    ("convert: an option", lambda: normfuse.nn.convert(mlp(), "rms", epss=1), "did you mean 'eps'"),
    ("bench: another file", lambda: normfuse.bench("a.pt2", "b.pt2"), "only .onnx, .engine"),
    ("bench: no callable", lambda: normfuse.bench(3, mlp()), "expected a module, a callable"),
    ("bench: training", lambda: normfuse.bench(mlp().train(), mlp(), X), "call .eval()"),
    ("bench: no time", lambda: normfuse.bench(mlp(), mlp(), X, seconds=0), "must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), [pytest.param(c, m, id=name) for name, c, m in MISUSES])
def test_misuse_is_one_clear_line(call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").write_text("mine")
    with pytest.raises((NormfuseError, TypeError)) as e:
        call()
    said = str(e.value)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert len(said) <= 600
    assert [p.name for p in Path().iterdir()] == ["there.onnx"]
    assert Path("there.onnx").read_text() == "mine"


def test_there_are_as_many_as_were_promised() -> None:
    assert len(MISUSES) >= 44
