"""Starts the process that holds TensorRT, reads its answer, and says what went wrong in words of the model."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfuse.errors import ExportError, UsageError
from normfuse.export.tensorrt.flavour import environment
from normfuse.progress import progress_bar

__all__ = ["ask", "module_path", "refusal"]

log = logging.getLogger(__name__)

#: What TensorRT says of a node, and what its user can do.
_ADVICE = (
    (
        "shiftIsAllZeros",
        "TensorRT quantizes symmetrically, with zero points of 0: quantize activations to int8 without zero point (with normfuse: "
        "ShiftQuant(activations='static') or form='weight_only'; in ONNX Runtime's quantizer: ActivationSymmetric=True, QInt8)",
    ),
    ("Plugin not found", "TensorRT has no such op: export with normfuse's target 'tensorrt', which uses standard ops only"),
    ("softcap", "TensorRT's attention has no softcap: export with attention='decomposed'"),
    (
        "Failed to import initializer",
        "TensorRT has no weights of this type; it takes float32, float16, bfloat16, int8, int4, int32 and int64",
    ),
    ("no optimization profile", "pass --shapes NAME=MIN:OPT:MAX for the inputs whose size may vary"),
    ("is_decomposable", "export with attention='decomposed'"),
    ("libnvinfer_lean", "this build of TensorRT has no lean runtime: leave version compatibility out"),
    (
        "cudaError",
        "this TensorRT needs an NVIDIA GPU and its driver to build; TensorRT for RTX (pip install 'normfuse[tensorrt]') needs none",
    ),
)
_SIGNALS = {s.value: s.name for s in signal.Signals}


def ask(module: str, work: str, request: Mapping[str, Any], *, label: str = "", progress: bool = False) -> dict[str, Any]:
    """Let a process that holds the TensorRT called `module` do `work`; its answer.

    Args:
        module: `tensorrt_rtx` or `tensorrt`.
        work: `build`, `support` or `validity`.
        request: see `normfuse.export.tensorrt.child`; plain JSON.
        label: shown beside a moving bar when `progress` and standard error is a terminal.

    Raises:
        ExportError: TensorRT refused, did not load, or ended the process; the message names the node by its module path.
        UsageError: a file could not be written, or a compute capability is unknown.
    """
    with tempfile.TemporaryDirectory(prefix="normfuse-build-") as folder, environment(module) as variables:
        asked, answered, heard = (Path(folder, name) for name in ("request.json", "answer.json", "output.txt"))
        asked.write_text(json.dumps({"work": work, "module": module, **request}), encoding="utf-8")
        variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        command = [sys.executable, "-m", "normfuse.export.tensorrt.child", str(asked), str(answered)]
        with heard.open("wb") as output, progress_bar(label, show=progress and bool(label), clock=True):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=variables)
            try:
                code = process.wait()
            finally:  # Ctrl-C, and whatever else unwinds: no builder goes on behind our back
                if process.poll() is None:
                    process.kill()
                    process.wait()
        said = heard.read_text(encoding="utf-8", errors="replace")
        if said.strip():
            log.debug("the process of %s said:\n%s", module, said)
        if code != 0 or not answered.exists():
            raise ExportError(_death(module, work, code, said))
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "error" in answer:
        _raise(module, answer["error"])
    return answer


def _death(module: str, work: str, code: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    how = f"was ended by {_SIGNALS.get(-code, f'signal {-code}')}" if code < 0 else f"ended with code {code}"
    memory = " (out of memory?)" if code == -signal.SIGKILL else ""
    last = f"; its last words: {lines[-1][:300]}" if lines else ""
    return f"the process of {module} {how}{memory} during {work!r}{last}. Nothing was written"


def _raise(module: str, error: Mapping[str, Any]) -> None:
    text = " ".join(str(error.get("text", "")).split())
    if error["kind"] == "write":
        raise UsageError(f"the engine could not be written: {text}")
    if error["kind"] == "capability":
        raise UsageError(text)
    if error["kind"] == "load":
        raise ExportError(text)
    if error["kind"] == "parse" and error["nodes"]:
        raise ExportError(f"{module} does not take this model. " + "; ".join(map(refusal, error["nodes"][:3])))
    if error["kind"] == "unexpected":
        log.debug("in the process of %s:\n%s", module, error.get("trace", ""))
    raise ExportError(f"{module} could not build the engine: {_shortened(text)}{_named(text)}{_advice(text)}")


def refusal(error: Mapping[str, str]) -> str:
    """One node that the parser refused, in one sentence."""
    text = " ".join(error["text"].split())
    where = module_path(error["node"])
    place = f"at {where}" if where else "at the top of the model"
    return f"{error['op'] or 'a weight'} {place} (node {error['node'] or '?'}): {_shortened(text)}{_advice(text)}"


def module_path(node: str) -> str:
    """`/blocks/3/attn/qkv/MatMul` stands in the module `blocks.3.attn.qkv`."""
    return node.strip("/").rpartition("/")[0].replace("/", ".")


def _named(text: str) -> str:
    """The module that a build error talks about, if it names one of our nodes."""
    found = re.search(r"(?<![\w.])(/(?:[\w.]+/)+[A-Z]\w*)", text)
    return f" [{module_path(found[1])}]" if found else ""


def _shortened(text: str) -> str:
    text = re.sub(r"^In node -?\d+ with name: .*? and operator: .*?\(\w+\): ", "", text)
    return text if len(text) <= 400 else f"{text[:397]}..."


def _advice(text: str) -> str:
    return next((f". {advice}" for sign, advice in _ADVICE if sign in text), "")
