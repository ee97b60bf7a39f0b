"""What the site needs beside the pages: pages of the checkout's root, links that lead out of docs/, notebooks, and no network."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from as_notebook import notebook

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
NOTEBOOKS = (
    "start.md",
    "fold.md",
    "report.md",
    "quantization.md",
    "norms.md",
    "language-models.md",
    "howto/",
)  # pages that are notebooks as well
_LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>", re.IGNORECASE)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Pages of the root, with links as docs/ sees them."""
    for name, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_LINK.sub(_from_root, text)))
    for page in [f for f in files.documentation_pages() if f.src_uri.startswith(NOTEBOOKS)]:
        name = page.src_uri.removesuffix(".md") + ".ipynb"
        files.append(File.generated(config, name, content=notebook(page.content_string)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A file of the checkout that is no page of the site is named, not linked; a page of the root is linked as a page."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(found: re.Match[str]) -> str:
        text, target = found.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return found[0]
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join("docs", folder, path))
        if place.startswith("docs/"):
            return found[0]
        moved = next((name for name, source in FROM_ROOT.items() if source == place), None)
        if moved is not None:
            return f"[{text}]({posixpath.relpath(moved, folder or '.')}{'#' if anchor else ''}{anchor})"
        if not (ROOT / place).exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        return f"{text} (`{place}`)"

    markdown = _LINK.sub(replaced, markdown)
    if page.file.src_uri.startswith(NOTEBOOKS):
        markdown += f"\n\n---\n\n[This page as a notebook]({posixpath.basename(page.file.src_uri).removesuffix('.md')}.ipynb)\n"
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """No page of the site loads anything from elsewhere."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        found = _LOADED.search(path.read_text(encoding="utf-8"))
        if found is not None and 'rel="canonical"' not in found[0]:
            raise PluginError(f"{path.name} loads {found[0][:200]}")


def _from_root(found: re.Match[str]) -> str:
    text, target = found.groups()
    if "://" in target or target.startswith(("#", "mailto:")):
        return found[0]
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    return f"[{text}](../{target})"
