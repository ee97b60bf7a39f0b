"""Hostile `.pt2` files: nothing runs, nothing is imported, nothing is written, and one message says why not."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from normfuse.errors import UsageError
from normfuse.pt2 import load_program
from tests.hostile.catalogue import PROGRAMS
from tests.hostile.programs import Members, honest, packed, write
from tests.hostile.watch import plant, untouched

#: They ask for nothing: what they hold beside the program is not taken over.
HARMLESS = {"note that looks up names"}


@pytest.fixture(scope="module")
def members() -> Members:
    return honest()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    plant(tmp_path)


def test_the_honest_file_is_loaded(members: Members) -> None:
    write("honest.pt2", packed(members))
    x = torch.randn(3, 8)
    expected = torch.export.load("honest.pt2").module()(x, scale="up")["y"]
    torch.testing.assert_close(load_program("honest.pt2").module()(x, scale="up")["y"], expected, rtol=0, atol=0)


def test_what_torch_itself_writes_is_loaded(members: Members, tmp_path: Path) -> None:
    """The writer of PyTorch aligns members and repeats their sizes behind them; `zipfile` does neither."""
    program = load_program_of(members)
    torch.export.save(program, tmp_path / "again.pt2", extra_files={"notes/a b.txt": "x"})
    assert load_program("again.pt2").graph_signature.user_inputs == ("x", "up")


def load_program_of(members: Members) -> torch.export.ExportedProgram:
    write("first.pt2", packed(members))
    return load_program("first.pt2")


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program(name: str, members: Members, tmp_path: Path) -> None:
    make, reason = PROGRAMS[name]
    data = make(members)
    assert data != packed(members), "the attack was not planted"
    write("hostile.pt2", data)
    with untouched(tmp_path):
        if name in HARMLESS:
            load_program("hostile.pt2").module()(torch.randn(3, 8), scale="up")
        else:
            with pytest.raises(UsageError, match=f"(?s)(could run code|is not a saved ExportedProgram).*({reason})") as error:
                load_program("hostile.pt2")
            assert len(str(error.value)) < 700
            assert "\n" not in str(error.value)


def test_torch_sees_only_what_was_checked(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reads a copy: neither the file nor members that nobody asked for reach it."""
    seen: list[bytes] = []
    real = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda source: (seen.append(source.getvalue()), real(source))[1])
    write("honest.pt2", packed([*members, ("archive/extra/normfuse.json", b"{}")]))
    load_program("honest.pt2")
    with zipfile.ZipFile(io.BytesIO(seen[0])) as copy:
        names = {n.removeprefix("archive/") for n in copy.namelist()}
    assert "models/model.json" in names
    assert not [n for n in names if n.startswith("extra/")]


def test_there_are_enough() -> None:
    assert len(PROGRAMS) >= 60
