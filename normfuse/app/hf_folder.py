"""What a Hugging Face folder may ask of `transformers`: a model of the library with weights of its own, and nothing else.

A `config.json` can also name code beside it, kernels and backbones of other repositories, files elsewhere, and packages that
unpack weights. None of these is needed to describe a model: a folder that asks for one is refused before the library
sees it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError
from normfuse.extras import need

__all__ = ["check_folder", "local_folder", "model_class", "offline"]

_LONGEST = 2**26  # bytes of a JSON file; tables of labels and shards are long
_ATTENTION = frozenset((None, "eager", "sdpa", "flex_attention"))
_DTYPES = frozenset((None, "auto", "float64", "float32", "float16", "bfloat16", "half", "float", "double"))
#: Fields whose value is code, a package, or something to fetch, wherever they stand.
_REFUSED = {
    "auto_map": "it brings code of its own",
    "custom_pipelines": "it brings code of its own",
    "quantization_config": "its weights are packed for another library, which would be imported",
    "compression_config": "its weights are packed for another library, which would be imported",
    "kernel_config": "it names kernels to fetch",
    "use_kernels": "it names kernels to fetch",
    "gguf_file": "it names another file",
    "checkpoint_path": "it names another file",
    "pretrained_cfg_overlay": "it names another file",
}
#: Fields that fetch what they name when they are true.
_FETCHES = frozenset(("pretrained", "use_pretrained_backbone", "use_pretrained", "trust_remote_code"))
#: Fields that name a model of another library.
_NAMES = frozenset(("architecture", "backbone", "model_name"))


def local_folder(name: str) -> Path:
    """The folder that `hf:NAME` names: a folder of that name, else the newest copy of the model in the local cache.

    Nothing is fetched.

    Raises:
        UsageError: there is neither.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not path.exists():
        hub = need("huggingface_hub", extra="hf")
        found = hub.try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found).parent
        raise UsageError(
            f"hf:{name} is not a local Hugging Face folder, and the local cache has no such model: "
            f"download it first (hf download {name}), or name its folder"
        )
    raise UsageError(f"hf:{name} is not a local Hugging Face folder: expected {path / 'config.json'}; download it first")


def check_folder(folder: Path) -> None:
    """Complain about anything in a folder that would run, import or fetch something.

    Raises:
        UsageError: there is such a thing, or `config.json` cannot be read; the message says what and where.
    """
    for fault in _faults(folder):
        raise UsageError(f"hf:{folder} could run or fetch something ({fault}); pass --trust if you know where it comes from")


def model_class(transformers: Any, name: Any) -> Any:
    """The class of models that is called so; None when the library has no such class of models."""
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and found is not transformers.PreTrainedModel else None


@contextmanager
def offline() -> Iterator[None]:
    """No request to the hub succeeds within the block: whatever a folder asks for is not fetched."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _faults(folder: Path) -> Iterator[str]:
    if (folder / "adapter_config.json").exists():
        yield "adapter_config.json names another model"
    for file in [folder / "config.json", *sorted(folder.glob("*.index.json"))]:
        value = _read(file, folder)
        if file.name == "config.json":
            if not isinstance(value, dict):
                raise UsageError(f"hf:{folder} is no model: {file.name} holds no object")
            yield from _in_config(value, file.name)
        else:
            shards = value.get("weight_map") if isinstance(value, dict) else None
            for shard in shards.values() if isinstance(shards, dict) else ():
                if not _is_own_file(shard):
                    yield f"{file.name} takes weights from {str(shard)[:80]!r}"


def _read(file: Path, folder: Path) -> Any:
    try:
        if file.stat().st_size > _LONGEST:
            raise UsageError(f"hf:{folder} is no model: {file.name} is longer than {_LONGEST} bytes")
        return json.loads(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"hf:{folder} is no model: {file.name} cannot be read as JSON ({e or type(e).__name__})") from e


def _in_config(value: Any, where: str) -> Iterator[str]:
    """Faults of one object and of what stands in it: parts of a model have configurations of their own."""
    if isinstance(value, list):
        for inner in value:
            yield from _in_config(inner, where)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        place = f"{where}: {key}"
        if key in _REFUSED and inner not in (None, False, {}, []):
            yield f"{place}, {_REFUSED[key]}"
        elif key in _FETCHES and inner not in (None, False):
            yield f"{place}, it asks for weights from elsewhere"
        elif key in _NAMES and isinstance(inner, str) and set(inner) & set(":/\\"):
            yield f"{place} {inner[:80]!r}, it names a model elsewhere"
        elif key.lstrip("_").startswith(("attn_implementation", "experts_implementation")) and not _is_known(inner):
            yield f"{place} {str(inner)[:80]!r}, kernels that would be fetched"
        elif key in ("torch_dtype", "dtype") and not isinstance(inner, dict) and inner not in _DTYPES:
            yield f"{place} {str(inner)[:80]!r}, which is no dtype of floats"
        elif key == "transformers_weights" and inner is not None and not _is_own_file(inner):
            yield f"{place} {str(inner)[:80]!r}, weights from elsewhere"
        yield from _in_config(inner, place)


def _is_known(attention: Any) -> bool:
    values = attention.values() if isinstance(attention, dict) else [attention]
    return all(v is None or (isinstance(v, str) and v in _ATTENTION | {"grouped_mm", "batched_mm"}) for v in values)


def _is_own_file(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
