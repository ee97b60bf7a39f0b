"""Kernels compiled ahead of time, on a machine without a GPU, and the cache of what came out."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest

import normfuse
from normfuse.cache import cache_folder
from normfuse.errors import MissingExtra, NormfuseError, UsageError
from normfuse.gpu import compile as ahead
from normfuse.gpu import source
from normfuse.gpu.compile import CAPABILITIES, Image, compiled, content_hash
from normfuse.gpu.launch import Launch, Operand
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.softmax import plan_softmax
from normfuse.gpu.tile import LONGEST

triton = pytest.importorskip("triton", reason="the kernels are written in Triton")

LONG = LONGEST + 3
SMALL = plan_softmax(8, "fp16")
#: Each kernel, its name in the PTX, and how many tensors and numbers it is called with.
LAUNCHES: dict[str, tuple[Launch, str, int]] = {
    "layer": (plan_norm("layer", 768, "fp16", gain="fp16", shift="fp32", residual=True, eps=1e-5), "normalize", 7),
    "rms": (plan_norm("rms", 192, "bf16", gain="bf16", shift=None, residual=True, eps=1e-6), "normalize", 6),
    "crms": (plan_norm("crms", 127, "fp32", gain=None, shift=None, residual=False, eps=1e-6), "normalize", 3),
    "l1": (plan_norm("l1", LONG, "fp16", gain="fp32", shift="fp32", residual=False, eps=0.0), "normalize_long", 5),
    "softmax": (plan_softmax(1000, "bf16"), "softmax", 3),
    "softmax_long": (plan_softmax(LONG, "fp32"), "softmax_long", 3),
    "rows": (plan_rows(768, "fp16", 8, static=None), "quantize", 4),
    "rows_static": (plan_rows(768, "fp32", 4, static=0.1), "quantize", 4),
    "rows_long": (plan_rows(LONG, "bf16", 8, static=None), "quantize_long", 4),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that the compiler was asked for."""
    asked: list[str] = []
    real = ahead._compile

    def count(launch: Launch, capability: int) -> Image:
        asked.append(launch.kernel)
        return real(launch, capability)

    monkeypatch.setattr(ahead, "_compile", count)
    return asked


def _entry() -> Path:
    (found,) = cache_folder().rglob("*.json")
    return found


def _each() -> list[object]:
    """Every kernel everywhere; what only differs in constants on the oldest and the newest."""
    everywhere = ("layer", "l1", "softmax", "softmax_long", "rows", "rows_long")
    of = {name: CAPABILITIES if name in everywhere else (CAPABILITIES[0], CAPABILITIES[-1]) for name in LAUNCHES}
    return [pytest.param(name, c, id=f"{name}-sm_{c}") for name in LAUNCHES for c in of[name]]


@pytest.mark.parametrize(("name", "capability"), _each())
def test_ptx_is_for_its_architecture(name: str, capability: int) -> None:
    launch, entry, given = LAUNCHES[name]
    image = compiled(launch, capability)
    own = f"sm_{capability}" + ("a" if capability >= 90 else "")
    assert (image.capability, image.arch, image.entry) == (capability, own, entry)
    assert re.findall(r"^\.target (\w+)", image.ptx, re.MULTILINE) == [own]
    assert re.findall(r"\.entry (\w+)\(", image.ptx) == [entry]
    # what drivers of CUDA 12.0 take, and those of 12.8, the first ones for Blackwell
    assert re.findall(r"^\.version (.*)", image.ptx, re.MULTILINE) == ["8.7" if capability >= 100 else "8.0"]
    types = re.findall(r"\.param \.(\w+)", image.ptx.partition(".entry")[2].partition(")")[0])
    assert len(types) == image.parameters >= given
    assert types[:given] == ["u64"] * (given - 1) + ["u32"]
    assert set(types[given:]) <= {"u64"}  # scratch that nobody needs
    for i in range(given, image.parameters):
        assert f"[{entry}_param_{i}]" not in image.ptx
    assert re.search(rf"\.reqntid {image.threads}\b", image.ptx)
    assert image.threads == 32 * launch.warps
    assert 0 <= image.shared <= 48 * 1024


def test_loads_are_wide() -> None:
    """16 bytes a thread where rows are a multiple of that, and no more than fit where they are not."""
    wide = compiled(plan_norm("rms", 768, "fp16", gain="fp16", shift=None, residual=True, eps=1e-6), 90).ptx
    assert all("v4.b32" in line for line in wide.splitlines() if "ld.global" in line or "st.global" in line)
    narrow = compiled(plan_norm("rms", 767, "fp16", gain="fp16", shift=None, residual=True, eps=1e-6), 90).ptx
    assert not any("v4.b32" in line for line in narrow.splitlines() if "ld.global" in line or "st.global" in line)


