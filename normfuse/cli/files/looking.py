"""What `normfuse inspect` says of a file that a runtime runs on the CPU."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from normfuse.cli.columns import columns, differences
from normfuse.cli.files.given import is_file, is_onnx
from normfuse.errors import UsageError

__all__ = ["show_both", "show_file"]


@dataclass(frozen=True)
class _Seen:
    """What is in a file.

    Attributes:
        facts: inputs, outputs and size among them; see `Facts` of its kind.
        ops, norms: number by type.
        origin: what normfuse wrote into it.
        needs: what runs it, in a line.
        versions: what its numbers are called, for a table of two files.
    """

    facts: Any
    ops: dict[str, int]
    norms: dict[str, int]
    origin: dict[str, str]
    needs: str
    versions: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"ops": self.ops, "norms": self.norms, "provenance": self.origin, **dataclasses.asdict(self.facts)}


def show_file(path: str, *, as_json: bool) -> None:
    """Inputs, outputs, what runs it, and the operators of the file."""
    from normfuse.reports.numbers import size

    seen = _seen(path)
    if as_json:
        click.echo(json.dumps({"schema": 1, "source": path, **seen.to_dict()}, indent=2))
        return
    lines = [f"{path}: {size(seen.facts.bytes)}, {sum(seen.ops.values())} nodes, {sum(seen.norms.values())} of them normalizations"]
    lines += [f"input   {name}: {kind}" for name, kind in seen.facts.inputs]
    lines += [f"output  {name}: {kind}" for name, kind in seen.facts.outputs]
    lines += [f"needs   {seen.needs}"]
    width = max((len(op) for op in seen.ops), default=0)
    lines += [f"  {op:<{width}} {n:>5}{'  norm' if op in seen.norms else ''}" for op, n in seen.ops.items()]
    for key, value in seen.origin.items():
        lines += textwrap.wrap(f"{key}: {value}", 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    click.echo("\n".join(lines))


def show_both(left: str, right: str, *, as_json: bool) -> None:
    """Two files side by side: what differs.

    Raises:
        UsageError: they are not of one kind, or none that is run on the CPU.
    """
    from normfuse.reports.numbers import size

    if not (is_file(left) and Path(left).suffix == Path(right).suffix):
        raise UsageError(f"inspect compares two .onnx files, or two .xml files, got {left} and {right}")
    seen = [_seen(path) for path in (left, right)]
    if as_json:
        files = [{"source": p, "ops": s.ops, **dataclasses.asdict(s.facts)} for p, s in zip((left, right), seen, strict=True)]
        click.echo(json.dumps({"schema": 1, "files": files}, indent=2))
        return
    rows = [("size", *(size(s.facts.bytes) for s in seen)), ("nodes", *(str(sum(s.ops.values())) for s in seen))]
    rows += [(name, *(str(s.versions.get(name, "-")) for s in seen)) for name in {**seen[0].versions, **seen[1].versions}]
    for word, of in (("input", [dict(s.facts.inputs) for s in seen]), ("output", [dict(s.facts.outputs) for s in seen])):
        rows += [(f"{word} {name}", *(o.get(name, "-") for o in of)) for name in {**of[0], **of[1]}]
    changed = differences(seen[0].ops, seen[1].ops)
    alike = len({**seen[0].ops, **seen[1].ops}) - len(changed)
    click.echo("\n".join(columns(("", Path(left).name, Path(right).name), [*rows, *changed])))
    click.echo(f"{alike} kinds of ops are as often in both" if alike else "no kind of op is as often in both")


def _seen(path: str) -> _Seen:
    return _onnx(path) if is_onnx(path) else _openvino(Path(path))


def _onnx(path: str) -> _Seen:
    from normfuse.export.onnx.inspect import facts, norm_counts, op_counts, provenance

    known = facts(path)
    domains = ", ".join(f"opset {version}" if not domain else f"{domain} {version}" for domain, version in known.opsets.items())
    runtime = f"ONNX Runtime {known.runtime} or newer, " if known.runtime else ""
    versions = {f"opset {domain}".strip(): version for domain, version in known.opsets.items()}
    needs = f"{runtime}{domains}, format {known.ir}"
    return _Seen(known, op_counts(path), norm_counts(path), provenance(path), needs, versions)


def _openvino(path: Path) -> _Seen:
    from normfuse.export.openvino.graph import facts, layer_counts, norm_counts, provenance

    known = facts(path)
    beside = path.with_suffix(".bin")
    needs = (
        f"OpenVINO, format {known.ir}, with {beside.name}{'' if beside.is_file() else ', which is not beside it,'} for its weights"
    )
    return _Seen(known, layer_counts(path), norm_counts(path), dict(provenance(path)), needs, {"format": known.ir})
