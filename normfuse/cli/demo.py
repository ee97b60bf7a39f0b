"""`normfuse demo`."""

import click

from normfuse.cli.help import Command
from normfuse.cli.options import verbosity

__all__ = ["demo"]


@click.command(cls=Command, short_help="The whole job on two small trained models.")
@verbosity
def demo(quiet: bool) -> None:
    """Run the whole job on two small trained models that ship with normfuse."""
    from rich.console import Console

    from normfuse.app.demo import run

    run(Console(quiet=quiet))
