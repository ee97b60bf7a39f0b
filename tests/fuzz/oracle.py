"""One case: the model is optimized, and everything that must hold of the result is held against the original."""

from __future__ import annotations

import copy
import random
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import CaptureError, ExportError, NormfuseError, UsageError
from normfuse.export import to_onnx
from tests.fuzz.compare import BOUNDS, aliases, decibels, deviation, form, tensors
from tests.fuzz.emit import Model, build, draw
from tests.fuzz.spec import Input, Spec

__all__ = ["Failure", "Outcome", "arguments", "judge"]

#: passes that change the function by intention: nothing but the form of the outputs is compared
CHANGES = {"l1", "depth_scale", "cancel"}

_SIZES = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default}


@dataclass(frozen=True)
class Failure:
    """What does not hold.

    Attributes:
        kind: the same for all failures of a kind, whatever the model: shrinking keeps it.
        detail: numbers, names, the end of a traceback.
    """

    kind: str
    detail: str = ""


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        state: `ok`, `refused` (why is in `note`; torch refuses the model too, or there are no inputs), `failed`, or `invalid`
            (the seed gives no model).
        failures: all of them.
        note: the reason of a refusal, or that the original's outputs jump between candidates.
        applied: rewrites.
    """

    state: str = "ok"
    failures: list[Failure] = field(default_factory=list)
    note: str = ""
    applied: int = 0
    blocks: tuple[str, ...] = ()
    seconds: float = 0.0

    def fail(self, kind: str, detail: str = "") -> None:
        self.state = "failed"
        if kind not in {f.kind for f in self.failures}:
            self.failures.append(Failure(kind, detail[:2000]))


def judge(spec: Spec) -> Outcome:
    """Try one case; never raises for what the product does."""
    start, outcome = time.perf_counter(), Outcome()
    with warnings.catch_warnings(), torch.no_grad(), _undisturbed():
        warnings.simplefilter("ignore")
        try:
            model = build(spec)
            expected = _call(model.module, spec, 0)
        except Exception as e:  # the generator's own models run; a shrunk one need not
            return Outcome("invalid", note=f"{type(e).__name__}: {e}"[:300])
        outcome.blocks = model.blocks
        _try(spec, model, expected, outcome)
    outcome.seconds = time.perf_counter() - start
    return outcome


# -- the call ----------------------------------------------------------------------------------------------------------


def arguments(
    spec: Spec, again: int = 0, grow: tuple[int, int] = (0, 0), other: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; `again` draws other values, `other` turns flags and numbers."""
    values = {}
    for i in spec.inputs:
        if i.given:
            value = draw(i, spec.dtype, spec.seed, again, grow=grow)
            values[i.name] = _other(value) if other and not i.is_tensor else value
    return ((), values) if spec.mode.keywords else (tuple(values.values()), {})


def _other(value: Any) -> Any:
    return not value if isinstance(value, bool) else value + 1


def _call(module: nn.Module, spec: Spec, again: int, grow: tuple[int, int] = (0, 0), other: bool = False) -> Any:
    args, kwargs = arguments(spec, again, grow, other)
    return module(*args, **kwargs)


def _example(spec: Spec) -> Any:
    args, kwargs = arguments(spec)
    return kwargs if spec.mode.keywords else args


def _shapes(spec: Spec) -> Any:
    """`dynamic_shapes`: one name for every batch, one for every length, height and width."""
    if not spec.mode.dynamic:
        return None
    batch, size = torch.export.Dim("batch", max=64), torch.export.Dim("size", max=64)

    def one(i: Input) -> Any:
        if not i.is_tensor:
            return None
        axes = {"image": (2, 3), "tokens": (1,), "sequence": (2,), "volume": (2, 3, 4), "ids": (1,)}.get(i.kind, ())
        return {0: batch} | (dict.fromkeys(axes, size) if spec.mode.dynamic != "batch" else {})

    given = [i for i in spec.inputs if i.given]
    return {i.name: one(i) for i in given} if spec.mode.keywords else tuple(one(i) for i in given)


# -- what must hold ----------------------------------------------------------------------------------------------------


