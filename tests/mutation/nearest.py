"""Which test files are near a source file."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ROOT", "SOURCES", "nearest"]

ROOT = Path(__file__).parents[2]

# an affine is tried through `affine`, with the operators above and below it
_ALGEBRA = ("passes/test_affine.py", "passes/test_affine_copies.py", "passes/test_guards_algebra.py")
_STREAMS = ("passes/test_guards_streams.py", "passes/test_mean_free_writers.py", "passes/test_mean_free.py")

_FILES = ("hostile/test_programs.py", "test_pt2.py")
SOURCES: dict[str, tuple[str, ...]] = {
    "passes/affine/affine.py": _ALGEBRA,
    "passes/affine/beside.py": ("test_fold.py",),
    "passes/affine/broadcast.py": _ALGEBRA,
    "passes/cleanup.py": ("passes/test_cleanup*.py", "passes/test_slices.py"),
    "passes/affine/expose.py": _ALGEBRA,
    "passes/affine/into_consumer.py": _ALGEBRA,
    "passes/affine/into_producer.py": _ALGEBRA,
    "passes/streams/keep_layer_norm.py": ("test_fold.py",),
    "passes/key_bias.py": ("passes/test_guards_key_bias.py", "passes/test_key_bias.py"),
    "passes/streams/mean_free.py": _STREAMS,
    "passes/patterns/moments.py": ("passes/test_guards_moments.py", "passes/test_recognise.py"),
    "passes/once.py": ("passes/test_slices.py",),
    "passes/affine/parallel.py": ("passes/test_guards_parallel.py", "passes/test_parallel_signs.py", "passes/test_bake.py"),
    "passes/select.py": ("passes/test_guards_select.py", "passes/test_select.py"),
    "passes/affine/shared.py": (*_ALGEBRA, "passes/test_guards_parallel.py", "passes/test_huge_eps.py"),
    "passes/affine/slices.py": ("passes/test_slices.py",),
    "passes/streams/streams.py": _STREAMS,
    "normfuse/capture/capture.py": ("test_capture*.py", "test_api.py"),
    **{
        f"normfuse/{name}.py": ("test_fold.py",)
        for name in ("folding/fold", "folding/likeness", "ir/module_tree", "folding/saved_norms", "folding/written_back")
    },
    "normfuse/ir/guards.py": ("test_guards.py",),
    "normfuse/ir/operators.py": ("test_rank.py", "passes/test_guards_select.py", "passes/test_select.py"),
    "normfuse/ir/passes.py": ("test_pass.py", "test_prove.py"),
    "normfuse/ir/weights.py": ("test_weights.py", *_ALGEBRA),
    "normfuse/capture/writes.py": ("test_writes.py",),
    **{f"normfuse/pt2/{name}.py": _FILES for name in ("archive", "expressions", "operators", "payloads", "schema", "trees")},
}


def nearest(source: str) -> list[Path]:
    """The test files of a source, as they are there now: those of its name where nobody has said which they are."""
    patterns = SOURCES.get(source, (f"passes/test_{Path(source).stem}*.py",))
    return [path for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
