"""The smallest spec that fails in the same way, and the script that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.emit import HEADER, Invalid, emitted
from tests.fuzz.spec import Input, Mode, Spec, Step

__all__ = ["script", "shrink"]


def shrink(spec: Spec, fails: Callable[[Spec], bool], seconds: float = 60.0) -> Spec:
    """Greedy: the first simpler spec that still fails is taken, until none is left or the time is over.

    Args:
        spec: one that fails.
        fails: does a spec fail in the same way? Asked of specs that are models.
        seconds: about how long to try.
    """
    end = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for simpler in _simpler(spec):
            if time.monotonic() > end:
                break
            try:
                emitted(simpler)
            except Invalid:
                continue
            if fails(simpler):
                spec, progress = simpler, True
                break
    return spec


def _simpler(spec: Spec) -> Iterator[Spec]:
    """Candidates, the boldest first."""
    plain = Mode(with_inputs=spec.mode.with_inputs)
    for mode in (plain, replace(spec.mode, dynamic=""), replace(spec.mode, keywords=False), replace(spec.mode, verify="off")):
        if mode != spec.mode:
            yield replace(spec, mode=mode)
    for mode in (replace(spec.mode, export=""), replace(spec.mode, quantize=None), replace(spec.mode, passes=None)):
        if mode != spec.mode:
            yield replace(spec, mode=mode)
    names = [s.name for s in spec.steps]
    if spec.structure != "tensor":
        for name in dict.fromkeys(spec.outputs):
            yield _needed(replace(spec, outputs=(name,), structure="tensor"))
    if spec.structure == "tensor":
        for name in [*(i.name for i in spec.inputs), *names[:-1]]:
            if spec.outputs != (name,) and name in [*names, *(i.name for i in spec.inputs if i.given and i.is_tensor)]:
                yield _needed(replace(spec, outputs=(name,)))
    for step in reversed(spec.steps):
        for read in step.reads:
            yield _needed(_without(spec, step, read))
    if spec.dtype != "float32":
        yield replace(spec, dtype="float32")
    for step in spec.steps:  # an input in the place of what a step reads
        for read in step.reads:
            for i in spec.inputs:
                if i.given and i.is_tensor and read not in [j.name for j in spec.inputs]:
                    yield _needed(_reading(spec, step, read, i.name))


def _without(spec: Spec, step: Step, instead: str) -> Spec:
    """Readers of `step` read what it read."""
    new = lambda name: instead if name == step.name else name  # noqa: E731
    steps = tuple(replace(s, reads=tuple(map(new, s.reads))) for s in spec.steps if s is not step)
    return replace(spec, steps=steps, outputs=tuple(map(new, spec.outputs)))


def _reading(spec: Spec, step: Step, old: str, new: str) -> Spec:
    reads = tuple(new if r == old else r for r in step.reads)
    return replace(spec, steps=tuple(replace(s, reads=reads) if s is step else s for s in spec.steps))


def _needed(spec: Spec) -> Spec:
    """Without arguments that nobody reads; without steps that nobody reads and that write nothing in place."""
    steps, wanted = [], set(spec.outputs)
    for step in reversed(spec.steps):
        if step.name in wanted or step.block == "write_in_place" or any(o.startswith("self.") for o in spec.outputs):
            steps.append(step)
            wanted |= set(step.reads)
    inputs: tuple[Input, ...] = tuple(i for i in spec.inputs if i.name in wanted)
    return replace(spec, steps=tuple(reversed(steps)), inputs=inputs or spec.inputs[:1])


def script(spec: Spec, comment: str = "") -> str:
    """A program that builds the model, optimizes it and shows both results."""
    mode = spec.mode
    lines = [HEADER, "", emitted(spec), ""]
    lines += [f"torch.manual_seed({spec.seed})", f"torch.set_default_dtype(torch.{spec.dtype})"]
    lines += ["model = trained(randomise_norms(Model())).eval()", "torch.set_default_dtype(torch.float32)"]
    given = [i for i in spec.inputs if i.given]
    for i in given:
        match i.kind:
            case "number" | "flag":
                lines.append(f"{i.name} = {i.value!r}")
            case "ids":
                lines.append(f"{i.name} = torch.randint(0, 16, {i.shape})")
            case _:
                lines.append(f"{i.name} = torch.randn{i.shape}.to(torch.{spec.dtype})")
    names = ", ".join(i.name for i in given)
    pairs = ", ".join(f'"{i.name}": {i.name}' for i in given)
    example = f"{{{pairs}}}" if mode.keywords else f"({names},)"
    call = ", ".join(f"{i.name}={i.name}" for i in given) if mode.keywords else names
    arguments = ["model", example if mode.with_inputs else "None", f'verify="{mode.verify}"']
    if mode.dynamic and mode.with_inputs:
        lines.append('batch, size = torch.export.Dim("batch", max=64), torch.export.Dim("size", max=64)')
        arguments.insert(2, f"dynamic_shapes={_shapes(spec)}")
    if mode.passes is not None:
        arguments.append(f"passes={list(mode.passes)}")
    if mode.quantize is not None:
        w, a = mode.quantize
        arguments.append(f'quantize=normfuse.ShiftQuant(weight_bits={w}, activation_bits={a}, prefer="size")')
    lines += ["with torch.no_grad():", f"    expected = model({call})", f"    fast = normfuse.optimize({', '.join(arguments)})"]
    lines += [f"    found = fast({call})", "print(expected, found, sep='\\n')"]
    if mode.export:
        lines += ["from normfuse.export import to_onnx", f'to_onnx(fast, "/tmp/m.onnx", target="{mode.export}", force=True)']
    return "\n".join(lines) + "\n" + "".join(f"# {line}\n" for line in comment.splitlines())


def _shapes(spec: Spec) -> str:
    axes = {"image": (2, 3), "tokens": (1,), "sequence": (2,), "volume": (2, 3, 4), "ids": (1,)}

    def one(i: Input) -> str:
        if not i.is_tensor:
            return "None"
        sizes = axes.get(i.kind, ()) if spec.mode.dynamic != "batch" else ()
        return "{" + ", ".join(["0: batch", *(f"{a}: size" for a in sizes)]) + "}"

    given = [i for i in spec.inputs if i.given]
    if spec.mode.keywords:
        return "{" + ", ".join(f'"{i.name}": {one(i)}' for i in given) + "}"
    return "(" + ", ".join(map(one, given)) + ",)"
