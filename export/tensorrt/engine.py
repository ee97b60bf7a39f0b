"""An engine file, and the manifest beside it: what it takes and gives, what it was built from, and a hash that says it is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError
from normfuse.export.tensorrt.layers import Layer, kinds
from normfuse.reports.model import Error

__all__ = ["Engine", "Tensor", "log_path", "manifest_path", "read_manifest", "sha256"]

_SCHEMA = 1


@dataclass(frozen=True)
class Tensor:
    """One input or output: its name, element type (`float16`) and sizes, -1 where they may vary."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('?' if size < 0 else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Engine:
    """One engine, as it was built.

    Attributes:
        path: the file; its manifest is `<file>.json` and the builder's log `<file>.log`.
        module: `tensorrt_rtx` or `tensorrt`.
        version: of it; an engine runs with this version only.
        capabilities: compute capabilities that were asked for; empty for what the builder takes by itself.
        dtype: in which the products are done: `fp32`, `fp16` or `bf16`.
        bytes, sha256: of the file. The same model, version and machine type give the same bytes.
        weight_bytes, activation_bytes: what the engine holds on the GPU; None where the builder did not say.
        inputs, outputs: the signature.
        profiles: sizes by input name: {"min": [...], "opt": [...], "max": [...]}; fixed inputs are not in it.
        layers: fused layers.
        plugins: number of normfuse's own kernels by op type; with any, the reader must register the plugins.
        passes: (name, number of sites) of each pass of `normfuse.optimize`, in order.
        form: what quantized layers became; None without any.
        error: deviation of the ONNX file, in this precision, from the module in ONNX Runtime; None where it was not run.
        seconds: time of parsing and building.
        notes: what else the user should know.
    """

    path: Path
    module: str
    version: str
    capabilities: tuple[str, ...]
    dtype: str
    bytes: int
    sha256: str
    weight_bytes: int | None
    activation_bytes: int | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: dict[str, dict[str, list[int]]]
    layers: tuple[Layer, ...]
    plugins: dict[str, int] = field(default_factory=dict)
    passes: tuple[tuple[str, int], ...] = ()
    form: str | None = None
    error: Error | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, int]:
        """Number of fused layers by what they do."""
        return kinds(self.layers)

    def manifest(self) -> dict[str, Any]:
        """What stands in the JSON file beside the engine."""
        data = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("path", "seconds")}
        return {"schema": _SCHEMA, "file": self.path.name, "kinds": self.kinds, **data}

    def to_json(self) -> str:
        """The manifest as text: a key a line, and a layer a line."""
        rows = []
        for key, value in self.manifest().items():
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
                items = ",\n".join(f"  {json.dumps(item)}" for item in value)
                rows.append(f" {json.dumps(key)}: [\n{items}\n ]")
            else:
                rows.append(f" {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(rows) + "\n}\n"

    def __str__(self) -> str:
        """A few lines of at most 80 columns."""
        built = f", {sum(self.seconds.values()):.1f} s" if self.seconds else ""
        lines = [f"{self.path}: {self.module} {self.version}, {self.dtype}, {self.bytes / 1e6:.1f} MB{built}"]
        rows = {
            "for": ", ".join(self.capabilities) or "every GPU generation that this TensorRT builds for",
            "inputs": ", ".join(map(str, self.inputs)),
            "outputs": ", ".join(map(str, self.outputs)),
            "profile": ", ".join(f"{name} {_sizes(sizes)}" for name, sizes in self.profiles.items()),
            "memory": ", ".join(
                f"{name} {size / 1e6:.1f} MB"
                for name, size in (("weights", self.weight_bytes), ("activations up to", self.activation_bytes))
                if size is not None
            ),
            "layers": f"{len(self.layers)}: " + ", ".join(f"{n} {k}" for k, n in self.kinds.items()) if self.layers else "",
            "plugins": ", ".join(f"{n} {k}" for k, n in self.plugins.items()),
            "quantized": self.form or "",
            "error": "not compared" if self.error is None else f"{self.error.max_rel:.1e} relative, the ONNX file in ONNX Runtime",
        }  # fmt: skip
        for name, text in [*rows.items(), *(("note", n) for n in self.notes)]:
            if text:
                lines += textwrap.wrap(f"  {name:<10} {text}", 80, subsequent_indent=" " * 13, break_on_hyphens=False)
        return "\n".join(lines)


def _sizes(profile: Mapping[str, Sequence[int]]) -> str:
    return ":".join("x".join(map(str, profile[end])) for end in ("min", "opt", "max"))


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def log_path(engine: Path) -> Path:
    """Where the log of an engine's builder lies."""
    return engine.with_name(f"{engine.name}.log")


def sha256(path: Path) -> str:
    """Hash of the file at `path`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(engine: Path) -> Engine | None:
    """The engine at `engine` as its manifest tells; None without a manifest.

    Raises:
        UsageError: there is a manifest that cannot be read.
    """
    place = manifest_path(engine)
    if not place.is_file():
        return None
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        if data["schema"] != _SCHEMA:
            raise UsageError(f"{place}: written by another version of normfuse (schema {data['schema']}, expected {_SCHEMA})")
        return _engine(engine, data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{place} is no manifest of an engine ({type(e).__name__}: {e}); build the engine again") from e


def _engine(path: Path, data: Mapping[str, Any]) -> Engine:
    known = {f.name for f in dataclasses.fields(Engine)}
    given: dict[str, Any] = {k: v for k, v in data.items() if k in known}
    given |= {side: tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in data[side]) for side in ("inputs", "outputs")}
    given["layers"] = tuple(Layer(x["name"], x["type"], tuple(x["constants"]), tuple(x["onnx"])) for x in data["layers"])
    given["passes"] = tuple((name, count) for name, count in data["passes"])
    given |= {k: tuple(data[k]) for k in ("capabilities", "notes")}
    given["error"] = None if data["error"] is None else Error(**data["error"])
    return Engine(path=path, **given)
