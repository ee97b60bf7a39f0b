"""From the name of a model to a model: timm:NAME, torchvision:NAME, hf:DIR, FILE.pt2, package.module:factory, FILE.py:factory.

A file never runs code unless `trust` is given. A factory is the user's own code: importing it is the point.
"""

import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.checkpoints import load_weights
from normfuse.app.example_inputs import inputs_for
from normfuse.app.factories import find, here_on_path
from normfuse.app.hf_folder import check_folder, local_folder, model_class, offline
from normfuse.app.random_norms import randomise_norms
from normfuse.app.source_options import Options
from normfuse.errors import CaptureError, NormfuseError, UsageError, did_you_mean
from normfuse.export.targets import FOLDERS
from normfuse.extras import need

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Source", "load_source"]

_log = logging.getLogger(__name__)
_KINDS = "timm:NAME, torchvision:NAME, hf:DIR, FILE.pt2, package.module:factory or FILE.py:factory"


@dataclass(frozen=True)
class Source:
    """A model and what it is called with.

    Attributes:
        name: as the user wrote it.
        model: in eval mode, or a loaded `ExportedProgram`.
        args, kwargs: example inputs; both empty when `has_inputs` is False.
        has_inputs: example inputs are known.
        weights: where the weights are from, as far as it is known: `random (seed 0)`, `pretrained`, a file; else empty.
        data: what the example inputs are: `random data`, `the example inputs`, a file.
    """

    name: str
    model: "nn.Module | torch.export.ExportedProgram"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    has_inputs: bool = True
    weights: str = ""
    data: str = "the example inputs"

    @property
    def module(self) -> "nn.Module":
        """The model as something that can be called."""
        import torch

        return self.model.module() if isinstance(self.model, torch.export.ExportedProgram) else self.model

    @property
    def example_inputs(self) -> tuple[Any, ...] | dict[str, Any] | None:
        """As `normfuse.optimize` takes them: a tuple of positional inputs or a dict of keyword inputs."""
        if not self.has_inputs:
            return None
        if not self.kwargs:
            return self.args
        if not self.args:
            return self.kwargs
        names = list(inspect.signature(self.module.forward).parameters)
        return dict(zip(names, self.args, strict=False)) | self.kwargs


def load_source(source: str, options: Options | None = None) -> Source:
    """The model that `source` names, with example inputs where they are known.

    Raises:
        UsageError: nothing is called that, a file is of the wrong kind, an extra is missing, inputs do not fit.
        CaptureError: the user's factory raised, or weights could not be read.
    """
    options = options or Options()
    kind, _, rest = source.partition(":")
    if rest and kind in _LOADERS:
        loaded = _LOADERS[kind](rest, options)
    elif Path(source).suffix in _REFUSED or Path(source).suffix in (".pt", ".pth", ".pt2"):
        loaded = _Loaded(_from_file(Path(source), options))
    elif kind not in _LOADERS and kind and rest and not os.path.exists(source):
        loaded = _from_factory(source, options)
    else:
        raise UsageError(f"{source!r} names no model: expected {_KINDS}")
    import torch

    model, weights = loaded.model, loaded.weights
    if options.weights is not None:
        if not isinstance(model, torch.nn.Module):
            raise UsageError(f"--weights: {source} has its weights inside")
        load_weights(model, options.weights)
        weights = str(options.weights)
    if isinstance(model, torch.nn.Module) and not isinstance(model, torch.fx.GraphModule):
        model.eval()
    found = inputs_for(model, options, loaded.inputs)
    if found is None:
        return Source(source, model, has_inputs=False, weights=weights)
    own = loaded.inputs is not None and not loaded.drawn
    brought = own or isinstance(model, torch.export.ExportedProgram)
    data = str(options.input) if options.input else "the example inputs" if brought and not options.shapes else "random data"
    return Source(source, model, *found, weights=weights, data=data)


@dataclass(frozen=True)
class _Loaded:
    """What a source gives.

    Attributes:
        model: the model.
        inputs: what it brings along as example inputs.
        weights: where its weights are from, if that is known.
        drawn: the inputs are random.
    """

    model: Any
    inputs: Any = None
    weights: str = ""
    drawn: bool = False


def _where_from(options: Options) -> str:
    return "pretrained" if options.pretrained else f"random (seed {options.seed})"


def _timm(name: str, options: Options) -> _Loaded:
    timm = need("timm", extra="timm")
    known = timm.list_models()
    base = name.split(".")[0]
    if base not in known:
        raise UsageError(f"timm has no model {name!r}{did_you_mean(base, known, most=3)}")
    with _building(f"timm:{name}", options):
        model = timm.create_model(name, pretrained=options.pretrained)
    return _Loaded(_weights(model, options), weights=_where_from(options))


def _torchvision(name: str, options: Options) -> _Loaded:
    import torch

    need("torchvision", extra="torchvision")
    models = importlib.import_module("torchvision.models")
    known = models.list_models()
    if name not in known:
        raise UsageError(f"torchvision has no model {name!r}{did_you_mean(name, known, most=3)}")
    with _building(f"torchvision:{name}", options):
        weights: dict[str, Any] = {"weights": "DEFAULT" if options.pretrained else None}
        if not options.pretrained and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            weights["weights_backbone"] = None  # detectors would fetch those of their backbone
        model = models.get_model(name, **weights)
        crop = getattr(models.get_model_weights(name).DEFAULT.transforms, "keywords", {}).get("crop_size")
    side = crop[0] if isinstance(crop, (list, tuple)) else crop
    if ".video" in type(model).__module__ or not isinstance(side, int):
        return _Loaded(_weights(model, options), weights=_where_from(options))
    generator = torch.Generator().manual_seed(options.seed)
    image = torch.randn((options.batch or 1, 3, side, side), generator=generator)
    return _Loaded(_weights(model, options), (image,), _where_from(options), drawn=True)


