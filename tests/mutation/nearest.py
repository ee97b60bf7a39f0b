"""Which test files are near a source file."""

from __future__ import annotations

from pathlib import Path

from tests.places import ROOT

__all__ = ["SOURCES", "nearest"]

# an affine is tried through `affine`, with the operators above and below it
_ALGEBRA = ("passes/affine/test_affine.py", "passes/affine/test_affine_copies.py", "passes/affine/test_guards_algebra.py")
_STREAMS = ("passes/streams/test_guards_streams.py", "passes/streams/test_mean_free*.py")
_PARALLEL = ("passes/affine/test_guards_parallel.py", "passes/affine/test_parallel_signs.py", "passes/test_bake.py")
_SLICES = ("passes/affine/test_slices.py",)
_FOLD = ("folding/test_*.py",)
_FUSE = ("passes/fuse/test_fuse.py",)
_KERNELS = ("passes/fuse/test_guards_kernels.py",)
_CHAINS = ("passes/quantize/test_chain_parts.py", "passes/quantize/test_chains*.py")
_PARTS = ("passes/quantize/test_chain_parts.py",)
_FILES = ("hostile/test_programs.py", "pt2/test_pt2.py")

SOURCES: dict[str, tuple[str, ...]] = {
    "passes/affine/affine.py": _ALGEBRA,
    "passes/affine/beside.py": _FOLD,
    "passes/affine/broadcast.py": _ALGEBRA,
    "passes/affine/expose.py": _ALGEBRA,
    "passes/affine/into_consumer.py": _ALGEBRA,
    "passes/affine/into_producer.py": _ALGEBRA,
    "passes/affine/parallel.py": _PARALLEL,
    "passes/affine/slices.py": _SLICES,
    "passes/cleanup.py": _SLICES,
    "passes/key_bias.py": ("passes/test_guards_key_bias.py", "passes/test_key_bias.py"),
    "passes/once.py": _SLICES,
    "passes/patterns/moments.py": ("passes/patterns/test_guards_moments.py", "passes/test_recognise.py"),
    "passes/select.py": ("passes/test_guards_select.py", "passes/test_select.py"),
    "passes/affine/shared.py": (*_ALGEBRA, "passes/affine/test_guards_parallel.py", "passes/test_huge_eps.py"),
    "passes/streams/keep_layer_norm.py": _FOLD,
    "passes/streams/mean_free.py": _STREAMS,
    "passes/streams/streams.py": _STREAMS,
    **{
        f"passes/fuse/{name}.py": _FUSE for name in ("codes_between", "fusion", "norm_codes", "product", "residual", "shared_codes")
    },
    **{f"passes/fuse/{name}.py": _KERNELS for name in ("kernels", "norm_patterns")},
    **{f"passes/streams/{name}.py": ("passes/streams/test_guards_half_range.py",) for name in ("half_range", "scaled")},
    **{f"passes/quantize/shiftquant/chains/{name}.py": _CHAINS for name in ("chains", "find", "steps")},
    **{f"passes/quantize/shiftquant/chains/{name}.py": _PARTS for name in ("functions", "ranges", "weights")},
    "passes/quantize/reach.py": _PARTS,
    "export/lowering/told.py": ("export/lowering/test_told.py",),
    "normfuse/capture/capture.py": ("capture/test_capture.py", "test_api.py"),
    "normfuse/capture/writes.py": ("capture/test_writes.py",),
    "normfuse/folding/fold.py": _FOLD,
    "normfuse/folding/likeness.py": _FOLD,
    "normfuse/folding/saved_norms.py": _FOLD,
    "normfuse/folding/written_back.py": _FOLD,
    "normfuse/ir/guards.py": ("ir/test_guards.py",),
    "normfuse/ir/module_tree.py": _FOLD,
    "normfuse/ir/operators.py": ("capture/test_rank.py", "passes/test_guards_select.py", "passes/test_select.py"),
    "normfuse/ir/passes.py": ("ir/test_pass.py", "proof/test_prove.py"),
    "normfuse/ir/weights.py": ("ir/test_weights.py", *_ALGEBRA),
    **{f"normfuse/pt2/{name}.py": _FILES for name in ("archive", "expressions", "operators", "payloads", "schema", "trees")},
}


def nearest(source: str) -> list[Path]:
    """The test files of a source, as they are there now: those of its name in its room where nobody has said which they are."""
    path = Path(source.removeprefix("normfuse/"))
    patterns = SOURCES.get(source, (f"{path.parent}/test_{path.stem}*.py",))
    return [path for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
