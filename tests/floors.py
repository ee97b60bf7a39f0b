"""The floors of the package: which module stands on which, what it imports, and the picture of it in docs/architecture.md.

python -m tests.floors    # draws the picture again
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import normfuse
from tests.places import ROOT

__all__ = ["FLOORS", "MODULES", "PACKAGE", "PAGE", "drawn", "floor", "imports", "picture"]

PACKAGE = Path(normfuse.__file__).parent
PAGE = ROOT / "docs" / "architecture.md"
FLOORS = (
    "ground",  # errors, files, caches: modules that stand in normfuse/ itself
    "reports",
    "ir",
    "numerics",
    "benchmark",
    "quant",
    "gpu",
    "ops",
    "nn",
    "importers",
    "given",
    "capture",
    "proof",
    "pt2",
    "passes",
    "export",
    "pipeline",
    "folding",
    "app",
    "plugs",
    "cli",
)
# Public names whose place in the package is older than the floors, and the floor that they belong to.
ELSEWHERE = {
    "normfuse": "app",
    "normfuse.__main__": "cli",
    "normfuse.api": "pipeline",
    "normfuse.nn": "pipeline",
    "normfuse.nn.convert": "pipeline",  # its lossless conversion is an analysis of passes
}
_PICTURE = re.compile(r"(?<=```mermaid\n).*?(?=^```)", re.MULTILINE | re.DOTALL)


def _modules() -> dict[str, Path]:
    found = {}
    for room in ("", "passes", "export"):
        # Path.rglob does not follow links before Python 3.13, and these two folders are links in a checkout
        folder = (PACKAGE / room).resolve()
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(("normfuse", *filter(None, (room,)), *(p for p in parts if p != "__init__")))
            if name != "normfuse.assets":  # weights that ship; no code
                found[name] = path
    return found


MODULES = _modules()


def floor(module: str) -> str:
    """The name of the floor that a module stands on."""
    parts = module.split(".")
    return ELSEWHERE.get(module) or (parts[1] if len(parts) > 1 and (len(parts) > 2 or parts[1] in FLOORS) else "ground")


@cache
def imports(module: str) -> tuple[tuple[int, str], ...]:
    """Lines and modules of normfuse that the module imports anywhere, inside functions too."""
    return tuple(_imported(MODULES[module]))


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, a.name) for a in names if a.name.startswith("normfuse."))
            case ast.Attribute(value=ast.Name("normfuse"), attr=name) if name != "__version__":  # known before any import
                yield node.lineno, "normfuse"
            case ast.ImportFrom(module=str(module), names=names, level=0) if module.split(".")[0] == "normfuse":
                for alias in names:
                    if f"{module}.{alias.name}" in MODULES:
                        yield node.lineno, f"{module}.{alias.name}"
                    elif (module, alias.name) != ("normfuse", "__version__"):
                        yield node.lineno, module
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{path}:{node.lineno}: relative import")


# -- the picture -------------------------------------------------------------------------------------------------------


def picture() -> str:
    """Mermaid: a box a floor, with the first sentence of its package; an arrow to each floor that it stands on directly.

    An arrow is left out where others lead the same way: `passes` knows `ir`, and so does all that `passes` stands on.
    """
    known: dict[str, set[str]] = {room: set() for room in FLOORS}
    for module in MODULES:
        known[floor(module)] |= {floor(i) for _, i in imports(module) if i in MODULES} - {floor(module)}
    lines = ["flowchart TD"]
    lines += [f'    {room}["<b>{room}</b><br/>{_said(room)}"]' for room in reversed(FLOORS)]
    for room in reversed(FLOORS):
        further = set().union(*(_reached(known, below) for below in known[room]))
        lines += [f"    {room} --> {below}" for below in reversed(FLOORS) if below in known[room] - further]
    return "\n".join(lines) + "\n"


def _reached(known: Mapping[str, set[str]], room: str) -> set[str]:
    """All floors below a floor, however far."""
    return set().union(known[room], *(_reached(known, below) for below in known[room]))


def _said(room: str) -> str:
    if room == "ground":
        return "Errors, files, caches, numbers in words."
    text = ast.get_docstring(ast.parse(MODULES[f"normfuse.{room}"].read_text(encoding="utf-8"))) or ""
    first = re.split(r"(?<=\.)\s|\n\n", text.replace("`", ""), maxsplit=1)[0]
    return first.replace("\n", " ").translate({ord('"'): "#quot;", ord("<"): "#lt;", ord(">"): "#gt;"})


def drawn(page: str) -> str:
    """The text of the page with the picture as it is now."""
    return _PICTURE.sub(lambda _: picture(), page, count=1)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
