"""One model of the zoo: capture, rewrite, hold the result against the model as it was given, optimize again, export."""

from __future__ import annotations

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import normfuse
from benchmarks.zoo_models import Subject
from normfuse.app.random_norms import randomise_norms
from normfuse.errors import NormfuseError
from normfuse.given.calls import calls_of
from normfuse.pipeline.partial import OptimizedPart
from normfuse.proof.prove import Proof
from normfuse.reports.model import Site
from normfuse.reports.report import Report

__all__ = [
    "Row", "counted", "error_between", "first_line", "in_float64", "measure", "normalized", "outputs_of", "relative_error",
    "without_cache",
]  # fmt: skip

_FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4}
_CALLS = 4  # of a part, each of other sizes
_NOISE = 30.0
"""A result may be this many times as far from the model in float64 as the model itself is in its own dtype."""


@dataclass
class Row:
    """What became of one model.

    Attributes:
        name: `library:model`; `family`: the module that defines it; `group`: what it was the smallest of.
        status: `whole`, `parts` (partial=True), `refused`, `raised` (an error that is not normfuse's), `unusable` (the model
            itself does not run), `timeout`, `memory`, `crashed`.
        message: first line of the error.
        parameters: number of values.
        norms_before, norms_after: by kind.
        refused, undone: [reason, rule, number of sites].
        exact, drift: as the report says.
        native: relative errors against the model as given, on the example and on random inputs; of parts, the worst of theirs.
        double: that of the model in float64, optimized without a proof; `no_double` says why there is none.
        noise: relative error of the original in its own dtype against itself in float64.
        again: rewrites that a second `optimize` applies.
        nodes: of the graphs; `parts`: number of submodules that were optimized.
        seconds: CPU seconds of `optimize`, on one thread; `proving`: of it, comparing.
        exported: None where not tried, "" where it went well, else the first line of the error.
    """

    name: str
    family: str = ""
    group: str = ""
    status: str = ""
    message: str = ""
    parameters: int = 0
    norms_before: dict[str, int] = field(default_factory=dict)
    norms_after: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[str, str, int]] = field(default_factory=list)
    undone: list[tuple[str, str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    exact: float | None = None
    drift: float | None = None
    native: list[float] = field(default_factory=list)
    double: list[float] = field(default_factory=list)
    no_double: str = ""
    noise: float | None = None
    again: int | None = None
    nodes: int = 0
    parts: int = 0
    seconds: float = 0.0
    proving: float = 0.0
    exported: str | None = None

    @property
    def wrong(self) -> bool:
        """Is the result further from the model than rounding explains?"""
        noise = self.noise or 0.0
        native = max(_FLOOR[torch.float32], _NOISE * noise)
        double = max(_FLOOR[torch.float64], _NOISE * noise * 2**-29)
        return any(not e <= native for e in self.native) or any(not e <= double for e in self.double)


def measure(subject: Subject, *, export: bool = False, told: Callable[[Row], None] = lambda row: None) -> dict[str, Any]:
    """Everything about one model, as plain data; `told` is given the row so far after each stage."""
    row = Row(subject.name, subject.family, subject.group)
    try:
        torch.manual_seed(0)
        model = randomise_norms(subject.build().eval(), seed=0)
        declared, args, kwargs = subject.inputs(model)
        row.parameters = sum(p.numel() for p in model.parameters())
        plain = without_cache(model)
        kwargs.pop("use_cache", None)
        expected = outputs_of(plain, args, kwargs)
    except Exception as e:
        row.status, row.message = "unusable", first_line(e)
        return asdict(row)
    told(row)
    given = None if declared else (args or kwargs)
    fast = _optimized(model, given, row)
    if fast is None:
        return asdict(row)
    told(row)
    try:
        row.native.append(error_between(plain, fast, args, kwargs, expected))
    except Exception as e:
        row.status, row.message = "raised", f"the result does not run: {first_line(e)}"
        return asdict(row)
    other = _drawn(args, kwargs)
    with suppress(Exception):  # random inputs are an extra: a model may take none but its own
        second = outputs_of(plain, *other)
        row.native.append(error_between(plain, fast, *other, second))
    told(row)
    _in_float64(plain, args, kwargs, expected, row)
    told(row)
    if isinstance(fast, fx.GraphModule):
        try:
            row.again = len(normfuse.report(normfuse.optimize(fast, verify="off")).applied)
        except Exception as e:
            row.status, row.message = "raised", f"the result cannot be optimized again: {first_line(e)}"
    if export:
        row.exported = _exported(fast)
    return asdict(row)


def _optimized(model: nn.Module, given: Any, row: Row) -> nn.Module | None:
    """The result, its figures written into the row; None where there is none."""
    fast: Any = None
    begin = process_time()
    with _clock() as proving:
        for partial in (False, True):
            try:
                fast = _optimize(model, given, partial=partial)
                row.status = "parts" if partial else "whole"
                break
            except NormfuseError as e:
                row.status, row.message = "refused", row.message or first_line(e)
            except Exception as e:
                row.status, row.message = "raised", first_line(e)
                break
    row.seconds, row.proving = process_time() - begin, proving[0]
    if fast is None:
        return None
    found: Report = normfuse.report(fast)
    row.norms_before, row.norms_after = dict(found.norms_before), dict(found.norms_after)
    row.exact = None if found.exact is None else found.exact.max_rel
    row.drift = None if found.drift is None else found.drift.max_rel
    row.refused, row.undone, row.notes = counted(found.refused), counted(found.undone), list(found.notes)
    row.parts = sum(part.report is not None for part in found.parts)
    if row.status == "parts" and not row.parts:
        row.status = "refused"
    row.nodes = sum(len(m.graph.nodes) for m in fast.modules() if isinstance(m, fx.GraphModule))
    return fast  # type: ignore[no-any-return]


def _optimize(model: nn.Module, given: Any, *, partial: bool, verify: str = "end") -> nn.Module:
    return normfuse.optimize(model, given, verify=verify, **({"partial": True} if partial else {}))  # type: ignore[arg-type]


def without_cache(model: nn.Module) -> nn.Module:
    """A copy that returns no cache, as what `optimize` returns."""
    plain = copy.deepcopy(model)
    for part in plain.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
    return plain


def _in_float64(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[Tensor], row: Row) -> None:
    """Error of the rewrites alone: the model in float64 against its optimized self, nothing proven and nothing taken back."""
    parts = row.status == "parts"
    truth, error, row.no_double = in_float64(
        model, args, kwargs, lambda twin, inputs: _optimize(twin, inputs, partial=parts, verify="off")
    )
    row.noise = None if parts or truth is None else relative_error(truth, expected)
    row.double += [] if error is None else [error]


def in_float64(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], make: Callable[[nn.Module, Any], nn.Module]
) -> tuple[list[Tensor] | None, float | None, str]:
    """Outputs of the model in float64, the error of what `make` makes of it there, and why there is none.

    Args:
        model: it is copied.
        args, kwargs: what it is called with; one of them is empty.
        make: takes the model in float64 and its inputs.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    truth = None
    try:
        twin = copy.deepcopy(model).double()
        wide, named = pytree.tree_map_only(Tensor, _wide, (args, kwargs))
        with _Widened():  # type: ignore[no-untyped-call]
            truth = outputs_of(twin, wide, named)
        if not _wanted(truth):
            return truth, None, "the model computes in a dtype of its own"
        made = make(twin, wide or named)
        with _Widened():  # type: ignore[no-untyped-call]
            return truth, error_between(twin, made, wide, named, truth), ""
    except Exception as e:
        return truth, None, first_line(e)
    finally:
        torch.set_default_dtype(before)


class _Widened(TorchDispatchMode):
    """Casts to float32 that a model asks for by name go to float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide_dtype, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def error_between(
    model: nn.Module, fast: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[Tensor]
) -> float:
    """The error of the result; of its parts, on what they receive in the model, where it has some.

    Detectors choose boxes, and with random weights many have the same score: a rounding changes the choice, not the function.
    """
    found = outputs_of(fast, args, kwargs)
    parts = {path: part for path, part in fast.named_modules() if isinstance(part, OptimizedPart)}
    if not parts:
        return relative_error(expected, found)
    modules = {path: model.get_submodule(path) for path in parts}
    calls = calls_of(model, [(args, kwargs)], list(modules.values()), _CALLS)
    worst = 0.0
    for path, module in modules.items():
        for tensors in calls[module]:
            call = parts[path].signature.call(tensors)
            worst = max(worst, relative_error(outputs_of(module, *call), outputs_of(parts[path], *call)))
    return worst


def _wanted(outputs: list[Tensor]) -> bool:
    return all(t.dtype in (torch.float64, torch.complex128) or not (t.is_floating_point() or t.is_complex()) for t in outputs)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def outputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors of what the model returns; inputs are clones, random numbers the same each time."""
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model(*args, **kwargs)
    return [t.clone() for t in pytree.tree_leaves(_plain(out)) if isinstance(t, Tensor)]


def _plain(out: Any) -> Any:
    """Output classes of transformers that are no pytree are read as the mappings that they are."""
    if hasattr(out, "to_tuple"):
        return _plain(out.to_tuple())
    if isinstance(out, (tuple, list)):
        return [_plain(v) for v in out]
    return {k: _plain(v) for k, v in out.items()} if isinstance(out, dict) else out


def _drawn(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Other inputs of the same kind: integers keep their values in another order, floats are drawn."""
    generator = torch.Generator().manual_seed(1)

    def one(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator).to(x.dtype)
        return x.flatten()[torch.randperm(x.numel(), generator=generator)].reshape(x.shape)

    return pytree.tree_map_only(Tensor, one, (args, kwargs))  # type: ignore[no-any-return]


def relative_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest relative error over the outputs, in float64; infinite where number, shapes or places of NaN and Inf differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    return max((_deviation(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)


def _deviation(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float(not torch.equal(a, b))
    a, b = (t.to(torch.complex128 if a.is_complex() else torch.float64) for t in (a, b))
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale, difference = float(a[finite].abs().max()), float((a[finite] - b[finite]).abs().max())
    return difference / max(scale, 1e-30)


def _exported(fast: nn.Module) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            normfuse.export.to_onnx(fast, Path(folder) / "model.onnx")
        except Exception as e:
            return first_line(e)
    return ""


@contextmanager
def _clock() -> Iterator[list[float]]:
    """Seconds within `Proof`, counted once where one method calls another."""
    spent, depth = [0.0], [0]
    own = {n: f for n, f in vars(Proof).items() if callable(f)}

    def timed(f: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            begin = process_time()
            try:
                return f(*args, **kwargs)
            finally:
                depth[0] -= 1
                spent[0] += process_time() - begin if depth[0] == 0 else 0.0

        return call

    for name, f in own.items():
        setattr(Proof, name, timed(f))
    try:
        yield spent
    finally:
        for name, f in own.items():
            setattr(Proof, name, f)


def normalized(note: str) -> str:
    """A reason without the names and numbers of one model."""
    note = re.sub(r"[A-Za-z_][\w]*(?:\.[\w]+)+", "…", note)
    note = re.sub(r"`[^`]*`|'[^']*'", "…", note)
    return re.sub(r"\d+(?:\.\d+)?(?:e-?\d+)?", "#", note)


def counted(sites: tuple[Site, ...]) -> list[tuple[str, str, int]]:
    counts = Counter((normalized(s.note), s.rule) for s in sites)
    return [(note, rule, n) for (note, rule), n in counts.most_common()]


def first_line(e: BaseException) -> str:
    line = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {line}"[:400]
