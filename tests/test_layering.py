"""Imports point one way: front -> export -> passes -> core."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import normfuse

ROOT = Path(normfuse.__file__).parent
# What a user calls stands above the rooms and may know all of them; everything else in normfuse/ is the core.
FRONT = (
    "normfuse",
    "normfuse.__main__",
    "normfuse.api",
    "normfuse.cli",
    "normfuse.demo",
    "normfuse.demo_models",
    "normfuse.engines",
    "normfuse.figures",
    "normfuse.folded",
    "normfuse.nn",
    "normfuse.nn.convert",  # its lossless conversion is an analysis of passes
)
LAYERS = ("core", "passes", "export", "front")
OPTIONAL = (
    "onnx", "onnxruntime", "onnxscript", "onnx_ir", "timm", "torchvision", "transformers", "tensorrt_rtx", "tensorrt",
)  # fmt: skip


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("normfuse", *(p for p in parts if p != "__init__")))] = path
    # Path.rglob does not follow links before Python 3.13, and these two folders are links in a checkout
    for room in ("passes", "export"):
        folder = (ROOT / room).resolve()
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(("normfuse", room, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = _modules()


def _layer(module: str) -> str:
    if module in FRONT or module.startswith("normfuse.cli."):
        return "front"
    room = module.split(".")[1]
    return room if room in ("passes", "export") else "core"


def _imports(path: Path) -> Iterator[str]:
    """Modules of normfuse that the file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (a.name for a in names if a.name.startswith("normfuse."))
            case ast.Attribute(value=ast.Name("normfuse"), attr=name) if (
                name != "__version__"
            ):  # a constant, known before any import
                yield "normfuse"
            case ast.ImportFrom(module=str(module), names=names, level=0) if module.split(".")[0] == "normfuse":
                for alias in names:
                    if f"{module}.{alias.name}" in MODULES:
                        yield f"{module}.{alias.name}"
                    elif (module, alias.name) != ("normfuse", "__version__"):
                        yield module
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{path}:{node.lineno}: relative import")


def test_every_room_is_seen() -> None:
    assert {_layer(m) for m in MODULES} == set(LAYERS)


@pytest.mark.parametrize("module", [pytest.param(m, id=m) for m in MODULES if _layer(m) != "front"])
def test_imports_point_down(module: str) -> None:
    allowed = LAYERS[: LAYERS.index(_layer(module)) + 1]
    wrong = [imported for imported in _imports(MODULES[module]) if _layer(imported) not in allowed]
    assert not wrong, f"{module} is {_layer(module)} and imports {wrong}"


def test_command_line_is_imported_by_nobody() -> None:
    importers = [
        m for m, path in MODULES.items() if not m.startswith("normfuse.cli") for i in _imports(path) if i.startswith("normfuse.cli")
    ]
    assert set(importers) <= {"normfuse.__main__"}


def test_import_loads_no_optional_library() -> None:
    """`import normfuse` works, and is quick, without any extra installed."""
    modules = "normfuse.api, normfuse.cli, normfuse.demo, normfuse.engines, normfuse.export"
    code = f"import sys, {modules}; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [pytest.param(m, id=m) for m in MODULES if not m.endswith("__main__")])
def test_optional_libraries_are_imported_where_used(module: str) -> None:
    """At the top of a file they would make every command need every extra; `need` gives the pip line instead."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [a.name for n in top if isinstance(n, ast.Import) for a in n.names] + [
        n.module or "" for n in top if isinstance(n, ast.ImportFrom)
    ]
    assert not [name for name in names if name.split(".")[0] in OPTIONAL]


def test_top_folders_are_no_packages_of_their_own() -> None:
    """`import passes` would load a second copy of every class: no installed package may have that name."""
    code = "import importlib.util as u; print([n for n in ('passes', 'export') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert importlib.util.find_spec("normfuse.passes") is not None
