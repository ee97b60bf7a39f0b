"""The code in README.md and docs/ runs, and their links lead somewhere.

Every fenced `python` block of a page runs, in order, in one namespace; so does every `console` block (each line after
`$ ` is a command that must end with exit code 0, or with N where the line ends in `# exit N`) and every `sh` or `bash`
block, in the same empty folder. What follows `$ ` lines in a console block is an example of the output and is not compared.
A block that cannot run here is preceded by a line `<!-- not run: the reason -->`.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from normfuse.passes import PASSES
from tests.places import ROOT

pytestmark = pytest.mark.checkout

FRONT = (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md")
PAGES = [p for p in (*FRONT, *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()]
RUNNABLE = ("python", "console", "sh", "bash")
LIMIT_S = 300
SLOW = (
    "tensorrt.md",
    "openvino.md",
    "quantization.md",
    "start.md",
    "encoder.md",
    "vit-w8a8.md",
    "latency-test.md",
    "onnx-file.md",
)  # they build engines, or run many commands

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S[^\n]*-->\s*\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block: `line` is the page's line of its first line of code."""

    language: str
    body: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page that are to be run."""
    for found in _FENCE.finditer(text):
        if found["language"] in RUNNABLE and not _NOT_RUN.search(text[: found.start()]):
            indent = len(found["indent"])
            body = "".join(line[indent:] if line.strip() else "\n" for line in found["body"].splitlines(keepends=True))
            yield Block(found["language"], body, text.count("\n", 0, found.start("body")) + 1)


def commands(block: Block) -> Iterator[tuple[str, int]]:
    """Shell text and the exit code that it must have."""
    if block.language != "console":
        yield block.body, 0
        return
    for text in re.findall(r"^\$ ((?:.*\\\n)*.*)", block.body, re.MULTILINE):
        code = re.search(r"#\s*exit (\d+)\s*$", text)
        yield text, int(code[1]) if code else 0


def run_page(page: Path, folder: Path) -> int:
    """Run the blocks of `page` in `folder`; the number of blocks that ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "80",
    }
    found = list(blocks(page.read_text(encoding="utf-8")))
    for block in found:
        where = f"{page.relative_to(page.parent.parent)}:{block.line}"
        if block.language == "python":
            # a real file, with the page's line numbers: tracebacks and inspect.getsource then show the code
            source = folder / f"{page.stem}_line_{block.line}.py"
            source.write_text("\n" * (block.line - 1) + block.body, encoding="utf-8")
            exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), namespace)
            continue
        for text, expected in commands(block):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert done.returncode == expected, f"{where}: {text}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
    return len(found)


def _pages() -> Iterator[Any]:
    for page in PAGES:
        slow = [pytest.mark.slow] if page.name in SLOW else []
        yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=slow)


@pytest.mark.parametrize("page", list(_pages()))
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, tmp_path)


def test_readme_has_code_that_runs() -> None:
    assert {"python"} <= {b.language for b in blocks((ROOT / "README.md").read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(_FENCE, "", page.read_text(encoding="utf-8"))
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        path = page if not target else (page.parent / target)
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in _anchors(path)):
            missing.append(link)
    assert not missing


def _anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them from headings, and explicit ones."""
    text = re.sub(_FENCE, "", page.read_text(encoding="utf-8"))
    slugs = {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    return slugs | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


# --- the site ---------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))
    there = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert there <= named


def test_every_pass_has_its_reference() -> None:
    text = (ROOT / "docs" / "api" / "passes.md").read_text(encoding="utf-8")
    assert not [p for p in PASSES.values() if f"::: {type(p).__module__}.{type(p).__name__}\n" not in text]


def _notebook(markdown: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("as_notebook", ROOT / "docs" / "_site" / "as_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = json.loads(module.notebook(markdown))
    return found


@pytest.mark.parametrize("page", [pytest.param(p, id=p.name) for p in sorted((ROOT / "docs" / "howto").glob("*.md"))])
def test_a_page_is_a_notebook_with_the_same_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    made = _notebook(text)
    code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert len(code) == len(list(blocks(text)))
    assert [c.strip() for c in code if not c.startswith(("!", "%%"))] == [
        b.body.strip() for b in blocks(text) if b.language == "python"
    ]
    assert made["nbformat"] == 4
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])


def test_commands_of_a_page_are_commands_of_its_notebook() -> None:
    made = _notebook(
        "# A\n\n```console\n$ normfuse passes\noutput\n```\n\n```sh\necho a\n```\n<!-- not run: why -->\n```python\n1 / 0\n```\n"
    )
    code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code == ["!normfuse passes", "%%bash\necho a"]


# --- the runner itself ------------------------------------------------------------------------------------------------

PAGE = """
```python
x = 1
```
   ```python
   import pathlib
   pathlib.Path("made").write_text(str(x + 1))
   ```

<!-- not run: needs a GPU -->
```python
raise SystemExit
```

```console
$ cat made
2
$ echo a \\
    b > again
$ false  # exit 1
```

```text
not code
```
"""


def test_runner_keeps_the_namespace_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert run_page(page, tmp_path) == 3
    assert (tmp_path / "made").read_text() == "2"
    assert (tmp_path / "again").read_text() == "a b\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("```python\n1 / 0\n```\n", ZeroDivisionError, id="python"),
        pytest.param("```console\n$ true\n$ exit 3\n```\n", AssertionError, id="console"),
        pytest.param("```console\n$ true  # exit 1\n```\n", AssertionError, id="expected-failure"),
        pytest.param("```sh\nfalse | cat\n```\n", AssertionError, id="pipe"),
    ],
)
def test_runner_fails_where_a_reader_would(tmp_path: Path, text: str, error: type[Exception]) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(error):
        run_page(page, tmp_path)
