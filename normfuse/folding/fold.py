"""`normfuse.fold`: the same model with less in it. Its classes, hooks and names stay; its norms become smaller or nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import nn

from normfuse.api import VERIFY, Verify
from normfuse.capture.capture import as_given, calls_of, capture, flat_inputs, usable
from normfuse.errors import NormfuseError, RewriteError, UsageError, did_you_mean
from normfuse.folding.likeness import Likeness, Verdict
from normfuse.folding.shared_modules import called_often
from normfuse.folding.written_back import WrittenBack, write_back
from normfuse.given.flags import not_given
from normfuse.given.model_kinds import check_kind, unwrapped
from normfuse.given.original import Call, with_own_weights
from normfuse.ir.census import census
from normfuse.ir.graph import Graph
from normfuse.ir.module_tree import ModuleTree
from normfuse.ir.passes import Run
from normfuse.passes import PASSES
from normfuse.passes.affine import affine, beside
from normfuse.passes.affine.beside import Beside
from normfuse.passes.affine.folding import known_values
from normfuse.passes.streams import mean_free
from normfuse.passes.streams.keep_layer_norm import KeepLayerNorm
from normfuse.pipeline.blocks import blocks
from normfuse.pipeline.figures import fates, last_word, operators, paired, recognised, tensor_sizes
from normfuse.pipeline.origin import origin_of
from normfuse.proof.prove import Proof, run
from normfuse.reports.model import PassReport, Site
from normfuse.reports.record import Record, record
from normfuse.reports.report import Report
from normfuse.surroundings import undisturbed

__all__ = ["fold"]

log = logging.getLogger(__name__)

_PIPELINE = (
    PASSES["expose"], PASSES["affine"], Beside(), PASSES["mean_free"], PASSES["affine"], KeepLayerNorm(), PASSES["realise"],
)  # fmt: skip
_RULES = (affine.UP, affine.DOWN, beside.RULE, mean_free.RULE)  # each of their sites is one that can be left out
_TOLD = ("expose", "affine", Beside.name, "mean_free", KeepLayerNorm.name)  # of the others nothing is written back
_ATTEMPTS = 8  # sites taken back one by one before all are

_NAMED = 6  # arguments that a note names

_BETWEEN = (
    "the outputs of such calls are proven; what flows between modules has changed, so that other calls which return it "
    "(forward_features, output_hidden_states=True) give other values than the model"
)

Site_ = tuple[str, str]


def fold(model: nn.Module, example_inputs: Any = None, *, dynamic_shapes: Any = None, verify: Verify = "end") -> nn.Module:
    """A copy of the model with the same classes that computes the same function with fewer and smaller norms.

    BatchNorm and other static normalizations become `nn.Identity`, `nn.LayerNorm` becomes `nn.RMSNorm`, and gains and shifts leave
    their norms where neighbouring weights can take them. Whatever works on the modules of the model works on the copy: hooks,
    `state_dict`, indexing, quantization, adapters, pruning. What modules cannot express stays, and the report says why.

    Args:
        model: an `nn.Module`; it is not changed.
        example_inputs: a tuple of positional inputs or a dictionary of keyword inputs. Without them, inputs that the model declares
            are used (timm, Hugging Face, torchvision), else it is traced without shapes, and nothing can be proven.
        dynamic_shapes: as in `torch.export.export`, for the proof. The copy takes what the model takes.
        verify: "end" (or "each") compares the copy with the model in float64, in the model's own dtypes, at other sizes and with
            other flags, and takes back what is not exact; "off" only calls both once: code of modules may read what is gone.

    Returns:
        A copy of the model in eval mode, with weights of its own. `normfuse.report` says what was done to it.

    Raises:
        CaptureError: the model cannot be traced or copied.
        UsageError: an argument is wrong.
    """
    start = perf_counter()
    if verify not in VERIFY:
        raise UsageError(f"verify={verify!r}: expected one of {', '.join(map(repr, VERIFY))}{did_you_mean(verify, VERIFY)}")
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"fold: expected a torch.nn.Module, got {type(model).__name__}, which has no modules; use normfuse.optimize"
        )
    with undisturbed():
        folding = _Folding(model, example_inputs, dynamic_shapes, proven=verify != "off")
        try:
            return folding.folded(start)
        except RewriteError:
            if not folding.inner:
                raise
            log.warning("what was folded in modules that are called more than once does not stand the proof of the whole model")
        return _Folding(model, example_inputs, dynamic_shapes, proven=verify != "off", shared=False).folded(start)


@dataclass(frozen=True)
class _Attempt:
    """One run of the pipeline, written back.

    Attributes:
        back: the copy.
        graph: what was written.
        reports: one a pass.
        sites: (rule, path) of what was rewritten, in order.
    """

    back: WrittenBack
    graph: Graph
    reports: list[PassReport]
    sites: list[Site_]


class _Folding:
    """A model, captured once, and everything that is tried with it."""

    def __init__(self, model: nn.Module, example_inputs: Any, dynamic_shapes: Any, *, proven: bool, shared: bool = True) -> None:
        check_kind(unwrapped(model))
        self.model = _usable(unwrapped(model))
        self.asked = example_inputs, dynamic_shapes
        self.proven = proven
        self.given = as_given(self.model, example_inputs)
        self.captured = capture(self.model, example_inputs, dynamic_shapes)
        self.original = Graph.of(self.captured.gm)
        self.call = Call(self.captured.args, self.captured.kwargs or {})
        self.inner = self._inner(proven) if shared and self.captured.has_inputs else {}
        self.base = self._with_inner() if self.inner else self.model
        self.start = Graph.of(capture(self.base, example_inputs, dynamic_shapes).gm) if self.inner else self.original.copy()
        self.tree = self.start.tree = ModuleTree(self.base)
        PASSES["cleanup"](self.start)
        self.tree.read(self.start)
        self.proof: Proof | None = None
        if self.captured.has_inputs:
            inputs = flat_inputs(self.captured.gm, self.call.args, self.call.kwargs)
            self.proof = Proof(self.original, inputs, self.given, calls_of(self.captured.gm), known_values)
        self.like = Likeness(self.model, self.given, self.original, self.call, self.asked, self.proof, proven)
        self.left: dict[Site_, Site] = {}
        self.undone: dict[Site_, Site] = {}

    def folded(self, start: float) -> nn.Module:
        attempt, verdict = self._settled()
        model = attempt.back.model
        report = self._report(attempt, verdict, start)
        log.info("fold: %d applied, %d refused in %.1f s", len(report.applied), len(report.refused), report.seconds)
        known = record(self.model) or Record(has_inputs=False)
        return replace(known, report=report).attach(model)

    # -- modules that are called more than once ------------------------------------------------------------------------

    def _inner(self, proven: bool) -> dict[str, tuple[_Attempt, Report]]:
        """Each of them folded on its own, where something became less; then it is the same function in all of its calls."""
        found = {}
        tree = ModuleTree(self.model)
        try:
            often = called_often(self.model, self.call)
        except Exception as e:  # a model that counts its calls, say; it is folded as a whole
            log.debug("the calls of submodules cannot be watched: %s", e)
            return {}
        for path, call in often.items():
            if tree.rebuilt(path):
                continue
            begin = perf_counter()
            try:
                folding = _Folding(self.model.get_submodule(path), call.args or call.kwargs, None, proven=proven)
                attempt, verdict = folding._settled()
            except NormfuseError as e:
                log.info("%s is not folded on its own: %s", path, e)
                continue
            if attempt.sites:
                found[path] = attempt, folding._report(attempt, verdict, begin)
        return found

    def _with_inner(self) -> nn.Module:
        base = with_own_weights(self.model).eval()
        tree = ModuleTree(base)
        for path, (attempt, _) in self.inner.items():
            module = tree.module(path)
            assert module is not None
            for name in tree.paths(module):
                parent, _, leaf = name.rpartition(".")
                setattr(base.get_submodule(parent), leaf, attempt.back.model)
        return base

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _settled(self) -> tuple[_Attempt, Verdict]:
        """The copy with every site that stands the proof; where two of one class do not, none of that class is tried again."""
        seen: set[tuple[str, type]] = set()
        for _ in range(_ATTEMPTS):
            attempt = self._attempt()
            verdict = self.like.judge(attempt.back, attempt.graph)
            if not verdict.fault:
                return attempt, verdict
            site = self._guilty(attempt, verdict.fault)
            log.warning("%s at %s was taken back: %s", site.rule, site.path, site.note)
            kind = self._kind((site.rule, site.path))
            alike = [s for s in attempt.sites if self._kind(s) == kind] if kind in seen else [(site.rule, site.path)]
            seen.add(kind)
            self.undone |= {s: Site(*s, site.note) for s in alike}
        for s in attempt.sites:
            self.undone.setdefault(s, Site(*s, f"all was taken back: {verdict.fault}"))
        attempt = self._attempt()
        verdict = self.like.judge(attempt.back, attempt.graph)
        if verdict.fault:
            raise RewriteError(f"without any rewrite the copy is not the model: {verdict.fault}")
        return attempt, verdict

    def _kind(self, site: Site_) -> tuple[str, type]:
        return site[0], type(self.tree.module(site[1]))

    def _attempt(self, without: Sequence[Site_] = ()) -> _Attempt:
        """Everything but these sites and those that were left before; a site that cannot be written is left from then on."""
        while True:
            self.tree.gains.clear()
            proven = run(self.start, _PIPELINE, None, given=Run(skip=(*without, *self.left, *self.undone)))
            sites = [s for s in dict.fromkeys(proven.permitted) if s[0] in _RULES]
            paths = [s.path for r in proven.reports for s in r.applied if s.rule in _RULES]
            back = write_back(self.base, self.tree, proven.graph, paths)
            for path, (attempt, _) in self.inner.items():
                back.values |= {f"{path}.{name}": value for name, value in attempt.back.values.items()}
            if not any(s.rule == mean_free.RULE for r in proven.reports for s in r.applied):
                back.left |= {
                    p: "it would stay, as a multiplication by one" for n, p in self.tree.gains.items() if n in back.values
                }
            unable = [s for s in sites if s[1] in back.left]
            if not unable:
                return _Attempt(back, proven.graph, proven.reports, sites)
            for rule, path in unable:
                self.left[rule, path] = Site(rule, path, back.left[path])

    def _guilty(self, attempt: _Attempt, fault: str) -> Site:
        """The first site with which the copy is another function (bisection)."""
        sites = attempt.sites
        low, high = 0, len(sites)
        while low + 1 < high:
            middle = (low + high) // 2
            less = self._attempt(sites[middle:])
            verdict = self.like.judge(less.back, less.graph)
            low, high, fault = (low, middle, verdict.fault) if verdict.fault else (middle, high, fault)
        rule, path = sites[high - 1] if sites else ("", "")
        return Site(rule, path, f"{fault}; taken back")

    # -- report --------------------------------------------------------------------------------------------------------

    def _report(self, attempt: _Attempt, verdict: Verdict, start: float) -> Report:
        after = verdict.graph or attempt.graph
        was, now = recognised(self.original), recognised(after)
        notes = self.captured.notes
        silent = ""
        if self.proof is not None and self.proven:
            notes, silent = (*notes, *self.proof.notes), self.proof.nothing_compared
            notes += (silent,) if silent else ()
        elif not self.captured.has_inputs:
            notes += ("not verified: the model was traced without example inputs",)
        if attempt.sites or self.inner:
            untried = not_given(self.model, self.call) if self.captured.has_inputs else []
            more = f" and {len(untried) - _NAMED} more" if len(untried) > _NAMED else ""
            notes += (
                (f"not tried, because the example inputs do not give it: {', '.join(untried[:_NAMED])}{more}",) if untried else ()
            )
            notes += (_BETWEEN,)
        passes = [self._told(r, attempt.back) for r in last_word(attempt.reports) if r.name in _TOLD]
        passes.append(
            PassReport("write_back", refused=(*self.left.values(), *self._written_out()), undone=tuple(self.undone.values()))
        )
        passes += [_below(path, p) for path, (_, report) in self.inner.items() for p in report.passes]
        return Report(
            tuple(passes), verdict.exact, verdict.drift, *paired(census(was), census(now)),
            *tensor_sizes(self.original, after, False), notes, perf_counter() - start, silent, origin=origin_of(self.model),
            operators_before=operators(self.original), operators_after=operators(after),
            norms=fates(was, now), blocks=blocks(was, now),
        )  # fmt: skip

    @staticmethod
    def _told(report: PassReport, back: WrittenBack) -> PassReport:
        def told(site: Site) -> Site:
            return replace(site, note=f"{back.became[site.path]}; {site.note}") if site.path in back.became else site

        return replace(report, applied=tuple(told(s) for s in report.applied))

    def _written_out(self) -> list[Site]:
        """Norms that are arithmetic in the forward of a class: no module stands for them alone."""
        probe = self.original.copy()
        found = PASSES["recognise"](probe).applied
        reason = "it is written out in the forward of its module, which stays"
        return [Site(s.rule, s.path, reason) for s in found if "norm" in s.rule]


def _usable(model: nn.Module) -> nn.Module:
    """The model; a copy of one with tensors made under inference mode, which no module outside of it can hold."""
    made = {id(t): usable(t) for t in (*model.parameters(), *model.buffers()) if t.is_inference()}
    return copy.deepcopy(model, made) if made else model


def _below(path: str, report: PassReport) -> PassReport:
    """The report of a submodule that was folded on its own, with the paths of the whole model."""

    def placed(sites: Sequence[Site]) -> tuple[Site, ...]:
        return tuple(replace(s, path=f"{path}.{s.path}" if s.path else path) for s in sites)

    return replace(
        report, name=f"{report.name} in {path}", applied=placed(report.applied), refused=placed(report.refused),
        undone=placed(report.undone),
    )  # fmt: skip
