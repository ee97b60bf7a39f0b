"""Which ONNX Runtime runs which file: every form, target and opset, on a transformer and a convolution net, float and quantized.

    python -m benchmarks.runtimes write FOLDER                       the files, with inputs and expected outputs
    python -m benchmarks.runtimes run FOLDER NAME=PYTHON ...         all files in these environments; goes on where it stopped
    python -m benchmarks.runtimes table FOLDER                       what was found, as Markdown; exit 1 if anything is wrong

`.ci/runtimes` makes the environments and does all three. A runtime runs in a process of its own, which may die: the file that it
was at then counts as an abort, and the next process goes on behind it. A file is

    right      its outputs are those that were proven against the PyTorch module when it was written
    refused    the runtime is older than the oldest that the file states, and does not load it
    WRONG      other outputs;   FAILS: an error though the file says that it runs;   ABORTS: the process died
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from normfuse.export.options import Form
from normfuse.export.targets import TargetName

__all__ = ["Case", "main"]

OPSETS = range(17, 24)
TARGETS: tuple[TargetName, ...] = ("onnxruntime", "portable", "tensorrt")
BAD = ("WRONG", "FAILS", "ABORTS")
_WORKER = Path(__file__).with_name("runtimes_worker.py")


@dataclass(frozen=True)
class Case:
    """One file."""

    name: str
    model: str
    layers: str
    target: str
    form: str
    opset: int
    runtime: str
    ir: int


def _models() -> dict[str, tuple[Any, Any]]:
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self, d: int, heads: int) -> None:
            super().__init__()
            self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

        def forward(self, x: Any, mask: Any) -> Any:
            b, n, d = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            return self.out(y.transpose(1, 2).reshape(b, n, d))

    class Block(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.norm1, self.attention, self.norm2 = nn.LayerNorm(d), Attention(d, 4), nn.LayerNorm(d)
            self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

        def forward(self, x: Any, mask: Any) -> Any:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))

    class Transformer(nn.Module):
        def __init__(self, d: int = 64) -> None:
            super().__init__()
            self.table, self.blocks, self.norm = nn.Embedding(50, d), nn.ModuleList((Block(d), Block(d))), nn.LayerNorm(d)
            self.head = nn.Linear(d, 10)

        def forward(self, tokens: Any) -> Any:
            causal, padded = self.blocks
            x = causal(self.table(tokens), None)
            x = padded(x, (tokens > 4)[:, None, None, :])
            return self.head(self.norm(x).mean(1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
            self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.BatchNorm2d(32), nn.SiLU())
            self.left, self.right = (
                nn.Conv2d(32, 32, 1),
                nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.GELU("tanh")),
            )
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

        def forward(self, x: Any) -> Any:
            x = self.depthwise(self.stem(x))
            return self.head(self.left(x) + self.right(x))

    torch.manual_seed(0)
    models: dict[str, Any] = {"transformer": Transformer(), "convolutions": Net()}
    with torch.no_grad():
        for model in models.values():
            for name, t in model.state_dict().items():
                if "running_var" in name or (".weight" in name and t.ndim == 1):
                    t.uniform_(0.5, 2.0)
                elif "running_mean" in name or (".bias" in name and t.ndim == 1):
                    t.normal_(0, 0.3)
    inputs = {"transformer": torch.randint(0, 50, (2, 12)), "convolutions": torch.randn(2, 3, 24, 24)}
    return {name: (model.eval(), inputs[name]) for name, model in models.items()}


def _wanted() -> Iterator[tuple[str, TargetName, Form]]:
    """Layers, target, form."""
    for target in TARGETS:
        yield "float", target, "auto"
        for bits in ("w8a8", "w4a8"):
            if target == "onnxruntime":
                yield bits, target, "native"
                yield f"{bits} static", target, "native"
            if target != "tensorrt":
                yield bits, target, "integer"
            yield f"{bits} static", target, "qdq"
            if target != "onnxruntime":
                yield bits, target, "weight_only"


def write(folder: Path) -> None:
    """Export all files; what was written already stays."""
    import numpy as np
    import torch

    import normfuse
    from normfuse.export import to_onnx
    from normfuse.export.onnx.runtime import run, session

    folder.mkdir(parents=True, exist_ok=True)
    for kind, (model, x) in _models().items():
        ready: dict[str, Any] = {}
        for layers, target, form in _wanted():
            for opset in OPSETS:
                name = f"{kind}-{layers}-{target}-{form}-{opset}".replace(" ", "_")
                if (folder / f"{name}.json").exists():
                    continue
                if layers not in ready:
                    spec = None
                    if layers != "float":
                        activations: Literal["dynamic", "static"] = "static" if "static" in layers else "dynamic"
                        # shifted codes of 8 bits do not fit into what portable qdq files hold
                        groups = 1 if layers == "w8a8 static" else 4
                        spec = normfuse.ShiftQuant(
                            weight_bits=int(layers[1]), activations=activations, groups=groups, prefer="size", embedding_bits=8
                        )
                    batches = None if spec is None else [(x,)]
                    ready[layers] = normfuse.optimize(model, (x,), quantize=spec, calibration=batches, verify="off")
                path = folder / f"{name}.onnx"
                options: dict[str, Any] = {"target": target, "form": form, "opset": opset}
                try:
                    made = to_onnx(ready[layers], path, **options, threads=1, progress=False, force=True)
                except normfuse.NormfuseError as e:
                    (folder / f"{name}.json").write_text(json.dumps({"name": name, "not written": str(e)}))
                    print(f"{name}: not written: {e}", file=sys.stderr)
                    continue
                plain = session(path, threads=1, kernels=False)
                outputs = list(run(plain, {made.inputs[0]: x}).values())
                np.savez(folder / f"{name}.npz", x=x.numpy(), y=torch.as_tensor(outputs[0]).numpy())
                import onnx

                ir = onnx.load(path).ir_version
                case = Case(name, kind, layers, target, form, opset, made.runtime, ir)
                (folder / f"{name}.json").write_text(json.dumps(asdict(case)))


def _cases(folder: Path) -> list[Case]:
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if not p.name.startswith("found-")]
    return [Case(**c) for c in found if "not written" not in c]


def measure(folder: Path, environments: dict[str, str]) -> None:
    """Run all files in each environment, natives with and without the kernel library."""
    from normfuse import native

    library = str(native.path()) if native.available() else ""
    for version, python in environments.items():
        results = folder / f"found-{version}.jsonl"
        done = {(r["name"], r["kernels"]) for r in _read(results)}
        work = [(c, kernels) for c in _cases(folder) for kernels in ((False, True) if c.form == "native" and library else (False,))]
        todo = [(c, k) for c, k in work if (c.name, k) not in done]
        while todo:
            asked = json.dumps([[str(folder / c.name), library if k else ""] for c, k in todo])
            environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
            ran = subprocess.run([python, str(_WORKER)], input=asked, capture_output=True, text=True, env=environment, check=False)
            said = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
            if len(said) < len(todo):
                if len(said) == 0 and "ModuleNotFoundError" in ran.stderr:
                    raise SystemExit(f"{python}: {ran.stderr.strip().splitlines()[-1]}")
                last = (ran.stderr.strip().splitlines() or ["no message"])[-1][:300]
                said.append({"aborted": f"exit {ran.returncode}: {last}"})
            with results.open("a", encoding="utf-8") as f:
                for (case, kernels), result in zip(todo, said, strict=False):
                    f.write(json.dumps({"name": case.name, "kernels": kernels, **result}) + "\n")
            todo = todo[len(said) :]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def verdict(case: Case, version: str, result: dict[str, Any]) -> str:
    """One word; see the top of this file."""
    if "aborted" in result:
        return "ABORTS"
    if "error" in result:
        return "refused" if _release(version) < _release(case.runtime) else "FAILS"
    bound = 1e-4 if case.layers == "float" else 2e-2  # codes on a tie may be their neighbours
    return "right" if result["deviation"] <= bound else "WRONG"


def table(folder: Path) -> int:
    """Print it; the number of results that must not be."""
    cases = {c.name: c for c in _cases(folder)}
    versions = sorted((p.stem.removeprefix("found-") for p in folder.glob("found-*.jsonl")), key=_release)
    cells: dict[tuple[str, ...], dict[str, Counter[str]]] = {}
    bad: list[str] = []
    total: Counter[str] = Counter()
    for version in versions:
        for r in _read(folder / f"found-{version}.jsonl"):
            if (case := cases.get(r["name"])) is None:
                continue
            word = verdict(case, version, r)
            form = case.form if case.layers != "float" else "float"
            form += " with the library" if r["kernels"] else ""
            row = (form, case.target, str(case.opset))
            cells.setdefault(row, {}).setdefault(version, Counter())[word] += 1
            total[word] += 1
            if word in BAD:
                bad.append(f"{version} {case.name}{' +library' if r['kernels'] else ''}: {word} {r}")
    print("| form (target) | opset | " + " | ".join(versions) + " |")
    print("|---|---|" + "---|" * len(versions))
    for forms, opsets, found in _merged(cells, versions):
        print(f"| {forms} | {opsets} | " + " | ".join(found) + " |")
    print("\n" + ", ".join(f"{n} {word}" for word, n in total.most_common()))
    for line in bad:
        print(line, file=sys.stderr)
    return len(bad)


def _merged(cells: dict[tuple[str, ...], dict[str, Counter[str]]], versions: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Forms with equal results as one block, opsets with equal results as one row."""
    results: dict[tuple[str, str], dict[int, tuple[str, ...]]] = {}
    for (form, target, opset), found in cells.items():
        words = tuple("/".join(sorted(found.get(v, {"-": 1}))) for v in versions)
        results.setdefault((form, target), {})[int(opset)] = words
    blocks: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    for (form, target), rows in sorted(results.items()):
        blocks.setdefault(tuple(sorted(rows.items())), {}).setdefault(form, []).append(target)
    for block, forms in blocks.items():
        label = "; ".join(f"{form} ({', '.join(targets)})" for form, targets in forms.items())
        for words, opsets in itertools.groupby(block, key=lambda row: row[1]):
            first, *rest = [opset for opset, _ in opsets]
            yield label, f"{first}–{rest[-1]}" if rest else str(first), list(words)
            label = ""


def main(arguments: list[str]) -> int:
    """Run a command of the module."""
    match arguments:
        case ["write", folder]:
            write(Path(folder))
        case ["run", folder, *environments]:
            measure(Path(folder), dict(e.split("=", 1) for e in environments))
        case ["table", folder]:
            return 1 if table(Path(folder)) else 0
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