def test_quantization_rounds_twice_as_the_definition_does() -> None:
    """Product and rounding in one FMA would be rounded once, and so would a product with an approximate reciprocal."""
    ptx = compiled(plan_rows(768, "fp32", 8, static=None), 90).ptx
    assert "fma" not in ptx
    assert re.search(r"div\.rn(\.ftz)?\.f32", ptx)
    assert re.search(r"mul\.f32", ptx)
    assert "div.full" not in ptx
    assert "rcp" not in ptx


def test_a_second_call_reads_the_cache(compilations: list[str]) -> None:
    first = compiled(SMALL, 80)
    assert compiled(SMALL, 80) == first
    assert compilations == ["softmax.softmax"]
    compiled(SMALL, 86)
    assert len(compilations) == 2


def test_what_is_compiled_twice_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launch = plan_rows(24, "fp16", 4, static=None)
    first = compiled(launch, 80)
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "other"))
    assert compiled(launch, 80) == first
    assert str(Path(normfuse.__file__).parent) not in first.ptx
    assert ".loc" not in first.ptx


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.write_text(p.read_text()[:100]), id="cut"),
        pytest.param(lambda p: p.write_bytes(b"\xff\x00"), id="bytes"),
        pytest.param(lambda p: p.write_text("[]"), id="other"),
        pytest.param(lambda p: p.write_text(p.read_text().replace(".entry", ".entrx")), id="changed"),
        pytest.param(lambda p: (p.unlink(), p.mkdir()), id="folder"),
    ],
)
def test_a_damaged_entry_is_made_again(damage: object, compilations: list[str]) -> None:
    first = compiled(SMALL, 80)
    assert callable(damage)
    damage(_entry())
    assert compiled(SMALL, 80) == first
    assert len(compilations) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "file"))
    assert compiled(SMALL, 80).entry == "softmax"
    assert "not kept" in caplog.text


def test_threads_may_compile_the_same_kernel() -> None:
    found: list[Image] = []
    threads = [threading.Thread(target=lambda: found.append(compiled(SMALL, 89))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert [p.suffix for p in cache_folder().rglob("*") if p.is_file()] == [".json"]


def test_the_hash_is_of_all_that_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {
        "plain": content_hash(SMALL, 80),
        "capability": content_hash(SMALL, 90),
        "constants": content_hash(plan_softmax(7, "fp16"), 80),
        "dtype": content_hash(plan_softmax(8, "bf16"), 80),
        "warps": content_hash(dataclasses.replace(SMALL, warps=8), 80),
    }
    with monkeypatch.context() as m:
        m.setattr(triton, "__version__", "99.0")
        keys["triton"] = content_hash(SMALL, 80)
    shutil.copytree(source._FOLDER, tmp_path / "kernels")
    monkeypatch.setattr(source, "_FOLDER", tmp_path / "kernels")
    assert content_hash(SMALL, 80) == keys["plain"]
    path = tmp_path / "kernels" / "softmax.py"
    path.write_text(path.read_text() + "\n# another kernel\n")
    keys["source"] = content_hash(SMALL, 80)
    assert len(set(keys.values())) == len(keys)


def test_an_entry_is_plain_json() -> None:
    image = compiled(SMALL, 80)
    assert Image(**json.loads(_entry().read_text())["image"]) == image


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NORMFUSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "normfuse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "normfuse"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() == cache_folder()
    assert cache_folder().is_dir()


@pytest.mark.parametrize(
    ("launch", "capability", "kind", "said"),
    [
        pytest.param(SMALL, 75, UsageError, "compute capability 75: expected one of 80, 86, 89, 90, 100, 120", id="capability"),
        pytest.param(dataclasses.replace(SMALL, kernel="none.softmax"), 80, UsageError, "no file none.py", id="file"),
        pytest.param(dataclasses.replace(SMALL, kernel="softmax.none"), 80, UsageError, "no kernel 'none'", id="name"),
        pytest.param(
            dataclasses.replace(SMALL, inputs=(Operand("z", "fp16"),)), 80, UsageError, "the launch gives z, y", id="input"
        ),
        pytest.param(
            dataclasses.replace(SMALL, constants={"D": 8, "BLOCK": 9, "ROWS": 1}),
            80,
            NormfuseError,
            "does not compile",
            id="compiler",
        ),
    ],
)
def test_refusals(launch: Launch, capability: int, kind: type[NormfuseError], said: str) -> None:
    with pytest.raises(kind, match=said):
        compiled(launch, capability)


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET is set"):
        compiled(SMALL, 80)


def test_a_missing_or_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(triton, "__version__", "3.1.0")
        with pytest.raises(UsageError, match=r"triton 3\.1\.0 is too old; expected 3\.5"):
            compiled(SMALL, 80)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtra, match=r"pip install 'normfuse\[gpu\]'"):
        compiled(SMALL, 80)
