"""Folders of images: all files below it, with the name of the folder that each stands in as its class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError
from normfuse.extras import need

__all__ = ["SUFFIXES", "evenly", "image_files", "opened"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


def image_files(folder: Path) -> list[Path]:
    """All images below the folder, in the order of their paths; what begins with a dot is left out.

    Raises:
        UsageError: there are none.
    """
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(where) / f for f in sorted(files) if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    if not found:
        raise UsageError(f"there are no images in the folder {folder} ({', '.join(SUFFIXES[:5])}, ...)")
    return found


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, in their order and evenly spread, so that every class has its share."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def opened(file: Path) -> Any:
    """An image of Pillow, read whole.

    Raises:
        UsageError: it cannot be read.
    """
    pillow = need("PIL.Image", extra="data")
    try:
        with pillow.open(file) as image:
            image.load()
            return image
    except Exception as e:  # of many kinds, from the reader of each format
        raise UsageError(f"{file} cannot be read as an image: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}") from e
