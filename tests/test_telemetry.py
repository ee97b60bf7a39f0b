"""Nothing that normfuse starts sends telemetry."""

import os
import subprocess
import sys

import pytest

from normfuse.telemetry import no_telemetry


def test_choice_of_the_user_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    no_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    no_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


def test_command_line_turns_it_off_before_any_runtime_is_imported() -> None:
    code = (
        "import os, sys; os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
        "from normfuse.cli import main\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "main(['--version'])\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1"
