"""Saved programs are read without running what a file says."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from normfuse.app.source_options import Options
from normfuse.app.sources import load_source
from normfuse.errors import CaptureError, ExportError, UsageError
from normfuse.pt2 import load_program, read_report, save_program
from tests.evil import Evil


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        b, t, c = x.shape
        z = self.linear(x).reshape(b * t, c)[: (b * t) // 2 + 1]
        return {"z": z, "w": torch.cat([x.flatten(1), y], 1)}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    batch, seq = torch.export.Dim("batch", max=64), torch.export.Dim("seq")
    shapes = {"x": {0: batch, 1: seq}, "y": {0: batch}}
    exported = torch.export.export(Sized().eval(), (torch.randn(2, 6, 8), torch.randn(2, 5)), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "sized.pt2")
    return tmp_path / "sized.pt2"


def rewritten(program: Path, part: str, change: Callable[[bytes], bytes], name: str = "changed.pt2") -> Path:
    """A copy of an archive with one member changed."""
    changed = program.with_name(name)
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, change(data) if member.endswith(part) else data)
    return changed


def test_saved_program_with_dynamic_sizes_loads_without_trust(program: Path) -> None:
    found = load_source(str(program))
    assert isinstance(found.model, torch.export.ExportedProgram)
    assert [tuple(x.shape) for x in found.args] == [(2, 6, 8), (2, 5)]
    assert found.module(torch.randn(3, 4, 8), torch.randn(3, 5))["z"].shape == (7, 8)


def test_example_inputs_of_a_program_survive(program: Path) -> None:
    copy = rewritten(program, "nothing", lambda data: data)  # the copy itself breaks nothing
    assert load_program(copy).example_inputs is not None


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        pytest.param(
            "model.json", lambda d: d.replace(b"torch.ops.aten.linear.default", b"torch.os.mkdir"), "calls", id="operator"
        ),
        pytest.param("model.json", lambda d: d.replace(b"_operator.mul", b"_operator.call"), "calls", id="operator module"),
        pytest.param(
            "model.json",
            lambda d: d.replace(b"torch.ops.aten.linear.default", b"torch.ops.aten.__class__.__base__"),
            "calls",
            id="attribute of an operator",
        ),
        pytest.param(
            "model.json",
            lambda d: d.replace(b"\"Symbol('s17', positive=True, integer=True)\"", b"\"__import__('os').mkdir('pwned')\"", 1),
            "more than arithmetic",
            id="size",
        ),
        pytest.param(
            "model.json",
            lambda d: d.replace(b"\"L['y'].size()[0]", b"\"__import__('os').mkdir('pwned') or L['y'].size()[0]"),
            "more than arithmetic",
            id="guard",
        ),
        pytest.param("sample_inputs/model.pt", lambda d: pickle.dumps(Evil()), "more than tensors", id="example inputs"),
        pytest.param(
            "weights/model_weights_config.json",
            lambda d: d.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
            "more than tensors",
            id="weights",
        ),
    ],
)
def test_program_that_could_run_code_needs_trust(program: Path, part: str, change: Callable[[bytes], bytes], reason: str) -> None:
    changed = rewritten(program, part, change)
    with zipfile.ZipFile(program) as a, zipfile.ZipFile(changed) as b:
        assert [a.read(n) for n in a.namelist()] != [b.read(n) for n in b.namelist()], "the attack was not planted"
    with pytest.raises(UsageError, match=f"could run code.*{reason}.*trust=True"):
        load_source(str(changed))
    assert not Path("pwned").exists()


def test_program_of_an_older_format_needs_trust(program: Path) -> None:
    with zipfile.ZipFile("old.pt2", "w") as archive:
        archive.writestr("archive/version", "8.8")
    with pytest.raises(UsageError, match="older format"):
        load_source("old.pt2")


def test_file_that_is_no_archive_is_an_error() -> None:
    Path("text.pt2").write_text("hello")
    with pytest.raises(UsageError, match=r"not a saved ExportedProgram"):
        load_source("text.pt2")


def test_archive_of_something_else_is_an_error_even_with_trust() -> None:
    with zipfile.ZipFile("other.pt2", "w") as archive:
        archive.writestr("archive/hello.txt", "hello")
    with pytest.raises(CaptureError, match="cannot read"):
        load_source("other.pt2", Options(trust=True))


def test_report_of_a_foreign_program_is_none(program: Path) -> None:
    assert read_report(program) is None


def test_module_without_a_record_or_inputs_cannot_be_saved() -> None:
    with pytest.raises(ExportError, match="example inputs"):
        save_program(torch.fx.symbolic_trace(nn.Linear(2, 2)), "x.pt2")
    assert not Path("x.pt2").exists()
