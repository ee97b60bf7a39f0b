"""Imports point one way: a module knows its own room and the rooms below it, and no two modules know each other."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.floors import FLOORS, MODULES, PACKAGE, PAGE, drawn, floor, imports

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


def test_every_module_has_a_floor() -> None:
    assert {floor(m) for m in MODULES} == set(FLOORS)


def test_imports_point_down() -> None:
    wrong = [
        f"{MODULES[module]}:{line}: {module} is on floor {floor(module)} and imports {imported}"
        for module in MODULES
        for line, imported in imports(module)
        if FLOORS.index(floor(imported)) > FLOORS.index(floor(module))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.checkout
def test_the_picture_shows_the_floors_as_they_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "flowchart TD" in page
    assert drawn(page) == page, "python -m tests.floors draws it again"


def test_no_two_modules_know_each_other() -> None:
    """No circle of imports, those inside functions included."""
    known: dict[str, list[str]] = {m: [i for _, i in imports(m) if i != m] for m in MODULES}
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
    importers = {m for m in MODULES if not m.startswith("normfuse.cli") for _, i in imports(m) if i.startswith("normfuse.cli")}
    assert importers <= {"normfuse.__main__"}


def test_import_loads_no_optional_library() -> None:
    """`import normfuse` works, and is quick, without any extra installed."""
    modules = "normfuse.api, normfuse.cli, normfuse.app.demo, normfuse.app.engines, normfuse.export"
    code = f"import sys, {modules}; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
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