def _try(spec: Spec, model: Model, expected: Any, outcome: Outcome) -> None:
    mode = spec.mode
    where = "" if mode.with_inputs else "without inputs: "
    original, before = model.module, _state(model.module)
    example, shapes = _example(spec), _shapes(spec)
    values = list(example.values()) if isinstance(example, dict) else list(example)
    kept = copy.deepcopy(values)
    quantize = None
    if mode.quantize is not None:
        quantize = normfuse.ShiftQuant(weight_bits=mode.quantize[0], activation_bits=mode.quantize[1], prefer="size")
    rng = (torch.get_rng_state().clone(), random.getstate())
    try:
        fast = normfuse.optimize(
            original,
            example if mode.with_inputs else None,
            dynamic_shapes=shapes if mode.with_inputs else None,
            passes=mode.passes,
            quantize=quantize,
            verify=mode.verify,
        )
    except CaptureError as e:
        _refused(spec, original, e, outcome)
        fast = None
    except UsageError as e:
        if quantize is not None and "quantize= has quantized no" in str(e):
            outcome.state, outcome.note = "refused", _said(e)
        else:
            outcome.fail(f"{where}optimize raises UsageError: {_said(e)}", str(e))
        fast = None
    except NormfuseError as e:
        outcome.fail(f"{where}optimize raises {type(e).__name__}: {_said(e)}", str(e))
        fast = None
    except Exception as e:
        outcome.fail(f"{where}optimize raises {type(e).__name__}: {_said(e)}", traceback.format_exc()[-1500:])
        fast = None
    _untouched(original, before, values, kept, rng, outcome)
    if fast is None:
        return
    report = normfuse.report(fast)
    outcome.applied = len(report.applied)
    if report.undone:
        site = report.undone[0]
        outcome.fail(f"undone: {site.rule}: {_words(site.note)}", str(report.undone))
    _compare(spec, model, fast, where, outcome)
    if outcome.state != "ok":
        return
    if mode.with_inputs:
        _other_calls(spec, model, fast, outcome)
    if mode.passes is None and mode.quantize is None:
        _again(spec, fast, example, where, outcome)
    if mode.export and mode.with_inputs:
        _exported(spec, model, fast, outcome)


def _compare(spec: Spec, model: Model, fast: nn.Module, where: str, outcome: Outcome) -> None:
    """The result called twice: on the example, and on other values of its shapes."""
    changes = bool(CHANGES & set(spec.mode.passes or ()))
    for again in (0, 1):
        args, kwargs = arguments(spec, again)
        ours, theirs = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
        expected = model.module(*theirs[0], **theirs[1])
        try:
            found = fast(*ours[0], **ours[1])
        except UsageError as e:
            if spec.mode.with_inputs or "captured as the constant" not in str(e):
                outcome.fail(f"{where}the result raises UsageError: {_said(e)}", str(e))
            elif not outcome.failures:  # a trace without inputs takes an optional one for its default
                outcome.state, outcome.note = "refused", _said(e)
            return
        except Exception as e:
            outcome.fail(f"{where}the result raises {type(e).__name__}: {_said(e)}", traceback.format_exc()[-1500:])
            return
        wrong = form(expected, found)
        if wrong is not None:
            outcome.fail(f"{where}wrong {wrong.kind}", wrong.detail)
            return
        if spec.mode.quantize is not None:
            _quantized(spec, model, expected, found, outcome)
            continue
        if not changes:
            _values(spec, model, expected, found, again, where, outcome)
        inputs = [[*ours[0], *ours[1].values()], [*theirs[0], *theirs[1].values()]]
        was, now = aliases(model.module, inputs[1], expected), aliases(fast, inputs[0], found)
        for a, b in zip(was, now, strict=True):
            if a != b:
                outcome.fail(f"{where}memory: {a} became {b}", f"{was} became {now}")


def _values(
    spec: Spec,
    model: Model,
    expected: Any,
    found: Any,
    again: int,
    where: str,
    outcome: Outcome,
    grow: tuple[int, int] = (0, 0),
    name: str = "",
) -> None:
    a, b = tensors(expected), tensors(found)
    error = deviation(a, b)
    bound = max(BOUNDS[name] for name in _dtypes(spec, model, a))
    if error <= bound:
        return
    noise = _noise(spec, model, a, again, grow, error)
    if error <= 16 * noise + bound:
        outcome.note = f"the original's own rounding moves its outputs by {noise:.1e}"
        return
    wrong = "wrong value" if error != float("inf") else "NaN or Inf elsewhere"
    if not name and spec.mode.with_inputs and _torch_is_wrong(spec, model, a, again, bound):
        wrong += " (of torch.export itself)"
    outcome.fail(f"{where}{name}{wrong}", f"error {error:.2e}, bound {bound:.1e}, the original's rounding {noise:.1e}")


