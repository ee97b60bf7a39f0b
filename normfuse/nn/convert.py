"""Swap the norms of any model for others, to train or fine-tune it with them."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normfuse.errors import UsageError, did_you_mean
from normfuse.nn.block_depth import block_depths
from normfuse.nn.layouts import Activated
from normfuse.nn.reading import Reading, hooks_of, read
from normfuse.nn.replacements import OPTIONS, Kind, Left, New, build
from normfuse.nn.to_integers import candidates, in_integers

__all__ = ["Swap", "Swaps", "convert", "swaps"]

log = logging.getLogger(__name__)

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]

_RECORD = "_normfuse_swaps"
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class Swap:
    """One norm of a model and what became of it.

    Attributes:
        path: its module path; of a module that stands at several places, the first.
        before: class name.
        after: class name of what stands there now; the same as `before` if it was left.
        kept: what was taken over, such as "γ".
        note: what else there is to know; for a norm that was left, the reason.
    """

    path: str
    before: str
    after: str
    kept: tuple[str, ...] = ()
    note: str = ""

    @property
    def left(self) -> bool:
        """Does the norm stand as before?"""
        return self.before == self.after

    def __str__(self) -> str:
        if self.left:
            return f"{self.path}: {self.before} left: {self.note}"
        kept = f", kept {', '.join(self.kept)}" if self.kept else ""
        return f"{self.path}: {self.before} → {self.after}{kept}{f' ({self.note})' if self.note else ''}"


class Swaps(tuple[Swap, ...]):
    """The swaps of a model; `str` is a table of at most 80 columns, equal lines together."""

    __slots__ = ()

    def __str__(self) -> str:
        groups: dict[tuple[str, str, tuple[str, ...], str], list[str]] = {}
        for s in self:
            groups.setdefault((s.before, s.after, s.kept, s.note), []).append(s.path or "(the model)")
        lines: list[str] = []
        for (before, after, kept, note), paths in groups.items():
            what = f"{before} left" if before == after else f"{before} → {after}"
            lines.append(_cut(f"{len(paths):4} × {what}{', kept ' + ', '.join(kept) if kept else ''}"))
            lines.append(_cut(f"       {paths[0]}{f' … {paths[-1]}' if len(paths) > 1 else ''}"))
            if note:
                lines.append(_cut(f"       {note}"))
        return "\n".join(lines)


def convert(model: nn.Module, to: Kind, where: Where | None = None, *, example_inputs: Any = None, **options: Any) -> nn.Module:
    """A copy of the model with other norms; what has the same meaning in both is kept.

    Layer and RMS norms of PyTorch, timm and Hugging Face are known (others by class name, parameters and trying them out on
    numbers), batch norms with or without a fused activation, and the layers of `normfuse.nn` themselves. γ and β stay the same
    parameters, tied or frozen as they were. A shared norm stays shared. Hooks move to the new module.

    Args:
        model: any model; it is not changed. Do not give its parameters to an optimizer before, but those of the copy.
        to: "unified", "power", "l1" (L1BatchNorm for batch norms: the same function in eval mode), "rms", "dyt", "derf",
            "scaled" (each pre-norm in `ScaledNorm`, ℓ from the list index in its path), "batch" (over tokens), "layer";
            for convolutional networks "bcn" (and the convolution before each becomes weight-standardized) and "evo" (takes the
            activation with it); "shiftquant" swaps no norms but `nn.Linear` and `nn.Conv2d` for layers that train in integers.
        where: a pattern such as `"blocks.*.norm1"`, several, or a function of module path and module; None for all norms.
        example_inputs: for "rms" only, as in `normfuse.optimize`: the conversion is then lossless. The writers of the residual
            streams are centered, which the graph must show, so that RMSNorm of the stream is what LayerNorm was.
        options: arguments of the new layers (`eps=`, `window_size=`, …). For "unified" and "power" `rows=True` where tokens
            stand on more than two axes (Swin), which those layers do not take in training; for "scaled" `base=1` and
            `depths={path: ℓ}`; for "dyt" and "derf" `alpha_init` may be a function of the module path.

    Returns:
        The new model. `swaps(new)` says what was swapped and what was left, and why.

    Raises:
        UsageError: `to` or an option is unknown, `where` matches no norm, or nothing can be converted.
    """
    _known(to, options)
    if example_inputs is not None:
        return _lossless(model, to, where, example_inputs, options)
    new = _copied(model)
    if to == "shiftquant":
        layers = [(p, m, None) for p, m in candidates(new)]
        converter = _Converter(new, to, options, [])
        for path, module, _ in _chosen(layers, where, "layers"):
            converter.into_integers(path, module)
    else:
        found = [(p, m, r) for p, m, r in _norms(new) if r is not None]
        converter = _Converter(new, to, options, [p for p, _, _ in found])
        for path, module, reading in _chosen(found, where):
            converter.swap(path, module, reading)
    done = Swaps(converter.swaps)
    if all(s.left for s in done):
        reasons = dict.fromkeys(f"{s.path or 'the model'} {s.note}" for s in done)
        raise UsageError(
            f"nothing to convert to {to!r}: "
            + ("; ".join([*reasons][:3]) or f"the model has no {'layer' if to == 'shiftquant' else 'norm'}")
        )
    return _recorded(converter.placed(), done)


def swaps(model: nn.Module) -> tuple[Swap, ...]:
    """What `convert` did to make this model, one entry a norm, also for those that were left; empty if it did nothing."""
    record: tuple[Swap, ...] = getattr(model, _RECORD, Swaps())
    return record


def _lossless(model: nn.Module, to: str, where: Where | None, example_inputs: Any, options: Mapping[str, Any]) -> nn.Module:
    if to != "rms" or where is not None or options:
        raise UsageError("example_inputs= is for the lossless conversion of a whole model to 'rms', without where= and options")
    from normfuse.passes.streams.pre_rms import pre_rms  # only here: layers need no passes

    converted = pre_rms(model, example_inputs)
    after = dict(converted.named_modules())
    done: list[Swap] = []
    for path, module, _ in _norms(model):
        before, now = type(module).__name__, type(after.get(path, module)).__name__
        exact = (("γ", "β"), "lossless: the writers of the stream are centered")
        done.append(Swap(path, before, now, *(exact if now != before else ((), "its stream cannot be kept free of a mean"))))
    return _recorded(converted, Swaps(done))


def _recorded(model: nn.Module, done: Swaps) -> nn.Module:
    for s in done:
        log.info("%s", s)
    object.__setattr__(model, _RECORD, done)
    return model


# -- one conversion ----------------------------------------------------------------------------------------------------


class _Converter:
    """Builds what takes the place of each norm; nothing is put in place before `placed`."""

    def __init__(self, model: nn.Module, to: str, options: Mapping[str, Any], paths: Sequence[str]) -> None:
        self.model, self.to, self.options = model, to, options
        self.swaps: list[Swap] = []
        self._instead: dict[nn.Module, nn.Module] = {}
        self._like = next((t for t in model.parameters() if t.is_floating_point()), None)
        self._depths = block_depths(model, paths, **options) if to == "scaled" else {}

    def swap(self, path: str, module: nn.Module, reading: Reading | str) -> None:
        before = type(module).__name__
        try:
            if isinstance(reading, str):
                raise Left(reading)
            new = self._scaled(path, module, reading) if self.to == "scaled" else self._built(path, module, reading)
        except Left as reason:
            self.swaps.append(Swap(path, before, before, (), str(reason)))
            return
        new.module.train(module.training)
        self._instead[module] = new.module
        self.swaps.append(Swap(path, before, type(new.layer).__name__, tuple(new.kept), "; ".join(new.notes)))
        if self.to == "bcn" and isinstance(reading, Reading):
            self._standardize(path, reading)

    def into_integers(self, path: str, module: nn.Module) -> None:
        before, new = type(module).__name__, in_integers(module, self.options)
        if isinstance(new, str):
            self.swaps.append(Swap(path, before, before, (), new))
            return
        self._instead[module] = new
        self.swaps.append(Swap(path, before, type(new).__name__, ("W",) if new.bias is None else ("W", "b")))

    def placed(self) -> nn.Module:
        """The model with every replacement at all the places of what it replaces."""
        if self.model in self._instead:
            return self._instead[self.model]
        for parent in list(self.model.modules()):
            if parent in self._instead:
                continue
            for name, child in parent._modules.items():
                if child is not None and child in self._instead:
                    parent._modules[name] = self._instead[child]
        return self.model

    def _scaled(self, path: str, module: nn.Module, reading: Reading) -> New:
        from normfuse.nn.scaled import ScaledNorm

        depth = self._depths[path]
        if isinstance(depth, str):
            raise Left(depth)
        if reading.kind == "scaled":
            raise Left("is of that kind already")
        wrapped = ScaledNorm(module, depth)
        return New(wrapped, wrapped, ["the norm"], [f"ℓ = {depth}"])

    def _built(self, path: str, module: nn.Module, reading: Reading) -> New:
        if reading.kind == "scaled":
            return self._inside(path, module)
        behind = self._activation_behind(path) if self.to == "evo" else None
        new = build(self.to, reading, path, self.options, act=behind is not None, like=self._like)
        tail = [(name, m) for name, m in reading.tail if not (new.act and name == "act")]
        if new.act and behind is not None and not any(name == "act" for name, _ in reading.tail):
            self._instead[behind] = nn.Identity()
        if tail:
            new.module = Activated(OrderedDict([("norm", new.module), *tail]))
        for name, key, hook in hooks_of(module):
            getattr(new.module, name)[key] = hook
        return new

    def _inside(self, path: str, module: Any) -> New:
        """What a `ScaledNorm` holds is converted and stays scaled; if it is of the kind wanted already, it is unwrapped."""
        from normfuse.nn.scaled import ScaledNorm

        inner = read(module.norm)
        if not isinstance(inner, Reading):
            raise Left(f"scales a {type(module.norm).__name__}, which is not known")
        if inner.kind == self.to:
            return New(module.norm, module.norm, ["the norm"], [f"the factor 1/√{module.depth} is gone"])
        new = self._built(path, module.norm, inner)
        new.module = ScaledNorm(new.module, module.depth)
        new.notes.append(f"scaled as before, ℓ = {module.depth}")
        return new

    # -- neighbours ----------------------------------------------------------------------------------------------------

    def _siblings(self, path: str) -> tuple[nn.Module, list[tuple[str, nn.Module]], int]:
        folder, _, name = path.rpartition(".")
        parent = self.model.get_submodule(folder)
        children = list(parent.named_children())
        return parent, children, next((i for i, (n, _) in enumerate(children) if n == name), 0)

    def _activation_behind(self, path: str) -> nn.Module | None:
        """The activation right behind a norm, where the order of modules is the order of calls."""
        parent, children, i = self._siblings(path)
        if not isinstance(parent, nn.Sequential):
            return None
        following = next((m for _, m in children[i + 1 :] if type(m) is not nn.Identity), None)
        if following is None or type(following) not in _ACTIVATIONS or self._places(following) > 1:
            return None
        return following

    def _places(self, module: nn.Module) -> int:
        return sum(child is module for parent in self.model.modules() for child in parent._modules.values())

    def _standardize(self, path: str, reading: Reading) -> None:
        """The convolution that is registered before a norm and has its channels becomes weight-standardized."""
        from normfuse.nn.weight_standardization import WeightStandardizedConv2d

        _, children, i = self._siblings(path)
        name, conv = next(((n, m) for n, m in children[:i][::-1] if type(m) is not nn.Identity), ("", None))
        if not isinstance(conv, nn.Conv2d) or conv in self._instead or conv.out_channels != reading.shape[0]:
            return
        where = f"{path.rpartition('.')[0]}.{name}".lstrip(".")
        kind = type(conv).__name__
        if type(conv) is not nn.Conv2d or parametrize.is_parametrized(conv) or any(hooks_of(conv)):
            self.swaps.append(Swap(where, kind, kind, (), "is no plain nn.Conv2d; its weight is not standardized"))
            return
        try:
            new = WeightStandardizedConv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
                conv.bias is not None, conv.padding_mode, convention=self.options.get("convention", "bcn"),
            )  # fmt: skip
        except UsageError as e:
            self.swaps.append(Swap(where, kind, kind, (), str(e)))
            return
        new.weight, new.bias = conv.weight, conv.bias
        self._instead[conv] = new.train(conv.training)
        self.swaps.append(Swap(where, kind, type(new).__name__, ("W", "b") if conv.bias is not None else ("W",)))


# -- what is converted -------------------------------------------------------------------------------------------------


def _copied(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}")
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:  # computed ones, such as old weight norm leaves behind, cannot be copied with their history
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    except Exception as e:  # hooks and attributes may hold anything
        raise UsageError(f"{type(model).__name__} cannot be copied: {e}") from e


def _norms(model: nn.Module) -> list[tuple[str, nn.Module, Reading | str | None]]:
    """Norms in order of registration, by their first path; what stands inside a norm is part of it."""
    found: list[tuple[str, nn.Module, Reading | str | None]] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        reading = read(module)
        if reading is not None:
            inside.update(module.modules())
            found.append((path, module, reading))
    return found


Found = list[tuple[str, nn.Module, Any]]


def _chosen(found: Found, where: Where | None, kind: str = "norms") -> Found:
    if where is None:
        return found
    if callable(where):
        chosen = [(p, m, r) for p, m, r in found if where(p, m)]
        said = "the function"
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        chosen = [(p, m, r) for p, m, r in found if any(fnmatchcase(p, w) for w in patterns)]
        said = ", ".join(map(repr, patterns))
    if not chosen:
        paths = [p for p, _, _ in found]
        hint = did_you_mean(where, paths) if isinstance(where, str) else ""
        listed = ", ".join(paths[:6]) + (", …" if len(paths) > 6 else "")
        raise UsageError(f"where: {said} matches no {kind[:-1]} of the model{hint} ({kind}: {listed or 'none'})")
    return chosen


def _known(to: str, options: Mapping[str, Any]) -> None:
    if to == "crms":
        raise UsageError(
            "to='crms': CRMSNorm works on a stream of one feature less, so that every layer around it changes; "
            "use normfuse.optimize(model, inputs, passes=['default', 'compress']) on a trained model"
        )
    if to not in OPTIONS:
        hint = did_you_mean(to, OPTIONS)
        raise UsageError(f"to={to!r}: there is no such norm{hint} (known: {', '.join(OPTIONS)})")
    for name in options:
        if name not in OPTIONS[to]:
            hint = did_you_mean(name, OPTIONS[to])
            raise UsageError(f"{name}= is no option of to={to!r}{hint} (options: {', '.join(OPTIONS[to])})")


def _cut(line: str, width: int = 80) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"
