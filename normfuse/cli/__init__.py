"""The command `normfuse`: one file per verb.

Exit codes: 0 fine, 1 a check failed, 2 usage or any other error that normfuse reports, 3 a measurement that cannot tell, 130
interrupted. Nothing heavy is imported before a verb needs it, so that `--help` is instant.
"""

import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

import click

from normfuse import __version__
from normfuse.cli.bench import bench
from normfuse.cli.demo import demo
from normfuse.cli.evaluate import evaluate
from normfuse.cli.export import export
from normfuse.cli.generate import generate
from normfuse.cli.inspect import inspect
from normfuse.cli.messages import concise
from normfuse.cli.optimize import optimize
from normfuse.cli.passes import passes
from normfuse.cli.run import run
from normfuse.cli.verify import verify
from normfuse.cli.wording import in_options
from normfuse.errors import CheckFailed, NormfuseError, Undecided
from normfuse.telemetry import no_telemetry

__all__ = ["cli", "main"]

_log = logging.getLogger("normfuse")

_OUTCOMES: dict[type[Exception], tuple[str, int]] = {
    Undecided: ("undecided", 3),
    CheckFailed: ("failed", 1),
    NormfuseError: ("error", 2),
}
_arguments: list[str] = []  # of this process, for reports
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _version(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from normfuse.commit import commit

        of = commit()
        click.echo(f"normfuse, version {__version__}{of and f' (commit {of})'}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version, and exit.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Optimize trained PyTorch models: remove what normalization costs, prove the result, ship it.

    SOURCE is timm:NAME, torchvision:NAME, hf:DIR (a local Hugging Face folder), FILE.pt2 (a saved
    ExportedProgram), package.module:factory or FILE.py:factory. A factory returns a module, or a module and its
    example inputs.
    """
    context.meta["normfuse.args"] = _arguments


for command in (optimize, export, run, generate, bench, verify, evaluate, inspect, passes, demo):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (default: that of this process); the exit code."""
    if args is None:
        _in_utf8()
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _terminate)
    _quiet_libraries()
    no_telemetry()
    _arguments[:] = sys.argv[1:] if args is None else args
    try:
        cli.main(args=None if args is None else list(args), prog_name="normfuse", standalone_mode=False)
    except click.ClickException as e:
        shown = io.StringIO()
        e.show(shown)
        _say(concise(shown.getvalue().rstrip()))
        return 2
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted; nothing was written")
        return 130
    except BrokenPipeError:
        # the reader (`| head`) has gone; Python would complain once more while it closes standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except NormfuseError as e:
        _log.debug("where it happened", exc_info=True)
        kind, code = next(outcome for cls, outcome in _OUTCOMES.items() if isinstance(e, cls))
        _say(concise(f"{kind}: {in_options(str(e))}"))
        return code
    except SystemExit as e:
        # click raises none here: a factory, a module that was imported or a loader did
        _log.debug("where it happened", exc_info=True)
        _say(concise(f"error: the code that was loaded ended the process: sys.exit({e.code!r}); its functions have to return"))
        return 2
    except Exception as e:
        _log.debug("where it happened", exc_info=True)
        if _no_room(e):
            _say(concise(f"error: {e}; free some space on that disk, or set TMPDIR to a folder that can be written"))
            return 2
        _say(concise(f"error: {type(e).__name__}: {e}"))
        _say("This should not happen; please report it with the output of the same command and -vv")
        return 2
    return 0


def _in_utf8() -> None:
    """ONNX and its runtimes read names of files as UTF-8: where the locale says otherwise, start again in Python's UTF-8 mode."""
    if sys.getfilesystemencoding() != "utf-8" and os.name == "posix" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _no_room(e: Exception) -> bool:
    """A full disk; Python cannot find a folder for temporary files then."""
    return isinstance(e, OSError) and (e.errno in _NO_ROOM or "No usable temporary directory" in str(e))


def _say(text: str) -> None:
    click.echo(text, err=True)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # unwinds like Ctrl-C, so that temporary files go


def _quiet_libraries() -> None:
    """What other libraries think aloud is noise here; errors that matter come back as exceptions."""
    warnings.filterwarnings("ignore", module=r"(torch|torchvision|onnx|onnxscript|onnxruntime|timm|transformers|huggingface_hub)\b")
    for name in ("torch", "onnxscript", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)
