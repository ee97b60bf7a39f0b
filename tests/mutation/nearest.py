"""Which test files are near a source file."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SOURCES", "nearest"]

ROOT = Path(__file__).parents[2]

# tests of the algebra: every affine of a rule is tried through `affine`, with the operators above and below it
_ALGEBRA = ("passes/test_affine.py", "passes/test_affine_copies.py", "passes/test_guards_algebra.py")

SOURCES: dict[str, tuple[str, ...]] = {
    "passes/affine.py": _ALGEBRA,
    "passes/broadcast.py": _ALGEBRA,
    "passes/cleanup.py": ("passes/test_cleanup*.py", "passes/test_guards_cleanup.py"),
    "passes/expose.py": _ALGEBRA,
    "passes/into_consumer.py": _ALGEBRA,
    "passes/into_producer.py": _ALGEBRA,
    "passes/key_bias.py": ("passes/test_key_bias.py", "passes/test_guards_key_bias.py"),
    "passes/mean_free.py": ("passes/test_mean_free.py", "passes/test_guards_mean_free.py"),
    "passes/moments.py": ("passes/test_recognise.py", "passes/test_guards_moments.py"),
    "passes/parallel.py": ("passes/test_bake.py", "passes/test_guards_parallel.py"),
    "passes/select.py": ("passes/test_select.py", "passes/test_guards_select.py"),
    "passes/streams.py": ("passes/test_mean_free.py", "passes/test_guards_streams.py", "passes/test_guards_mean_free.py"),
    "normfuse/capture.py": ("test_api.py", "test_capture*.py", "test_guards_capture.py"),
    "normfuse/pt2.py": ("test_pt2*.py", "test_hostile*.py"),
}


def nearest(source: str) -> list[Path]:
    """The test files of a source, as they are there now.

    Raises:
        KeyError: nobody has said which they are.
    """
    patterns = SOURCES[source] if source in SOURCES else (f"passes/test_{Path(source).stem}*.py",)
    return [path for pattern in dict.fromkeys(patterns) for path in sorted((ROOT / "tests").glob(pattern))]
