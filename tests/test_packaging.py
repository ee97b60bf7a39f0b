"""What is built and installed is what stands in the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import normfuse
from tests.places import ROOT

pytestmark = pytest.mark.checkout

NATIVE = any(map(shutil.which, ("c++", "g++", "clang++")))
ROOMS = {"normfuse": ROOT / "normfuse", "normfuse.passes": ROOT / "passes", "normfuse.export": ROOT / "export"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        import tomli as tomllib
    else:
        import tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _sources(pattern: str) -> dict[str, Path]:
    """Files of the rooms by their path in the wheel; links are left out, what they lead to is counted once."""
    found = {}
    for package, folder in ROOMS.items():
        for path in folder.rglob(pattern):
            inside = path.relative_to(folder)
            if "__pycache__" not in inside.parts and not (package == "normfuse" and inside.parts[0] in ("passes", "export")):
                found[f"{package.replace('.', '/')}/{inside.as_posix()}"] = path
    return found


def test_package_list_is_the_folders(project: dict[str, Any]) -> None:
    """setuptools takes the list literally: a package that is not on it is missing from the wheel without a word."""
    folders = {name.removesuffix("/__init__.py").replace("/", ".") for name in _sources("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


@pytest.mark.parametrize("room", ["passes", "export"])
def test_links_lead_to_the_rooms(room: str) -> None:
    link = ROOT / "normfuse" / room
    assert link.is_symlink()
    assert Path(link.readlink()) == Path("..", room)


def test_every_folder_with_code_is_a_package() -> None:
    folders = {name.rpartition("/")[0] for name in _sources("*.py")}
    assert folders == {name.removesuffix("/__init__.py") for name in _sources("__init__.py")}


def test_version_can_be_read_without_importing() -> None:
    tree = ast.parse((ROOT / "normfuse" / "__init__.py").read_text(encoding="utf-8"))
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__version__"]
    assert [ast.literal_eval(v) for v in values] == [normfuse.__version__]


def test_citation_names_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {normfuse.__version__}\n" in text


def test_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (Unreleased|\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    releases = [h for h in headings if h != "Unreleased"]
    assert headings in (releases, ["Unreleased", *releases])
    assert releases == sorted(releases, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    assert releases[0] == normfuse.__version__


@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_every_dependency_is_pinned(project: dict[str, Any], python: str) -> None:
    """An open range takes whatever came out last night."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    extras = project["project"]["optional-dependencies"]
    named = {Requirement(r).name for group in (project["project"]["dependencies"], *extras.values()) for r in group} - {"normfuse"}
    pins: dict[str, int] = {}
    for line in (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            pins[canonicalize_name(pin.name)] = pins.get(canonicalize_name(pin.name), 0) + 1
    assert set(pins.values()) == {1}, "one pin a package"
    assert {canonicalize_name(name) for name in named} <= set(pins)


def test_sources_parse_on_the_oldest_python() -> None:
    for path in _sources("*.py").values():
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout with one small native source in place of the kernels, which take a minute to compile."""
    pytest.importorskip("setuptools", minversion="77")
    tmp_path = tmp_path_factory.mktemp("checkout")
    for name in ("normfuse", "passes", "export"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "native", tmp_path / "native", ignore=shutil.ignore_patterns("*.cpp"))
    (tmp_path / "native" / "small.cpp").write_text('#include "normfuse.h"\nNF_EXPORT const char* nf_isa() { return "small"; }\n')
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _build(folder: Path, kind: str, environment: dict[str, str] | None = None) -> tuple[Path, str]:
    out = tempfile.mkdtemp(dir=folder)
    call = f"import setuptools.build_meta as b; print('built', b.build_{kind}({out!r}))"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=folder, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    assert done.returncode == 0, done.stderr
    return Path(out, done.stdout.split("built ")[-1].strip()), done.stdout + done.stderr


def _contents(wheel: Path) -> tuple[set[str], dict[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = {n.rpartition("/")[2]: archive.read(n).decode() for n in names if n.endswith(("/METADATA", "/WHEEL"))}
    return {n for n in names if ".dist-info/" not in n}, info


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
def test_wheel_holds_every_source_file_and_no_other(copied: Path) -> None:
    wheel, _ = _build(copied, "wheel")
    names, info = _contents(wheel)
    assert names == {
        *_sources("*.py"),
        "normfuse/py.typed",
        *_sources("*.safetensors"),
        *_sources("*.css"),
        *_sources("*.jinja"),
        "normfuse/_native.so",
    }
    assert f"\nVersion: {normfuse.__version__}\n" in info["METADATA"]
    assert "\nLicense-Expression: Apache-2.0\n" in info["METADATA"]
    assert sum(p.stat().st_size for p in _sources("*.safetensors").values()) < 2_000_000
    # one wheel for every Python, and for one platform
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "Root-Is-Purelib: false" in info["WHEEL"]


@pytest.mark.parametrize(
    ("source", "compiler"),
    [
        pytest.param("", "no-such-compiler", id="no compiler"),
        pytest.param("#error this is not C++17\n", "", id="a compiler that fails"),
    ],
)
def test_install_goes_on_without_kernels(copied: Path, source: str, compiler: str) -> None:
    if not compiler and not NATIVE:
        pytest.skip("no C++ compiler")
    shutil.rmtree(copied / "build", ignore_errors=True)
    broken = copied / "native" / "broken.cpp"
    broken.write_text(source)
    try:
        wheel, log = _build(copied, "wheel", {"CXX": compiler} if compiler else None)
    finally:
        broken.unlink()
    names, _ = _contents(wheel)
    assert names == {*_sources("*.py"), "normfuse/py.typed", *_sources("*.safetensors"), *_sources("*.css"), *_sources("*.jinja")}
    assert "without its native kernels" in log
    assert (compiler or "this is not C++17") in log


def test_a_build_of_a_checkout_names_its_commit(copied: Path, tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git")
    folder = tmp_path / "checkout"
    shutil.copytree(copied, folder, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info", "small.cpp"))

    def git(*words: str) -> str:
        asked = ["git", "-c", "user.name=n", "-c", "user.email=n@n", "-c", "commit.gpgsign=false", *words]
        return subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    head = git("rev-parse", "--short=12", "HEAD")
    wheel, _ = _build(folder, "wheel", {"CXX": "no-such-compiler"})
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("normfuse/_commit.txt").decode().strip().startswith(head)
    sdist, _ = _build(folder, "sdist", {"CXX": "no-such-compiler"})
    with tarfile.open(sdist) as sources:
        (member,) = [m for m in sources.getmembers() if m.name.endswith("/normfuse/_commit.txt")]
        held = sources.extractfile(member)
        assert held is not None
        assert held.read().decode().startswith(head)
    code = "from normfuse.commit import commit; print(commit())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(head)


def test_sdist_holds_what_the_kernels_are_built_from(copied: Path) -> None:
    sdist, _ = _build(copied, "sdist")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    headers = {p.relative_to(ROOT).as_posix() for kind in ("h", "inc") for p in (ROOT / "native").rglob(f"*.{kind}")}
    assert headers
    assert headers | {"native/small.cpp", "setup.py", "pyproject.toml"} <= names
    assert not {n for n in names if n.endswith((".so", ".o"))}