def _dtypes(spec: Spec, model: Model, outputs: list[Tensor]) -> set[str]:
    """The dtypes that values are rounded to: the model's, those of the outputs, and those that its code asks for."""
    body = model.source[model.source.index("def forward") :]
    casts = {".float()": "float32", "float32": "float32", ".half()": "float16", "float16": "float16", "bfloat16": "bfloat16"}
    names = {
        dtype for word, dtype in casts.items() if word in body.replace("bfloat16", "bf") or (word == "bfloat16" and word in body)
    }
    outs = {str(t.dtype).removeprefix("torch.") for t in outputs}
    return {spec.dtype} | names | (outs & set(BOUNDS))


def _noise(spec: Spec, model: Model, expected: list[Tensor], again: int, grow: tuple[int, int], error: float) -> float:
    """How far the original is from itself: in float64, and with inputs and weights moved by one rounding."""
    args, kwargs = arguments(spec, again, grow)
    worst = 0.0
    if spec.dtype != "float64":
        try:
            wide = copy.deepcopy(model.module).double()
            worst = deviation(tensors(wide(*_double(args), **_double(kwargs))), expected)
        except Exception:  # a dtype is written in its code
            worst = 0.0
    unit = torch.finfo(getattr(torch, spec.dtype)).eps
    generator = torch.Generator().manual_seed(spec.seed)

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        step = (torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1) * max(unit, torch.finfo(t.dtype).eps)
        return (t.double() * (1 + step)).to(t.dtype)

    for _ in range(16):
        if error <= 16 * worst:
            break
        shaken = copy.deepcopy(model.module)
        for t in (*shaken.parameters(), *shaken.buffers()):
            t.data.copy_(moved(t.data))
        found = shaken(*(moved(v) for v in copy.deepcopy(args)), **{k: moved(v) for k, v in copy.deepcopy(kwargs).items()})
        worst = max(worst, deviation(expected, tensors(found)))
    return worst


def _double(values: Any) -> Any:
    wide = lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return {k: wide(v) for k, v in values.items()} if isinstance(values, dict) else tuple(wide(v) for v in values)


def _torch_is_wrong(spec: Spec, model: Model, expected: list[Tensor], again: int, bound: float) -> bool:
    try:
        args, kwargs = arguments(spec)
        program = torch.export.export(model.module, args, kwargs, dynamic_shapes=_shapes(spec), strict=False)
        args, kwargs = arguments(spec, again)
        return deviation(expected, tensors(program.module()(*args, **kwargs))) > bound
    except Exception:
        return False


def _quantized(spec: Spec, model: Model, expected: Any, found: Any, outcome: Outcome) -> None:
    """Integers of b bits keep about 6 b dB of a layer; a few layers, norms and cancellation in sums take some of it."""
    if model.decides:
        return
    assert spec.mode.quantize is not None
    floor = 6.02 * min(spec.mode.quantize) - 20
    reached = decibels(tensors(expected), tensors(found))
    if reached < floor:
        outcome.fail("quantized: far from the float model", f"{reached:.1f} dB, floor {floor:.1f} dB")


def _other_calls(spec: Spec, model: Model, fast: nn.Module, outcome: Outcome) -> None:
    """Another size where it may vary: the same function. Where it may not, and for other numbers: the same, or an error of ours."""
    free = spec.mode.dynamic
    tries = [((1, 0), False, bool(free)), ((0, 2), False, free == "batch and size")]
    if any(i.given and not i.is_tensor for i in spec.inputs):
        tries.append(((0, 0), True, False))
    if any("rnn" in name for name, _ in model.module.named_children()) and not free:
        return  # torch's own LSTM of another batch ends the process; see docs/testing.md
    for grow, other, promised in tries:
        name = "another number: " if other else f"another {'batch' if grow[0] else 'size'}{'' if promised else ' than captured'}: "
        try:
            expected = _call(model.module, spec, 0, grow, other)
        except Exception:  # the original does not take it
            continue
        try:
            found = _call(fast, spec, 0, grow, other)
        except NormfuseError as e:
            if promised:
                outcome.fail(f"{name}refused: {_said(e)}", str(e))
            continue
        except Exception as e:
            outcome.fail(f"{name}raises {type(e).__name__}", str(e)[:600])
            continue
        wrong = form(expected, found)
        if wrong is not None:
            outcome.fail(f"{name}wrong {wrong.kind}", wrong.detail)
        elif spec.mode.quantize is None and not CHANGES & set(spec.mode.passes or ()):
            _values(spec, model, expected, found, 0, "", outcome, grow, name)


def _again(spec: Spec, fast: Any, example: Any, where: str, outcome: Outcome) -> None:
    try:
        given = spec.mode.with_inputs  # sizes that were free stay free: fixed ones would let more be folded
        twice = normfuse.optimize(fast, example if given else None, dynamic_shapes=_shapes(spec) if given else None, verify="off")
    except Exception as e:
        outcome.fail(f"{where}optimizing the result raises {type(e).__name__}: {_said(e)}", traceback.format_exc()[-1500:])
        return
    was, now = _operators(fast), _operators(twice)
    if was != now:
        outcome.fail(f"{where}not idempotent", f"lost {dict(was - now)}, new {dict(now - was)}")


