"""The flags of `normfuse export`: what is to be written, and where."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from normfuse.cli.bundled import Telling, bundled
from normfuse.cli.options import names, spelled
from normfuse.errors import UsageError
from normfuse.export.options import ATTENTION, FORMS, IO_DTYPES, EngineOptions, ExportOptions
from normfuse.export.targets import FOLDERS, TARGETS, Folder
from normfuse.export.tensorrt.flavour import FLAVOURS

__all__ = ["BACKENDS", "Asked", "Place", "asked_options", "form_option", "place_options"]

#: What runs a model in a server; with the last one its ONNX Runtime builds a TensorRT engine when the model is loaded.
BACKENDS = ("onnxruntime", "tensorrt", "onnxruntime+tensorrt")
_NAMES = tuple(f"NAME{folder.suffixes[0]}" for folder in FOLDERS.values())
_WRITES = tuple(f"NAME{folder.suffixes[0]} ({folder.what})" for folder in FOLDERS.values())


@dataclass(frozen=True)
class Asked:
    """What is to be written; see `ExportOptions` and `EngineOptions`, whose fields these are."""

    target: str | None
    opset: int | None
    runtime: str | None
    attention: Any
    tune: bool
    form: Any
    int4: bool
    dtype: Any
    io_dtype: Any
    profiles: tuple[str, ...]
    flavour: Any
    capabilities: tuple[str, ...]
    plugins: str | None

    def engine_only(self) -> str | None:
        """The first flag that is given and is about engines."""
        flags = {
            "--shapes": self.profiles, "--flavour": self.flavour, "--capability": self.capabilities, "--plugins": self.plugins,
        }  # fmt: skip
        return next((flag for flag, value in flags.items() if value), None)

    def of(self, folder: Folder, telling: Telling, *, force: bool = False) -> Any:
        """The options of a target's folder, whose fields are flags here.

        Raises:
            UsageError: a flag is wrong, or such a file has nothing to do with it.
        """
        known = {field.name for field in dataclasses.fields(folder.options)}
        flags: dict[str, tuple[str, Any]] = {
            "target": ("--target", self.target), "opset": ("--opset", self.opset), "runtime": ("--runtime", self.runtime),
            "attention": ("--attention", None if self.attention == "auto" else self.attention),
            "tune": ("--tune", self.tune), "form": ("--form", None if self.form == "auto" else self.form),
            "int4_initializers": ("--int4", self.int4), "dtype": ("--dtype", self.dtype),
            "io_dtype": ("--io-dtype", None if self.io_dtype == "fp32" else self.io_dtype),
            "shapes": ("--shapes", self.profiles), "flavour": ("--flavour", self.flavour),
            "capabilities": ("--capability", self.capabilities), "plugins": ("--plugins", names(self.plugins)),
        }  # fmt: skip
        asked = {field: value for field, (_, value) in flags.items() if value}
        if "target" in asked and "target" not in known:  # such a file is for one target alone
            del asked["target"]
        for field in asked:
            if field not in known:
                raise UsageError(f"{flags[field][0]} has no meaning for {folder.what}: leave it out")
        return folder.options(**asked, force=force, progress=not telling.quiet)

    def file(self, telling: Telling, *, target: str | None = None, force: bool = False) -> ExportOptions:
        """As an ONNX file; for `target` unless another is asked for.

        Raises:
            UsageError: a flag is wrong.
        """
        where: Any = self.target or target or "onnxruntime"
        return ExportOptions(
            target=where, opset=self.opset, runtime=self.runtime, attention=self.attention, tune=self.tune, form=self.form,
            int4_initializers=self.int4, dtype=self.dtype, io_dtype=self.io_dtype, force=force, progress=not telling.quiet,
        )  # fmt: skip

    def engine(self, telling: Telling, *, force: bool = False) -> EngineOptions:
        """As an engine.

        Raises:
            UsageError: a flag is wrong, or about ONNX files.
        """
        if self.runtime is not None or self.attention != "auto" or self.tune:
            raise UsageError("--runtime, --attention and --tune are for ONNX files, and what is to be written is an engine")
        if self.int4:
            raise UsageError("--int4 is for ONNX files; an engine packs 4-bit weights anyway")
        plugins: Any = names(self.plugins)
        return EngineOptions(
            opset=self.opset, form=self.form, dtype=self.dtype, io_dtype=self.io_dtype, shapes=self.profiles,
            flavour=self.flavour, capabilities=self.capabilities, plugins=plugins, force=force,
            progress=not telling.quiet,
        )  # fmt: skip


form_option = click.option(
    "--form",
    type=click.Choice(FORMS),
    default="auto",
    show_default=True,
    help="What quantized layers become: ops of normfuse's kernels, standard integer ops, QuantizeLinear pairs, or packed weights.",
)

asked_options = bundled(
    "asked",
    Asked,
    click.option(
        "--target",
        metavar="|".join(TARGETS),
        help="Where the file is to run; portable: standard ops alone.  [default: by the name of the file, for .onnx onnxruntime]",
    ),
    click.option("--opset", type=int, help="ONNX opset.  [default: the best one for the target]"),
    click.option("--runtime", metavar="X.Y", help="The oldest ONNX Runtime that must run the file, e.g. 1.20.  [default: any]"),
    click.option(
        "--attention",
        type=click.Choice(ATTENTION),
        default="auto",
        show_default=True,
        help="How attention is written; auto goes by a table of measurements, and with --tune by measuring here.",
    ),
    click.option("--tune", is_flag=True, help="Measure which forms are fastest on this machine; found once, then remembered."),
    form_option,
    click.option("--int4", is_flag=True, help="Keep 4-bit weights as INT4 in integer and qdq files: smaller, slower to load."),
    click.option(
        "--dtype",
        metavar="fp32|fp16|bf16|fp64",
        callback=spelled(),
        help="Of weights and products; statistics of norms stay in fp32.  "
        "[default: the model's, or the nearest that the target takes]",
    ),
    click.option("--io-dtype", type=click.Choice(IO_DTYPES), default="fp32", show_default=True, help="Of inputs and outputs."),
    click.option(
        "--shapes",
        "profiles",
        multiple=True,
        metavar="NAME=MIN:OPT:MAX",
        help="Engine: sizes of an input, e.g. x=1x3x224x224:8x3x224x224:64x3x224x224.",
    ),
    click.option("--flavour", type=click.Choice(FLAVOURS), help="Engine: which TensorRT.  [default: what is installed]"),
    click.option(
        "--capability", "capabilities", multiple=True, metavar="X.Y", help="Engine: compute capability to build for, e.g. 8.9."
    ),
    click.option(
        "--plugins", metavar="NAMES", help="Engine: ops that become normfuse's own kernels, e.g. rms_norm,shiftquant_linear."
    ),
)


@dataclass(frozen=True)
class Place:
    """Where it is written to; see `normfuse.export.server.write_repository` for a repository."""

    output: Path | None
    dry_run: bool
    repository: Path | None
    name: str | None
    model_version: str | None
    backend: str | None

    def check(self) -> None:
        """Raises UsageError where nothing says where to write, or two flags do."""
        if self.repository is None:
            for flag, value in (("--name", self.name), ("--backend", self.backend), ("--model-version", self.model_version)):
                if value is not None:
                    raise UsageError(f"{flag} is for --repository")
            if self.output is None:
                raise UsageError(f"pass -o {' or -o '.join(_NAMES)}, or --repository DIR")
        elif self.output is not None:
            raise UsageError("-o and --repository both say where to write: pass one of them")
        elif self.dry_run:
            raise UsageError("--dry-run asks about an engine: pass -o NAME.engine instead of --repository")


place_options = bundled(
    "place",
    Place,
    click.option("-o", "--output", type=click.Path(path_type=Path), help=f"What to write: {', '.join(_WRITES)}."),
    click.option("--dry-run", is_flag=True, help="Engine: say which nodes TensorRT takes, and write nothing."),
    click.option(
        "--repository",
        type=click.Path(path_type=Path),
        help="Write a model repository of NVIDIA's Triton Inference Server into this folder.",
    ),
    click.option("--name", help="Repository: name of the model.  [default: from SOURCE]"),
    click.option("--model-version", help="Repository: number of the version, or next.  [default: 1]"),
    click.option("--backend", type=click.Choice(BACKENDS), help="Repository: what runs it.  [default: onnxruntime]"),
)
