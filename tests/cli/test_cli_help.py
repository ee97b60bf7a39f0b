"""Help texts: every option stands in a group, every command has an example that parses; the shell completes names of models."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from normfuse.app.hf_folder import local_folder
from normfuse.cli import cli
from normfuse.cli.help import EXAMPLES, GROUPS, completed_source
from normfuse.errors import UsageError

VERBS = sorted(cli.commands)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_groups_and_an_example(verb: str) -> None:
    found = CliRunner().invoke(cli, [verb, "--help"], terminal_width=80)
    assert found.exit_code == 0
    assert found.output.rstrip().endswith(EXAMPLES[verb])
    command = cli.commands[verb]
    for option in (p for p in command.params if isinstance(p, click.Option) and not p.hidden):
        assert found.output.count(f"\n  {option.opts[0]}") + found.output.count(f", {option.opts[0]}") >= 1
    context = command.make_context(verb, shlex.split(EXAMPLES[verb])[2:], resilient_parsing=False)
    assert context.params is not None


def test_every_name_in_a_group_is_an_option() -> None:
    known = {p.name for command in cli.commands.values() for p in command.params}
    assert {name for names in GROUPS.values() for name in names} <= known


def test_names_of_models_are_completed() -> None:
    context, parameter = click.Context(cli), click.Argument(["source"])

    def completed(text: str) -> list[str]:
        return [str(item.value) for item in completed_source(context, parameter, text)]

    assert "timm:" in completed("ti")
    assert completed("mynet")[-1] == "mynet"
    pytest.importorskip("torchvision")
    assert "torchvision:resnet18" in completed("torchvision:resnet1")
    assert completed("hf:x") == []


def test_a_model_in_the_local_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub: Any = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def cached(name: str, file: str) -> str | None:
        asked.append((name, file))
        return str(tmp_path / file) if name == "org/small" else None

    monkeypatch.setattr(hub, "try_to_load_from_cache", cached)
    assert local_folder("org/small") == tmp_path
    assert local_folder(str(tmp_path)) == tmp_path
    assert asked == [("org/small", "config.json")]
    with pytest.raises(UsageError, match=r"the local cache has no such model: download it first \(hf download org/large\)"):
        local_folder("org/large")
    with pytest.raises(UsageError, match=r"expected .*config\.json"):
        local_folder(str(tmp_path / "nowhere"))