def _hugging_face(folder: str, options: Options) -> _Loaded:
    transformers = need("transformers", extra="hf")
    path = local_folder(folder)
    transformers.utils.logging.disable_progress_bar()
    if not options.trust:
        check_folder(path)
    safe = {"local_files_only": True, "trust_remote_code": options.trust}
    try:
        with nullcontext() if options.trust else offline():
            config = transformers.AutoConfig.from_pretrained(path, **safe)
            custom = bool(getattr(config, "auto_map", None))
            name = next(iter(getattr(config, "architectures", None) or ()), None)
            cls = None if custom or name is None else model_class(transformers, name)
            if cls is None and not custom and name is not None:
                raise UsageError(f"hf:{folder} names the architecture {str(name)[:80]!r}: transformers has no model of that name")
            if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
                kept = safe if options.trust else safe | {"weights_only": True}
                model = (cls or transformers.AutoModel).from_pretrained(path, **kept).eval()
                return _Loaded(model, weights="those in the folder")
            _log.info("%s holds no weights: they are random", path)
            with _building(f"hf:{folder}", options):
                built = cls(config) if cls else transformers.AutoModel.from_config(config, trust_remote_code=options.trust)
            return _Loaded(_weights(built, options), weights=_where_from(options))
    except NormfuseError:
        raise
    except Exception as e:
        asks = "trust_remote_code" in str(e)
        remedy = "it brings code of its own; pass --trust if you know where it comes from" if asks else f"{type(e).__name__}: {e}"
        raise (UsageError if asks else CaptureError)(f"hf:{folder} could not be loaded: {remedy}") from e


_LOADERS = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}
_REFUSED = {
    ".safetensors": "it holds weights and not what to compute with them; pass it as --weights beside what builds the model "
    "(package.module:factory, timm:NAME, ...), or name hf:DIR for a Hugging Face folder",
    ".py": "name the factory in it, as FILE.py:factory",
    ".ckpt": "checkpoints hold weights; pass it as --weights beside what builds the model (package.module:factory, timm:NAME, ...)",
    ".bin": "it holds weights and not what to compute with them; pass it as --weights beside what builds the model, or use hf:DIR",
} | dict.fromkeys(
    (suffix for folder in FOLDERS.values() for suffix in folder.suffixes),
    "it is exported already; normfuse starts from the PyTorch model (inspect, bench, run and verify read such files, and export an "
    ".onnx file)",
)


def _from_file(path: Path, options: Options) -> Any:
    if path.suffix in _REFUSED:
        raise UsageError(f"{path} cannot be optimized: {_REFUSED[path.suffix]}")
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if path.suffix == ".pt2":
        from normfuse.pt2 import load_program

        return load_program(path, trust=options.trust)
    return _from_pickle(path, options)


def _from_pickle(path: Path, options: Options) -> "nn.Module":
    import torch

    if options.trust:
        here_on_path()  # a pickle names the modules of its classes; those of the current folder are the user's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript archives, which are refused below
            loaded = torch.load(path, map_location="cpu", weights_only=not options.trust)
    except Exception as e:
        if options.trust:
            raise CaptureError(f"{path} could not be loaded: {type(e).__name__}: {e}") from e
        raise UsageError(
            f"{path} holds a pickled object and not only tensors; loading it may run any code. Save the model with "
            "torch.export.save as .pt2 or name a factory; pass --trust if you know where the file comes from"
        ) from e
    if isinstance(loaded, torch.jit.ScriptModule):
        raise UsageError(f"{path} is a TorchScript archive, which holds no traceable module: start from the Python model")
    if not isinstance(loaded, torch.nn.Module):
        what = "a state dict: weights" if isinstance(loaded, Mapping) else f"an object of type {type(loaded).__name__}"
        raise UsageError(
            f"{path} holds {what} and not a model; pass it as --weights beside what builds the model (package.module:factory, "
            "FILE.py:factory, timm:NAME, ...)"
        )
    return loaded


def _from_factory(source: str, options: Options) -> _Loaded:
    import torch

    with _building(source, options):  # models may be built while the module is imported
        factory = find(source, _KINDS)
    if isinstance(factory, torch.nn.Module):
        return _Loaded(factory)
    if not callable(factory):
        raise UsageError(f"{source} is of type {type(factory).__name__}: expected a function that returns a torch.nn.Module")
    with _building(source, options):
        made = factory()
    own = None
    if isinstance(made, tuple) and len(made) == 2:
        made, own = made
    if not isinstance(made, (torch.nn.Module, torch.export.ExportedProgram)):
        raise UsageError(
            f"{source} returned an object of type {type(made).__name__}: expected a module, or a module and its example inputs"
        )
    return _Loaded(made, own)


@contextmanager
def _building(source: str, options: Options) -> Iterator[None]:
    """Builds are repeatable, leave the random generator alone, and fail with the name of the source."""
    import torch

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(options.seed)
        try:
            yield
        except NormfuseError:
            raise
        except Exception as e:
            hint = " (the weights could not be fetched; leave --pretrained out for random ones)" if options.pretrained else ""
            raise CaptureError(f"{source} could not be built: {type(e).__name__}: {e}{hint}") from e


def _weights(model: Any, options: Options) -> "nn.Module":
    """Random weights get random norm statistics: with means 0 and scales 1 every wrong fold would look right."""
    return model if options.pretrained else randomise_norms(model, seed=options.seed)
