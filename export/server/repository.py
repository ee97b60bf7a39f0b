"""A folder that NVIDIA Triton Inference Server loads: configuration, and one folder a version."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from normfuse import native
from normfuse.errors import UsageError
from normfuse.export.keywords import given, keywords_of
from normfuse.export.onnx.domains import domains
from normfuse.export.result import note_lines
from normfuse.export.server.batching import check_preferred, max_batch_size
from normfuse.export.server.config import CONFIG, FILE_NAMES, Serving, check_types, config_text
from normfuse.export.server.folders import replace, staging
from normfuse.export.server.notes import notes
from normfuse.export.server.options import ServeKeywords, ServeOptions
from normfuse.export.server.signature import Signature, of_engine
from normfuse.export.server.versions import agree, check_limits, model_folder, number_of, read, same_interface, shown, stays
from normfuse.export.server.warmup import Warmup, plan
from normfuse.export.tensorrt.engine import manifest_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Served", "check_place", "write_repository"]

_LIBRARY = "libnormfuse.so"


@dataclass(frozen=True)
class Served:
    """One version of a model in a repository.

    Attributes:
        path: the folder of the model, `<repository>/<name>`.
        version: the number of its folder.
        backend: `onnxruntime` or `tensorrt`.
        max_batch: requests of how many items the server runs at once; 0 when it does not put them together.
        files: everything that was written.
        notes: what the user should know.
    """

    path: Path
    version: int
    backend: str
    max_batch: int
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        batches = f"batches up to {self.max_batch}" if self.max_batch else "no batching"
        lines = [f"{self.path}: version {self.version}, {self.backend}, {batches}"]
        return "\n".join([*lines, *note_lines(self.notes)])


def check_place(folder: str | Path, name: str, *, version: int | Literal["next"] = 1, force: bool = False) -> None:
    """Raise what `write_repository` would say of these; long work calls it before it starts.

    Raises:
        UsageError: the name is none that clients can use, the version exists, or the folder cannot be written.
    """
    model = model_folder(Path(folder), name)
    number_of(model, version, force=force)
    place = next(p for p in (model, model.parent, model.parent.absolute().parent) if p.is_dir())
    if not os.access(place, os.W_OK):
        raise UsageError(f"cannot write {model}: the folder {place} is not writable")


@keywords_of(ServeOptions)
def write_repository(
    folder: str | Path,
    name: str,
    artifact: str | Path,
    options: ServeOptions | None = None,
    **keywords: Unpack[ServeKeywords],
) -> Served:
    """Put an ONNX file or a TensorRT engine into a model repository of NVIDIA Triton Inference Server.

    Writes `<folder>/<name>/config.pbtxt` and `<folder>/<name>/<version>/model.onnx` (or `model.plan`) with the files that belong
    to it. Versions of a model share the configuration: a version beside others must have their inputs and outputs, and the
    configuration that is there stays as it is unless `force` is on.

    Args:
        folder: the repository; made when its parent is there.
        name: what clients call the model.
        artifact: the ONNX file, or the engine with its manifest `<engine>.json` beside it.
        options: all that follows as one value; what is given by name goes before it.
        backend: which part of the server runs it; default: by the name of the file, `.onnx` or another.
        by_capability: engines for other GPUs by compute capability, e.g. `{"8.9": path}`; `artifact` serves all that are not named.
        max_batch: how many items the server runs at once; default: 64, or what the engine was built for. 0 turns batching off.
        preferred_batches: batch sizes that the server waits for within `queue_delay_us`.
        queue_delay_us: how long a request may wait for others; with 0 those run together that came while the model was busy.
        instances: copies of the model that run at the same time, on each GPU.
        device: where it runs; `auto` leaves it to the server, which takes a GPU where it has one.
        threads: CPU threads of an instance; default: one for each core.
        accelerator: `tensorrt` lets ONNX Runtime in the server build an engine when the model is loaded.
        precision: of that engine.
        warmup: run the model on zeros before the server says that it is ready.
        warmup_shapes: sizes by input, for the warm-up of a model with open axes; default: the engine's usual ones, or tried here.
        kernels: copy normfuse's CPU kernels into the repository and let the server load them; for a file that has normfuse's ops.
        server_folder: where the server sees `folder`; used for `kernels` only.
        version: number of the version, or `next` for one above those that are there.
        force: replace the version and the configuration.

    Raises:
        UsageError: an argument is wrong, a file is missing or cannot be served, the version exists, or nothing can be written.
    """
    chosen = given(ServeOptions, options, keywords, called="write_repository")
    folder, artifact = Path(folder), Path(artifact)
    runs = chosen.backend or ("onnxruntime" if artifact.suffix == ".onnx" else "tensorrt")
    chosen.check(runs)
    signature = read(artifact, runs)
    check_types(signature, runs)
    engines = _engines(chosen.by_capability or {}, runs, signature)
    limit = min(max_batch_size(s, chosen.max_batch) for s in (signature, *(s for _, s in engines.values())))
    check_preferred(chosen.preferred_batches, limit)
    model = model_folder(folder, name)
    number, others = number_of(model, chosen.version, force=chosen.force)
    older = agree(model, others, signature, runs)

    ours = runs == "onnxruntime" and "normfuse" in domains(artifact)
    library = f"{chosen.server_folder.rstrip('/')}/{name}/{_LIBRARY}" if chosen.kernels and ours else None
    warm = plan(artifact, signature, limit, chosen.warmup_shapes or {}) if chosen.warmup else Warmup(None)
    served = Serving(name, runs, signature, chosen, limit, {c: _engine_name(c) for c in engines}, warm.shapes, library)
    text = config_text(served)
    kept = stays(model, text, limit, force=chosen.force)
    if kept is None:
        check_limits(model, others, older, limit)
    files = {f"{number}/{place}": source for place, source in _sources(artifact, runs, signature, engines).items()}
    if library is not None:
        files[_LIBRARY] = native.path()
    _place(folder, name, number, files, text if kept is None else None, beside=bool(others))
    written = (*(model / place for place in files), *([model / CONFIG] if kept is None else []))
    return Served(model, number, runs, limit, written, (*notes(served, ours=ours), *filter(None, (warm.note, kept))))


def _place(folder: Path, name: str, number: int, files: Mapping[str, Path], config: str | None, *, beside: bool) -> None:
    """Copy the files, and the configuration unless the one that is there stays; the version appears whole."""
    with staging(folder) as stage:
        new = stage / name
        for place, source in files.items():
            (new / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, new / place)
        if config is not None:
            (new / CONFIG).write_text(config, encoding="utf-8")
        move = _add if beside else _put
        move(new, folder / name, stage, number)


def _engines(given: Mapping[str, str | Path], backend: str, signature: Signature) -> dict[str, tuple[Path, Signature]]:
    if given and backend != "tensorrt":
        raise UsageError("by_capability is for engines, and the artifact is an ONNX file, which serves every GPU")
    found = {}
    for capability, path in given.items():
        if not re.fullmatch(r"\d+\.\d", capability):
            raise UsageError(f"by_capability: {capability!r} is no compute capability, expected one like 8.9")
        other = of_engine(Path(path))
        check_types(other, backend)
        if not same_interface(other, signature):
            raise UsageError(f"by_capability: {path} has {shown(other)}, expected {shown(signature)} like the other engine")
        found[capability] = (Path(path), other)
    return found


def _engine_name(capability: str) -> str:
    return f"model_{capability.replace('.', '_')}.plan"


def _sources(artifact: Path, backend: str, signature: Signature, engines: Mapping[str, tuple[Path, Signature]]) -> dict[str, Path]:
    """Files of the version folder by their place in it."""
    main = FILE_NAMES[backend]
    found = {main: artifact}
    if backend == "onnxruntime":
        for side in signature.side_files:
            place = side.relative_to(artifact.parent).as_posix()
            if place in found:
                raise UsageError(
                    f"{artifact}: its weights are called {main}, as the server calls the model; export it under another name"
                )
            found[place] = side
        return found
    for file, path in ((main, artifact), *((_engine_name(c), path) for c, (path, _) in engines.items())):
        found[file] = path
        found[f"{file}.json"] = manifest_path(path)
    return found


def _put(new: Path, model: Path, stage: Path, number: int) -> None:
    """Rename the whole folder into place; what the user keeps in the old one comes along."""
    for old in model.iterdir() if model.is_dir() else ():
        if (new / old.name).exists() or old.name == str(number):
            continue
        if old.is_dir():
            shutil.copytree(old, new / old.name)
        else:
            shutil.copy2(old, new / old.name)
    replace(new, model, stage)


def _add(new: Path, model: Path, stage: Path, number: int) -> None:
    """Rename a version into place beside others, last: whoever sees it finds what it needs."""
    for place in (_LIBRARY, CONFIG, str(number)):
        if (new / place).exists():
            replace(new / place, model / place, stage)
