"""Imports point one way: a module knows its own room and the rooms below it, and no two modules know each other."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import normfuse

ROOT = Path(normfuse.__file__).parent
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
# Folders of tests about what stands beside the package, or about all of it.
BESIDE = {"benchmarks", "fuzz", "hostile", "latency", "mutation", "native"}
OPTIONAL = [
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "timm",
    "torchvision",
    "transformers",
    "tensorrt_rtx",
    "tensorrt",
    "openvino",
]


def _modules() -> dict[str, Path]:
    found = {}
    for room in ("", "passes", "export"):
        # Path.rglob does not follow links before Python 3.13, and these two folders are links in a checkout
        folder = (ROOT / room).resolve()
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(("normfuse", *filter(None, (room,)), *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = _modules()


def _floor(module: str) -> int:
    parts = module.split(".")
    room = ELSEWHERE.get(module) or (parts[1] if len(parts) > 1 and (len(parts) > 2 or parts[1] in FLOORS) else "ground")
    return FLOORS.index(room)


@cache
def _imports(module: str) -> tuple[tuple[int, str], ...]:
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


def test_every_module_has_a_floor() -> None:
    assert {FLOORS[_floor(m)] for m in MODULES if m != "normfuse.assets"} == set(FLOORS)


def test_imports_point_down() -> None:
    wrong = [
        f"{MODULES[module]}:{line}: {module} is on floor {FLOORS[_floor(module)]} and imports {imported}"
        for module in MODULES
        if module != "normfuse.assets"
        for line, imported in _imports(module)
        if _floor(imported) > _floor(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_know_each_other() -> None:
    """No circle of imports, those inside functions included."""
    known: dict[str, list[str]] = {m: [i for _, i in _imports(m) if i != m] for m in MODULES}
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for imported in known[module]:
                walk(imported, [*way, module])
            done.add(module)

    for module in MODULES:
        walk(module, [])


def test_rooms_are_small() -> None:
    """Nobody finds a file among forty. In `nn` and `importers` a file is a norm."""
    rooms: dict[Path, int] = {}
    for path in MODULES.values():
        rooms[path.parent] = rooms.get(path.parent, 0) + (path.name != "__init__.py")
    assert {folder.name: n for folder, n in rooms.items() if n > 20 and folder.name not in ("nn", "importers")} == {}


def test_tests_stand_where_their_subject_stands() -> None:
    """`tests/` has the rooms of the package: who knows where a module is knows where its tests are."""
    tests = Path(__file__).parent
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    rooms = {Path(*module.split(".")[1:]) for module, path in MODULES.items() if path.name == "__init__.py"}
    assert {str(f) for f in folders - rooms if f.parts[0] not in BESIDE} == set()


def test_command_line_is_imported_by_nobody() -> None:
    importers = {m for m in MODULES if not m.startswith("normfuse.cli") for _, i in _imports(m) if i.startswith("normfuse.cli")}
    assert importers <= {"normfuse.__main__"}


def test_import_loads_no_optional_library() -> None:
    """`import normfuse` works, and is quick, without any extra installed."""
    modules = "normfuse.api, normfuse.cli, normfuse.app.demo, normfuse.app.engines, normfuse.export"
    code = f"import sys, {modules}; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "[]"


def test_optional_libraries_are_imported_where_used() -> None:
    """At the top of a file they would make every command need every extra; `need` gives the pip line instead."""
    wrong = []
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{module}:{node.lineno}: {name}" for name in names if name.split(".")[0] in OPTIONAL]
    assert not wrong


def test_top_folders_are_no_packages_of_their_own() -> None:
    """`import passes` would load a second copy of every class: no installed package may have that name."""
    code = "import importlib.util as u; print([n for n in ('passes', 'export') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert importlib.util.find_spec("normfuse.passes") is not None
