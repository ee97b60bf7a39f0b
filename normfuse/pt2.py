"""Saved `ExportedProgram`s (`.pt2`): written with their report, read without running what a file says.

`torch.export.load` unpickles example inputs and looks up any attribute of `torch` that a node names, so that a file can
run code. A file is therefore looked through first: pickles must pass torch's weights-only reader, nodes may only call
registered operators, and expressions over sizes may hold nothing but arithmetic.
"""

import ast
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from normfuse.errors import CaptureError, ExportError, UsageError
from normfuse.files import atomic
from normfuse.record import record

if TYPE_CHECKING:
    import torch
    from torch import fx

__all__ = ["load_program", "read_report", "save_program"]

_REPORT = "normfuse.json"
_OPERATORS = re.compile(
    r"torch\.ops\.[a-z]\w*\.[a-z]\w*(\.\w+)?|torch\.ops\.aten\._{0,2}[a-z]\w*(\.\w+)?|torch\.sym_[a-z]+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|sqrt|trunc)"
)
_DUNDER = "__"
_SYMBOLIC = frozenset((
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Min", "Max", "Mod", "PythonMod", "FloorDiv", "CleanDiv",
    "CeilDiv", "CeilToInt", "FloorToInt", "TruncToInt", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "Where", "ModularIndexing",
    "PowByNatural", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan",
    "StrictGreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair", "Tuple", "true", "false", "oo", "int_oo", "L", "True",
    "False",
))  # fmt: skip
_ATTRIBUTES = frozenset(("size", "stride", "storage_offset", "dim", "shape", "ndim"))
_ARITHMETIC = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Attribute, ast.Constant, ast.keyword, ast.Subscript, ast.Compare, ast.BinOp,
    ast.BoolOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.Tuple,
)  # fmt: skip


def save_program(gm: "fx.GraphModule", path: str | Path, *, force: bool = False) -> None:
    """Write what `normfuse.optimize` returned as an `ExportedProgram`, its report inside.

    Raises:
        ExportError: the module cannot be captured again; a module that was traced without example inputs has no shapes.
        UsageError: the file exists and `force` is off, or it cannot be written.
    """
    import torch

    found = record(gm)
    if found is None or not found.has_inputs:
        raise ExportError("a .pt2 file holds a program for given shapes: pass example inputs to optimize")
    try:
        program = torch.export.export(gm, found.args, found.kwargs, dynamic_shapes=found.dynamic_shapes)
    except Exception as e:
        raise ExportError(f"the optimized module could not be captured for {path}: {e}") from e
    with atomic(path, force=force) as partial, _Forgiving(partial) as file:
        torch.export.save(program, cast("IO[bytes]", file), extra_files={_REPORT: found.report.to_json()})


class _Forgiving(io.RawIOBase):
    """A new file that takes every write and raises the first failure when it is closed.

    torch's writer aborts the whole process when a write fails, because its destructor writes once more.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)  # torch goes back to the start when it is done

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._failure is None:
            try:
                self._file.write(data)
            except OSError as e:
                self._failure = e
        return size

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._file.close()
        except OSError as e:
            self._failure = self._failure or e
        if self._failure is not None:
            raise self._failure


def read_report(path: str | Path) -> str | None:
    """The JSON of the report that `save_program` put into a file; None when there is none."""
    with _archive(Path(path)) as archive:
        name = next((n for n in archive.namelist() if n.endswith(f"/extra/{_REPORT}")), None)
        return None if name is None else archive.read(name).decode("utf-8")


def load_program(path: str | Path, *, trust: bool = False) -> "torch.export.ExportedProgram":
    """The program in a `.pt2` file.

    Raises:
        UsageError: there is no such file, it is none, or it may run code and `trust` is off.
        CaptureError: this version of torch cannot read it.
    """
    import torch

    path = Path(path)
    if not trust:
        with _archive(path) as archive:
            reason = next(_dangers(archive), None)
        if reason is not None:
            raise UsageError(f"{path} could run code when it is loaded ({reason}); pass --trust if you know where it comes from")
    import normfuse.ops  # noqa: F401 - registers what quantized models call

    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs a traceback besides raising
    try:
        return torch.export.load(path)
    except Exception as e:
        raise CaptureError(
            f"torch {torch.__version__} cannot read {path}: {type(e).__name__}: {e}. Expected a file of torch.export.save"
        ) from e
    finally:
        log.setLevel(level)


def _archive(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as e:
        raise UsageError(f"{path} is not a saved ExportedProgram: expected a file of torch.export.save") from e


def _dangers(archive: zipfile.ZipFile) -> Iterator[str]:
    """Why loading could run code, one reason at a time."""
    inside = {name.partition("/")[2]: name for name in archive.namelist()}
    models = [n for n in inside if n.startswith("models/")]
    if not models:
        yield "it has no models/*.json, so it is of an older format that is made of pickles"
        return
    pickles = [n for n in inside if n.startswith("data/sample_inputs/")]
    for kind in ("weights", "constants"):
        for name in (n for n in inside if n.startswith(f"data/{kind}/") and n.endswith(".json")):
            for entry in json.loads(archive.read(inside[name]))["config"].values():
                if entry["use_pickle"]:
                    pickles.append(f"data/{kind}/{entry['path_name']}")
        pickles += [n for n in inside if n.startswith(f"data/{kind}/") and n.endswith(".pt")]
    for name in pickles:
        if not _plain(archive.read(inside[name])):
            yield f"{name} holds more than tensors"
    for name in models:
        yield from _suspicious(json.loads(archive.read(inside[name])), name)


def _plain(pickled: bytes) -> bool:
    import torch

    try:
        torch.load(io.BytesIO(pickled), weights_only=True)
    except Exception:
        return False
    return True


def _suspicious(x: Any, where: str) -> Iterator[str]:
    if isinstance(x, dict):
        for key, value in x.items():
            if key in ("target", "as_operator") and isinstance(value, str) and not _is_operator(value):
                yield f"{where} calls {value!r}"
            elif key == "expr_str" and not _is_arithmetic(value):
                yield f"{where} has the size {value!r}"
            elif key == "guards_code" and not all(_is_arithmetic(code) for code in value or ()):
                yield f"{where} has the guards {value!r}"
            yield from _suspicious(value, where)
    elif isinstance(x, list):
        for value in x:
            yield from _suspicious(value, where)


def _is_operator(target: str) -> bool:
    return _OPERATORS.fullmatch(target) is not None and _DUNDER not in target.replace("torch.ops.aten.__", "torch.ops.aten.")


def _is_arithmetic(code: Any) -> bool:
    try:
        tree = ast.parse(code, mode="eval") if isinstance(code, str) else None
    except SyntaxError:
        return False
    return tree is not None and all(_is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in _SYMBOLIC or re.fullmatch(r"[a-z]{1,3}\d+", name) is not None
        case ast.Attribute(attr=attr):
            return attr in _ATTRIBUTES
        case ast.Constant(value=str() as text):
            return re.fullmatch(r"\w*", text) is not None and _DUNDER not in text
        case _:
            return isinstance(node, _ARITHMETIC)
