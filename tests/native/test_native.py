"""The shared object of kernels: built where it can be, refused clearly where not, and its border to Python."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from normfuse import native, words
from normfuse.errors import NormfuseError, UsageError
from normfuse.ops import OPERATORS
from normfuse.quant.integers import integer_matmul
from normfuse.quant.packing import pack
from normfuse.quant.weight import QuantizedWeight
from tests.places import ROOT

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
there = pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
compiled = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@compiled
@pytest.mark.skipif(os.environ.get("NORMFUSE_NATIVE") == "0", reason="switched off by NORMFUSE_NATIVE=0")
def test_it_is_there_where_a_compiler_is() -> None:
    assert native.available(), native.why_not()


# -- where it is not there -----------------------------------------------------------------------------------------------


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes | None], Path]]:
    """Puts something else in the place of the object."""

    def place(content: bytes | None) -> Path:
        file = tmp_path / "_native.so"
        if content is not None:
            file.write_bytes(content)
        monkeypatch.setattr(native, "library_file", lambda: file)
        native._load.cache_clear()
        return file

    yield place
    native._load.cache_clear()


def test_missing(put: Callable[[bytes | None], Path]) -> None:
    put(None)
    assert not native.available()
    assert "does not exist" in native.why_not()
    assert "apt install g++" in native.why_not()
    for attempt in (native.path, native.library, native.isa, lambda: native.call("nf_two_pass_softmax")):
        with pytest.raises(NormfuseError, match=r"pip install -e \."):
            attempt()


def test_unreadable(put: Callable[[bytes | None], Path]) -> None:
    put(b"not a shared object")
    assert not native.available()
    assert "cannot be loaded" in native.why_not()
    assert "install normfuse again" in native.why_not()


@compiled
def test_of_another_version(put: Callable[[bytes | None], Path], tmp_path: Path) -> None:
    (tmp_path / "old.cpp").write_text('extern "C" int nf_isa() { return 0; }')
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "old.cpp", "-o", "old.so"], cwd=tmp_path, check=True)
    put((tmp_path / "old.so").read_bytes())
    assert not native.available()
    assert "another version" in native.why_not()


def test_switched_off() -> None:
    code = "from normfuse import native; assert not native.available(); print(native.why_not())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NORMFUSE_NATIVE": "0"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "NORMFUSE_NATIVE=0" in done.stdout


# -- the border ----------------------------------------------------------------------------------------------------------


@pytest.mark.checkout
def test_every_function_of_the_header_is_known() -> None:
    text = re.sub(r"//[^\n]*", "", (ROOT / "native" / "normfuse.h").read_text(encoding="utf-8"))
    found = {name: arguments.count(",") + 1 for name, arguments in re.findall(r"NF_EXPORT[^;(]*?\b(nf_\w+)\(([^)]*)\)", text)}
    plain = {
        "nf_codes_bytes": 1,
        "nf_packed_bytes": 4,
        "nf_isa_available": 1,
        "nf_isa": 1,
        "nf_force_isa": 1,
        "nf_operators": 1,
        "nf_pool": 1,
    }
    stated = {f.name: len(f.arguments) + 1 for operator in OPERATORS.values() for f in operator.functions}
    assert found == {**stated, **plain}


@compiled
@pytest.mark.checkout
def test_structures_and_words_are_those_of_the_headers(tmp_path: Path) -> None:
    lines = []
    for name, structure in (
        ("nf_weight", native.Weight),
        ("nf_conv", native.Conv),
        ("nf_codes_conv", native.CodesConv),
        ("nf_attention", native.Attention),
        ("nf_cache", native.Cache),
    ):
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for field, *_ in structure._fields_:
            lines.append(f"static_assert(offsetof({name}, {field}) == {getattr(structure, field).offset});")
    lines += [f"static_assert(NF_{name.upper()} == {value});" for name, value in (native.EPILOGUES | native.KINDS).items()]
    assert len(lines) > 40
    for table, expected in (("kEpilogues", words.EPILOGUES), ("kFunctions", words.FUNCTIONS), ("kNormKinds", words.KINDS)):
        lines.append(f"static_assert(sizeof nf::{table} / sizeof *nf::{table} == {len(expected)});")
        lines += [f'static_assert(std::string_view(nf::{table}[{i}]) == "{word}");' for i, word in enumerate(expected)]
    (tmp_path / "layout.cpp").write_text('#include <string_view>\n#include "words.h"\n' + "\n".join(lines))
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", "-I", str(ROOT / "native"), "layout.cpp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@there
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((torch.zeros(2, 3).double(), 2, 3, torch.zeros(2, 3)), "argument 1: found torch.float64", id="dtype"),
        pytest.param((torch.zeros(3, 2).T, 2, 3, torch.zeros(2, 3)), "expected a contiguous torch.float32", id="strides"),
        pytest.param((torch.zeros(2, 3, device="meta"), 2, 3, torch.zeros(2, 3)), "on meta", id="device"),
        pytest.param((None, 2, 3, torch.zeros(2, 3)), "argument 1: found NoneType", id="absent"),
        pytest.param((torch.zeros(2, 3), "two", 3, torch.zeros(2, 3)), "argument 2: found 'two'", id="number"),
        pytest.param((torch.zeros(2, 3), 2, 3), "found 3 arguments, expected 4", id="count"),
        pytest.param((torch.zeros(2, 3), -2, 3, torch.zeros(2, 3)), "nf_two_pass_softmax: ", id="what the kernel says"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        native.call("nf_two_pass_softmax", *arguments)
    assert message in str(raised.value)


@there
def test_a_wrong_structure_is_refused() -> None:
    with pytest.raises(UsageError, match=r"native\.Weight"):
        native.call("nf_matmul_i32", torch.zeros(1), torch.zeros(1, 1, dtype=torch.int8), 1, torch.zeros(1, 1, dtype=torch.int32))


@there
def test_results_are_written_in_place() -> None:
    x, y = torch.randn(4, 9), torch.empty(4, 9)
    native.call("nf_two_pass_softmax", x, 4, 9, y)
    torch.testing.assert_close(y, x.softmax(-1), rtol=1e-5, atol=1e-7)


# -- weights -------------------------------------------------------------------------------------------------------------


def _weight(n: int, k: int, bits: int, groups: int) -> QuantizedWeight:
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (n, k), dtype=torch.int8)
    return QuantizedWeight(codes, torch.randint(0, groups, (k,), dtype=torch.uint8), torch.rand(n) + 0.5, bits)


@there
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_instruction_set_gives_the_same_integers(bits: int) -> None:
    w = _weight(35, 83, bits, 3)
    q = torch.randint(-127, 128, (5, 83), dtype=torch.int8)
    expected = integer_matmul(q, w.operand())
    assert native.isas()[-1] == "scalar"
    before = native.isa()
    try:
        for isa in native.isas():
            native.force_isa(isa)
            assert native.isa() == isa
            found = torch.empty(5, 35, dtype=torch.int32)
            native.call("nf_matmul_i32", native.weight(pack(w), w.exponents, w.scale, None, bits), q, 5, found)
            assert torch.equal(found, expected), isa
        with pytest.raises(UsageError, match=r"force_isa\('mmx'\).*scalar"):
            native.force_isa("mmx")
    finally:
        native.force_isa(None)
    assert native.isa() == before


@there
def test_a_weight_keeps_its_tensors() -> None:
    w = _weight(16, 32, 4, 2)
    found = native.weight(pack(w), w.exponents.clone(), w.scale.clone(), None, 4)
    torch.empty(1 << 20)  # whatever was freed is given away
    acc, q = torch.empty(3, 16, dtype=torch.int32), torch.randint(-127, 128, (3, 32), dtype=torch.int8)
    native.call("nf_matmul_i32", found, q, 3, acc)
    assert torch.equal(acc, integer_matmul(q, w.operand()))


@there
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"packed": torch.zeros(5, dtype=torch.uint8)}, "found 5 bytes, expected", id="bytes"),
        pytest.param({"bits": 9}, "expected 2 to 8 bits", id="bits"),
        pytest.param({"exponents": torch.zeros(32, dtype=torch.int64)}, "exponents: found torch.int64", id="exponents"),
        pytest.param({"exponents": torch.full((32,), 16, dtype=torch.uint8)}, "1 to 16 exponents", id="large exponents"),
        pytest.param({"bias": torch.zeros(15)}, "bias: found 15 values, expected 16", id="bias"),
        pytest.param({"scale": torch.ones(16).double()}, "scale: found torch.float64", id="scale"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    w = _weight(16, 32, 4, 1)
    given = {"packed": pack(w), "exponents": w.exponents, "scale": w.scale, "bias": None, "bits": 4, **change}
    with pytest.raises(UsageError) as raised:
        native.weight(**given)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_channels_are_sorted_again_when_the_exponents_change() -> None:
    exponents = torch.tensor([2, 0, 1, 0], dtype=torch.uint8)
    sizes, order = native.sorted_channels(exponents)
    assert order is not None
    assert (sizes.tolist(), order.tolist()) == ([2, 1, 1], [1, 3, 2, 0])
    assert native.sorted_channels(exponents)[1] is order
    exponents.zero_()
    assert native.sorted_channels(exponents)[0].tolist() == [4]
    assert native.sorted_channels(exponents)[1] is None
    with torch.inference_mode():
        assert native.sorted_channels(torch.tensor([1, 0], dtype=torch.uint8))[0].tolist() == [1, 1]


# -- threads -------------------------------------------------------------------------------------------------------------

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


class _Threads(ctypes.Structure):
    _fields_ = (
        ("context", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("run", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, _TASK, ctypes.c_void_p)),
    )


def _run(count: int, total: int, task: Callable[[int], None]) -> None:
    pool = _Threads.from_address(native.library().nf_pool(count))
    assert pool.count == count
    pool.run(pool.context, total, _TASK(lambda _, i: task(i)), None)


@there
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_task_runs_once(count: int) -> None:
    for total in (0, 1, 2, 7, 200):
        done: list[int] = []
        _run(count, total, done.append)
        assert sorted(done) == list(range(total))


@there
def test_several_callers_at_once() -> None:
    def caller(_: int) -> int:
        done: list[int] = []
        for _round in range(20):
            _run(3, 10, done.append)
        return len(done)

    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(caller, range(8))) == [200] * 8


@there
def test_a_task_may_call_again() -> None:
    done: list[int] = []
    _run(3, 4, lambda _: _run(2, 5, done.append))
    assert sorted(done) == sorted(list(range(5)) * 4)


@there
def test_the_pool_follows_torch() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert _Threads.from_address(native.threads() or 0).count == count
    finally:
        torch.set_num_threads(before)
    assert native.library().nf_pool(0) is None


@there
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
import os, torch
from normfuse import native, words
torch.set_num_threads(2)
x, y = torch.randn(64, 512), torch.empty(64, 512)
native.call("nf_two_pass_softmax", x, 64, 512, y)
expected = y.numpy().tobytes()
def work():
    for _ in range(50):
        y.numpy().fill(0)  # PyTorch's own threads do not survive a fork
        native.call("nf_two_pass_softmax", x, 64, 512, y)
        assert y.numpy().tobytes() == expected
work()
for _ in range(4):
    child = os.fork()
    if child == 0:
        work()
        os._exit(17)
    work()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