def _operators(gm: Any) -> Counter[str]:
    """How often each operator on tensors occurs; torch writes one free size in several ways, such as x.numel() as a·b."""
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    return Counter(str(t) for t in targets if t is getitem or not (isinstance(t, type(pow)) or t in _SIZES))


def _refused(spec: Spec, original: nn.Module, e: CaptureError, outcome: Outcome) -> None:
    """A refusal is right where torch.export refuses too; without inputs it always is."""
    outcome.state, outcome.note = "refused", _said(e)
    if not spec.mode.with_inputs:
        return
    args, kwargs = arguments(spec)
    try:
        torch.export.export(original, args, kwargs, dynamic_shapes=_shapes(spec), strict=False)
    except Exception:
        return
    outcome.fail(f"refused what torch.export takes: {_said(e)}", str(e))


def _exported(spec: Spec, model: Model, fast: nn.Module, outcome: Outcome) -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.onnx")
        try:
            to_onnx(fast, path, target=spec.mode.export, measure_seconds=0.1, threads=1, progress=False)
        except ExportError as e:
            if not re.search(r"has no (bfloat16|float64) kernels|does not take bfloat16", str(e)):
                outcome.fail(f"export: {_said(e)}", str(e))
            elif not outcome.failures:
                outcome.state, outcome.note = "refused", _said(e)
            return
        except Exception as e:
            outcome.fail(f"export raises {type(e).__name__}: {_said(e)}", traceback.format_exc()[-1500:])
            return
        if spec.mode.quantize is not None or spec.dtype not in ("float32", "float64") or CHANGES & set(spec.mode.passes or ()):
            return  # compared by `to_onnx`, with the module
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        args, kwargs = arguments(spec, 1)
        feed = {
            i.name: v.numpy()
            for i, v in zip([i for i in spec.inputs if i.given], [*args, *kwargs.values()], strict=True)
            if i.is_tensor
        }
        kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64}  # a float64 model may have a file in float32
        feed = {i.name: feed[i.name].astype(kinds.get(i.type, feed[i.name].dtype)) for i in session.get_inputs() if i.name in feed}
        expected = tensors(model.module(*args, **kwargs))
        try:
            found = [torch.as_tensor(v) for v in session.run(None, feed)]
        except Exception as e:
            outcome.fail(f"the file raises {type(e).__name__}: {_said(e)}", str(e)[:800])
            return
        if len(found) == len(expected) and not model.decides:
            error = deviation(expected, found)
            if error > 1e-3 and error > 64 * _noise(spec, model, expected, 1, (0, 0), error):
                outcome.fail("the file computes something else", f"error {error:.2e}")


# -- the original stays ------------------------------------------------------------------------------------------------


def _state(module: nn.Module) -> dict[str, Any]:
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    return {
        "tensors": {k: (id(v), v.detach().clone(), v.requires_grad) for k, v in own.items()},
        "modules": [(k, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in module.named_modules()],
    }


def _untouched(original: nn.Module, before: dict[str, Any], values: list[Any], kept: list[Any], rng: Any, outcome: Outcome) -> None:
    after = _state(original)
    if before["modules"] != after["modules"]:
        outcome.fail("the original's modules, mode or hooks changed")
    a, b = before["tensors"], after["tensors"]
    if a.keys() != b.keys() or any(a[k][0] != b[k][0] or a[k][2] != b[k][2] or not _same(a[k][1], b[k][1]) for k in a):
        outcome.fail("the original's parameters or buffers changed")
    if any(isinstance(v, Tensor) and not _same(v, w) for v, w in zip(values, kept, strict=True)):
        outcome.fail("the example inputs changed")
    if not torch.equal(rng[0], torch.get_rng_state()) or rng[1] != random.getstate():
        outcome.fail("the random state changed")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random states as before: a case does not change the next one."""
    python = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)


# -- words -------------------------------------------------------------------------------------------------------------


def _said(e: BaseException) -> str:
    return _words(next((line.strip() for line in str(e).splitlines() if line.strip()), ""))


def _words(text: str) -> str:
    """A message without what differs from model to model: numbers, names of values and modules, paths."""
    text = re.sub(r"/\S+", "PATH", text)
    text = re.sub(r"\b[a-z_]*\d[\w.]*\b", "N", text)
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)", "(…)", text)
    return text[:140]
