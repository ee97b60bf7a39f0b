"""How a benchmark's command ends: exit codes as those of `normfuse`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from normfuse.errors import NormfuseError, UsageError

__all__ = ["exit_code"]


def exit_code(command: click.Command, module: str, args: Sequence[str] | None = None, *, interrupted: str = "interrupted") -> int:
    """Run the command of `python -m module`: 0 where it ends well, 1 for an error, 2 for a wrong argument, 130 where it is stopped.

    Args:
        args: None for those of the process.
        interrupted: what is told then.
    """
    try:
        command.main(args=None if args is None else list(args), prog_name=f"python -m {module}", standalone_mode=False)
    except SystemExit as e:
        return int(e.code or 0)
    except click.ClickException as e:
        e.show()
        return 2
    except NormfuseError as e:
        click.echo(f"error: {e}", err=True)
        return 2 if isinstance(e, UsageError) else 1
    except (click.Abort, KeyboardInterrupt):
        click.echo(interrupted, err=True)
        return 130
    return 0
