"""The walk over a model that swaps official layers for ours."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict

import torch
from torch import nn

from normfuse.importers.catalogue import FAMILIES
from normfuse.importers.family import Family, Unrecognised
from normfuse.importers.probe import Probe, random_on

__all__ = ["eval_mode", "recognise"]

log = logging.getLogger(__name__)

_BY_NAME = {name: family for family in FAMILIES for name in family.names}


def recognise(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with every layer of an official repository replaced by ours, which computes the same and can be traced.

    A layer is recognised by the name of its class, the names and shapes of its parameters and buffers, its attributes, and
    by its numbers: both are run in float64, and have to agree to 1e-9. Whatever only bears the name stays.

    Args:
        model: a copy that may be edited; its tensors are neither copied nor written to. It is looked at in the mode it is in.

    Returns:
        The model, or its replacement if it is such a layer itself; and notes: a line for each class that was recognised, and
        one with path and reason for what only has the name.
    """
    recognised: dict[str, int] = defaultdict(int)
    left: dict[str, list[str]] = defaultdict(list)
    doubtful: dict[str, list[str]] = defaultdict(list)
    found: dict[int, nn.Module] = {}
    inside: set[int] = set()
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights
        for path, module in model.named_modules():
            family = _BY_NAME.get(type(module).__name__)
            if family is None or id(module) in inside or type(module).__module__.split(".")[0] in ("torch", "normfuse"):
                continue
            try:
                replacement = _replacement(family, module)
            except Unrecognised as e:
                left[f"called {type(module).__name__}, but it {e}; left as it is"].append(path or "the model")
                continue
            if replacement is None:
                continue
            found[id(module)] = replacement
            inside.update(id(m) for m in module.modules())
            recognised[f"{type(module).__name__} ({family.origin})"] += 1
            warning = family.warning(module)
            if warning is not None:
                doubtful[f"{type(module).__name__} was recognised, and its {warning}"].append(path or "the model")
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in found:
                parent._modules[name] = found[id(child)]
    notes = [f"{count} × {name} recognised" for name, count in recognised.items()]
    for what, paths in (*doubtful.items(), *left.items()):
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        notes.append(f"{paths[0]}{more}: {what}")
    for note in notes:
        log.info("%s", note)
    return found.get(id(model), model), tuple(notes)


def eval_mode(model: nn.Module) -> nn.Module:
    """The model in eval mode, in place, but for official layers that take batch statistics in it: their parts keep their modes."""
    modes = {m: m.training for layer in model.modules() if _is_live(layer) for m in layer.modules()}
    model.eval()
    for module, training in modes.items():
        module.training = training
    return model


def _is_live(module: nn.Module) -> bool:
    family = _BY_NAME.get(type(module).__name__)
    try:
        return family is not None and family.live(module) and _replacement(family, module) is not None
    except Exception:  # it has the name only, and any attribute of any kind
        return False


def _replacement(family: Family, module: nn.Module) -> nn.Module | None:
    """The layer that computes what the module computes; None if nobody would take it for the official one."""
    try:
        if not family.candidate(module):
            return None
        if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            raise Unrecognised("has forward hooks, which would see another module")
        candidates = family.build(module)
        calls = family.calls(module, random_on(module))
    except Unrecognised:
        raise
    except Exception as e:  # a module of the user's may have any attribute of any kind
        raise Unrecognised(f"is built differently ({type(e).__name__}: {e})") from e
    callable_alike = [new for new in candidates if _signature(module, new) is None]
    if not callable_alike:
        raise Unrecognised(str(_signature(module, candidates[0])))
    probe = Probe(module, calls, live=family.live(module))
    reasons = []
    for new in callable_alike:
        reason = probe.difference(new)
        if reason is None:
            return _completed(new, module)
        reasons.append(reason)
    plain = family.plain(module)
    if plain is not None and probe.difference(plain) is None:
        return None
    raise Unrecognised(reasons[0])


def _signature(old: nn.Module, new: nn.Module) -> str | None:
    """A caller may pass any argument of the official forward by its name."""
    theirs, ours = (list(inspect.signature(type(m).forward).parameters)[1:] for m in (old, new))
    if theirs == ours[: len(theirs)]:
        return None
    return f"has a forward with arguments {', '.join(theirs) or 'none'}; expected {', '.join(ours)}"


def _completed(new: nn.Module, old: nn.Module) -> nn.Module:
    """The rest of the model may read attributes of the old module."""
    for name, value in vars(old).items():
        if not name.startswith("_") and name != "training" and not hasattr(new, name):
            setattr(new, name, value)
    return new.train(old.training)
