"""Weights from a file into a model: `--weights FILE`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["load_weights"]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: Where training frameworks keep the state dict in a checkpoint, and what they put before its names.
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "module", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 3  # names in a message


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the state dict at `path` into `model`; no code of the file runs.

    Args:
        model: its state dict and that of the file must have the same names and shapes. A prefix that all names of the file
            have and none of the model (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.`) is left out.
        path: `.safetensors`, or what `torch.save` wrote of a state dict or of a checkpoint that holds one.

    Raises:
        UsageError: there is no such file, it holds no state dict or more than tensors, or it does not fit the model.
    """
    state = _fitting(_state_dict(path), model)
    known = model.state_dict()
    missing, strange = [k for k in known if k not in state], [k for k in state if k not in known]
    if missing or strange:
        said = [
            f"{len(names)} {what} ({_some(names)})"
            for names, what in ((missing, "are missing"), (strange, "are not in it"))
            if names
        ]
        raise UsageError(f"--weights {path} does not fit {type(model).__name__}: of its weights {', '.join(said)}")
    for name, value in known.items():
        if value.shape != state[name].shape:
            found, expected = list(state[name].shape), list(value.shape)
            raise UsageError(f"--weights {path} does not fit {type(model).__name__}: {name} is {found}, expected {expected}")
    model.load_state_dict(state)


def _state_dict(path: Path) -> dict[str, Tensor]:
    import torch

    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--weights {path}: expected {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"--weights {path} does not exist")
    held: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            held = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        told = str(e).strip().splitlines() or [type(e).__name__]
        raise UsageError(
            f"--weights {path} cannot be read as weights alone: {told[0][:200]}; save it with torch.save(model.state_dict(), FILE)"
        ) from e
    for entry in _ENTRIES:
        if isinstance(held, Mapping) and isinstance(held.get(entry), Mapping):
            held = held[entry]
    if not isinstance(held, Mapping) or not held or not all(isinstance(v, torch.Tensor) for v in held.values()):
        raise UsageError(
            f"--weights {path} holds no state dict: expected tensors by name, or one of {', '.join(_ENTRIES)} with them"
        )
    return {str(k): v for k, v in held.items()}


def _fitting(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without prefixes that all names have and those of the model do not."""
    known = model.state_dict()
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in state) and not any(k.startswith(prefix) for k in known):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
